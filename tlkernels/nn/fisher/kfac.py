r"""Kronecker-factored approximations of the Fisher information: K-FAC and EK-FAC.

For a layer with weight W (and bias b, as one more column whose input is 1), inputs :math:`a_{nt}` and gradients
:math:`g_{nt}` of the samples' losses by its outputs,

.. math::
    F \approx A \otimes G, \qquad
    \text{expand: } A = \frac{1}{NT} \sum_{nt} a_{nt} a_{nt}^\top, \quad G = \frac1N \sum_{nt} g_{nt} g_{nt}^\top ,

    \text{reduce: } A = \frac1N \sum_n \bar a_n \bar a_n^\top, \quad
    G = \frac1N \sum_n \Big(\sum_t g_{nt}\Big) \Big(\sum_t g_{nt}\Big)^\top .

For one token per sample both are the same. Positions of a convolution are its tokens, and patches their inputs.

James Martens and Roger Grosse. *Optimizing Neural Networks with Kronecker-factored Approximate Curvature.* ICML 2015,
arXiv:1503.05671.
Runa Eschenhagen et al. *Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures.* NeurIPS
2023, arXiv:2311.00636 (expand and reduce).
Thomas George et al. *Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis.* NeurIPS 2018,
arXiv:1806.03884 (EK-FAC).
Hippolyt Ritter et al. *Online Structured Laplace Approximations for Overcoming Catastrophic Forgetting.* NeurIPS 2018,
arXiv:1805.07810 (the quadratic penalty).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tlkernels import ops
from tlkernels.nn.fisher._batches import Forward
from tlkernels.nn.fisher._layers import ConvRule, LinearRule, Use, _cast, accumulator
from tlkernels.nn.fisher._taps import Unit
from tlkernels.nn.fisher.diagonal import Accumulation, Sums

__all__ = ["EKFAC", "KFAC"]

TokenMask = str | Callable[[Any], Tensor]


class _Block(NamedTuple):
    """A block of the approximation: one layer's weight and bias together, or one of them."""

    weight: str | None
    bias: str | None
    rows: int
    cols: int  # of the factor A: inputs and the bias, 1 for a bias alone

    @property
    def key(self) -> str:
        name = self.weight or self.bias
        assert name is not None
        return name.rpartition(".")[0] or name if self.weight and self.bias else name


class KFAC(Accumulation):
    r"""K-FAC of the linear layers and convolutions of a model.

    Parameters
    ----------
    model, loss, kind, parameters, forward, reduction, token_reduction, ignore_index, samples, generator, verify,
    eval_mode, progress
        As for `FisherDiagonal`.
    approx : "expand" or "reduce"
        What a sample's tokens are. Default "expand".
    damping : float
        Default of `solve`, >= 0. Default 1e-3.
    others : "skip" or "error"
        What to do with parameters that are in no `torch.nn.Linear`, ``Conv1d`` or ``Conv2d`` (of one group), or whose
        layer is not all that uses them: leave them out (their block is 0), or raise. `report` lists them.
    token_mask : str or callable, optional
        Which tokens count, ``[N, T]``: the key of a dict batch such as ``"attention_mask"``, or a function of the
        batch. Used for layers with T tokens (or several uses of T).

    Attributes
    ----------
    count : int
        Samples so far.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `FisherDiagonal`; ValueError where no parameter has a layer that K-FAC knows, or `others` is "error" and one
        has not.

    Notes
    -----
    The module says the equations: a mean over samples, as the Fisher information is, with weight and bias in one
    block. With batches of different T, A is the mean over all tokens. The damped inverse is that of
    :math:`A \otimes G + \lambda I`, exactly, by eigendecomposition in float64. Uses of a shared layer count as more
    tokens.

    References
    ----------
    Martens and Grosse, 2015, arXiv:1503.05671. Eschenhagen et al., 2023, arXiv:2311.00636.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.nn.fisher import KFAC
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> kfac = KFAC(model, kind="exact", progress=False).accumulate([(torch.randn(6, 4), torch.randint(3, (6,)))])
    >>> [tuple(f.shape) for f in kfac.factors()["2"]]
    [(9, 9), (3, 3)]
    """

    def __init__(
        self, model: nn.Module, loss: str | Callable[[Any, Any], Tensor] = "cross_entropy", kind: str = "empirical", *,
        approx: str = "expand", damping: float = 1e-3, others: str = "skip", token_mask: TokenMask | None = None,
        parameters: Iterable[str] | None = None, forward: Forward | None = None, reduction: str | None = None,
        token_reduction: str = "sum", ignore_index: int = -100, samples: int = 1,
        generator: torch.Generator | None = None, verify: bool = True, eval_mode: bool = True,
        progress: bool | None = None,
    ) -> None:  # fmt: skip
        op = type(self).__name__
        if approx not in ("expand", "reduce"):
            raise ValueError(f"{op}: approx is {approx!r}; expected 'expand' or 'reduce'")
        if others not in ("skip", "error"):
            raise ValueError(f"{op}: others is {others!r}; expected 'skip' or 'error'")
        _check_damping(op, damping)
        super().__init__(
            model, loss, kind, parameters=parameters, forward=forward, reduction=reduction,
            token_reduction=token_reduction, ignore_index=ignore_index, samples=samples, generator=generator,
            verify=verify, eval_mode=eval_mode, progress=progress, fallback=False,
            allowed=lambda rule: type(rule) in (LinearRule, ConvRule),
        )  # fmt: skip
        self.approx, self.damping, self.others, self.token_mask = approx, damping, others, token_mask
        engine = self._engine
        for unit in engine.taps.units:
            if getattr(unit.modules[0], "groups", 1) != 1:
                unit.dead = "a convolution of several groups"
                engine.slow.update(dict.fromkeys(unit.names, unit.dead))
        self._blocks = {
            unit: self._block(unit) for unit in engine.taps.units if not unit.dead
        }  # fmt: skip
        self._check_others()
        if not self._blocks:
            raise ValueError(f"{op}: model has no linear layer or convolution whose parameters require grad")
        self._start()

    def __enter__(self) -> Any:
        return self

    def _block(self, unit: Unit) -> _Block:
        weight, bias = unit.slots.get("weight"), unit.slots.get("bias")
        wanted = self._engine.wanted
        if weight is None:
            assert bias is not None
            return _Block(None, bias, wanted[bias].numel(), 1)
        rows = wanted[weight].shape[0]
        return _Block(weight, bias, rows, wanted[weight].numel() // rows + (bias is not None))

    def _check_others(self) -> None:
        if self.others == "error" and self._engine.slow:
            name, why = next(iter(self._engine.slow.items()))
            raise ValueError(
                f"{self._op}: {name} has no Kronecker factors: {why}; expected none such, or others='skip'"
            )

    def _start(self) -> None:
        like: dict[str, Tensor] = {}
        for block in self._blocks.values():
            of = self._engine.wanted[block.weight or block.bias or ""]
            like[f"{block.key} A"] = of.new_empty((block.cols, block.cols), dtype=accumulator(of.dtype))
            like[f"{block.key} G"] = of.new_empty((block.rows, block.rows), dtype=accumulator(of.dtype))
        self._sums = Sums(like)
        self._tokens = dict.fromkeys((block.key for block in self._blocks.values()), 0.0)
        self.count = 0
        self._broken = self._reduced = False
        self._eigen: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def reset(self) -> None:
        """Forget what was accumulated."""
        self._start()

    # ---- data

    def accumulate(self, loader: Iterable[Any], *, progress: bool | None = None) -> Any:
        """Add the samples of a loader; see `FisherDiagonal.accumulate`."""
        self._pass(loader, progress, self._batch)
        return self

    def _batch(self, batch: Any) -> int:
        now, seen = self._sums.now, dict.fromkeys(self._tokens, 0.0)
        mask = self._mask(batch)

        def sink(unit: Unit, module: nn.Module, uses: list[Use], scale: float) -> None:
            block = self._blocks[unit]
            g_sum = now[f"{block.key} G"]
            x, grad, weight = self._rows(unit, module, uses, mask, g_sum)
            a_sum = None
            if block.key in seen and not seen[block.key]:  # inputs are those of the other probes
                seen[block.key] = float(x.shape[0] * x.shape[1] if weight is None else weight.sum())
                if block.weight is None:
                    now[f"{block.key} A"] += seen[block.key] if self.approx == "expand" else x.shape[0]
                else:
                    a_sum = now[f"{block.key} A"]
            ops.kfac_factors_linear_(
                a_sum, g_sum, x, grad, bias=bool(block.weight and block.bias), approx=self.approx, token_weight=weight,
                scale_g=scale,
            )  # fmt: skip

        n = self._engine.run(batch, sink, None)
        self._check_others()
        if n:
            self._eigen = {}
            self._sums.step()
            self.count += n
            for key, tokens in seen.items():
                self._tokens[key] += tokens
        return n

    def _mask(self, batch: Any) -> Tensor | None:
        if self.token_mask is None:
            return None
        if isinstance(self.token_mask, str):
            if not isinstance(batch, Mapping) or self.token_mask not in batch:
                raise ValueError(f"{self._op}: token_mask is {self.token_mask!r}, which the batch does not have")
            mask = batch[self.token_mask]
        else:
            mask = self.token_mask(batch)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{self._op}: token_mask gives {got}; expected a tensor (samples, tokens)")
        return mask.detach()

    def _rows(
        self, unit: Unit, module: nn.Module, uses: list[Use], mask: Tensor | None, like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(inputs [N, T, I], gradients [N, T, O], weights [N, T] or None) of all uses of a layer."""
        rule = unit.rule
        if isinstance(rule, ConvRule):
            uses = [(rule.patches(module, x), grad.flatten(2).mT) for x, grad in uses]
        x, grad = uses[0] if len(uses) == 1 else rule.join(module, uses) if isinstance(rule, LinearRule) else (
            torch.cat([x for x, _ in uses], 1), torch.cat([g for _, g in uses], 1)
        )  # fmt: skip
        x, grad = _cast({"": like}, x, grad)
        weight = None
        if mask is not None and mask.shape[0] == x.shape[0] and x.shape[1] == len(uses) * mask.shape[1]:
            weight = mask.to(like).repeat(1, len(uses))
        return x.contiguous(), grad.contiguous(), weight

    def all_reduce(self, process_group: Any = None) -> Any:
        """Sum over processes; see `FisherDiagonal.all_reduce`."""
        keys = list(self._tokens)
        first = next(iter(self._sums.now.values()))
        totals = torch.tensor([self._tokens[key] for key in keys], dtype=torch.float64, device=first.device)
        tokens = Sums({"tokens": totals})
        tokens.now["tokens"].copy_(totals)
        self._all_reduce([self._sums, tokens], process_group)
        self._tokens = dict(zip(keys, tokens.sum("tokens").tolist(), strict=True))
        self._eigen = {}
        return self

    # ---- results

    def _served(self) -> dict[Unit, _Block]:
        return {unit: block for unit, block in self._blocks.items() if not unit.dead}

    def _factor(self, block: _Block) -> tuple[Tensor, Tensor]:
        """(A, G), float64."""
        weight = self._tokens[block.key] if self.approx == "expand" else float(self.count)
        a = self._sums.sum(f"{block.key} A") / (weight or 1.0)
        return a, self._sums.sum(f"{block.key} G") / self.count

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return ``{layer: (A, G)}``: float32, or float64 for layers of that.

        A layer with both weight and bias goes by its own name, a lone parameter by the parameter's.

        Raises
        ------
        RuntimeError
            If nothing was accumulated.
        """
        self._ready()
        found = {}
        for block in self._served().values():
            dtype = self._sums.now[f"{block.key} A"].dtype
            a, g = self._factor(block)
            found[block.key] = (a.to(dtype), g.to(dtype))
        return found

    def _eigendecomposition(self, block: _Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(eigenvalues and eigenvectors of A, and of G), float64; eigenvalues that rounding made negative are 0."""
        if block.key not in self._eigen:
            parts: list[Tensor] = []
            for name, factor in zip("AG", self._factor(block), strict=True):
                if not bool(factor.isfinite().all()):
                    raise ValueError(
                        f"{self._op}: factor {name} of {block.key} is not finite; expected finite gradients"
                    )
                values, vectors = torch.linalg.eigh(factor)
                parts += [values.clamp(min=0.0), vectors]
            self._eigen[block.key] = (parts[0], parts[1], parts[2], parts[3])
        return self._eigen[block.key]

    def _spectrum(self, block: _Block) -> Tensor:
        """Eigenvalues ``[rows, cols]`` of the block, in the eigenbasis of its factors."""
        a, _, g, _ = self._eigendecomposition(block)
        return g[:, None] * a[None, :]

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues of the approximation, float64, descending; parameters without factors add none."""
        self._ready()
        return torch.cat([self._spectrum(b).flatten() for b in self._served().values()]).sort(descending=True).values

    def _matrix(self, block: _Block, vectors: Mapping[str, Tensor]) -> Tensor:
        """The block's part of `vectors`, ``[rows, cols]``."""
        parts = []
        for name in (block.weight, block.bias):
            if name is None:
                continue
            if name not in vectors:
                raise ValueError(f"{self._op}: vectors lack {name!r}; expected an entry for each parameter of a layer")
            shape = self._engine.wanted[name].shape
            if vectors[name].shape != shape:
                raise ValueError(
                    f"{self._op}: vectors[{name!r}] has shape {tuple(vectors[name].shape)}; expected {tuple(shape)}"
                )
            parts.append(vectors[name].reshape(block.rows, -1))
        return torch.cat(parts, 1)

    def _apply(
        self, vectors: Mapping[str, Tensor], function: Callable[[_Block, Tensor], Tensor], rest: float
    ) -> dict[str, Tensor]:
        """`function` of every block; entries without one times `rest`."""
        self._ready()
        for name in vectors:
            if name not in self._engine.wanted:
                raise ValueError(f"{self._op}: vectors have {name!r}; expected names of parameters")
        found: dict[str, Tensor] = {}
        for block in self._served().values():
            out = function(block, self._matrix(block, vectors).to(torch.float64))
            if block.weight is not None:
                like = vectors[block.weight]
                flat = out[:, :-1] if block.bias is not None else out
                found[block.weight] = flat.reshape(like.shape).to(like.dtype)
            if block.bias is not None:
                like = vectors[block.bias]
                found[block.bias] = out[:, -1].reshape(like.shape).to(like.dtype)
        return {name: found[name] if name in found else v * rest for name, v in vectors.items()}

    def _times(self, block: _Block, matrix: Tensor) -> Tensor:
        a, g = (f.to(matrix.dtype) for f in self._factor(block))
        return g @ matrix @ a

    def matvec(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply by the approximation.

        Parameters
        ----------
        vectors : mapping of str to Tensor
            By parameter name, shaped like the parameters; one for each parameter with factors.

        Returns
        -------
        dict of str to Tensor
            Like `vectors`; zeros for parameters without factors.

        Raises
        ------
        ValueError
            Naming an entry that is missing, unknown, or of another shape.
        RuntimeError
            If nothing was accumulated.
        """
        return self._apply(vectors, self._times, 0.0)

    def solve(self, vectors: Mapping[str, Tensor], damping: float | None = None) -> dict[str, Tensor]:
        r"""Multiply by the damped inverse, :math:`(F + \lambda I)^{-1}`.

        Parameters
        ----------
        vectors : mapping of str to Tensor
            As for `matvec`.
        damping : float, optional
            :math:`\lambda \ge 0`; the constructor's by default.

        Returns
        -------
        dict of str to Tensor
            Like `vectors`; parameters without factors are divided by the damping alone.

        Raises
        ------
        ValueError
            If the damping is negative, or 0 where F has an eigenvalue 0 (to rounding).
        """
        damping = self.damping if damping is None else damping
        _check_damping(self._op, damping)

        def inverse(block: _Block, matrix: Tensor) -> Tensor:
            values = self._spectrum(block) + damping
            if not bool((values > 1e-15 * values.max()).all()):
                raise ValueError(f"{self._op}: damping is {damping}, and {block.key} is singular; expected > 0")
            _, ua, _, ug = self._eigendecomposition(block)
            return ug @ ((ug.T @ matrix @ ua) / values) @ ua.T

        served = {n for b in self._served().values() for n in (b.weight, b.bias)}
        if damping == 0 and any(name not in served for name in vectors):
            raise ValueError(f"{self._op}: damping is 0 with parameters that have no factors; expected > 0")
        return self._apply(vectors, inverse, 1.0 / damping if damping else 0.0)

    def quadratic(self, delta: Mapping[str, Tensor]) -> Tensor:
        r"""Return :math:`\delta^\top F \delta`, the (twice) penalty of K-FAC EWC; differentiable in `delta`.

        Parameters
        ----------
        delta : mapping of str to Tensor
            As for `matvec`; entries without factors count 0.

        Returns
        -------
        Tensor
            A scalar of the accumulators' dtype.
        """
        self._ready()
        terms = []
        for block in self._served().values():
            dtype = self._sums.now[f"{block.key} A"].dtype
            terms.append(self._form(block, self._matrix(block, delta).to(dtype)))
        return torch.stack(terms).sum()

    def _form(self, block: _Block, matrix: Tensor) -> Tensor:
        return (matrix * self._times(block, matrix)).sum()

    # ---- state

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "approx": self.approx}

    def state_dict(self) -> dict[str, Any]:
        """Return all that continues the accumulation exactly; see `FisherDiagonal.state_dict`."""
        if self._broken:
            raise self._is_broken()
        return {
            **self._settings(), "count": self.count, "reduced": self._reduced, "generator": self._generator_state(),
            "sums": self._sums.state_dict(), "tokens": dict(self._tokens),
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where another object was; see `FisherDiagonal.load_state_dict`."""
        self._check_settings(state_dict)
        self._sums.check(self._op, state_dict.get("sums"))
        self._sums.load_state_dict(state_dict["sums"])
        self._tokens = dict(state_dict["tokens"])
        self._eigen = {}
        self._load_common(state_dict)


class EKFAC(KFAC):
    r"""EK-FAC: the exact diagonal of the Fisher information in the eigenbasis of K-FAC's factors.

    Two passes: `accumulate` finds the factors, `correct` the diagonal; `fit` does both.

    Parameters
    ----------
    model, loss, kind, approx, damping, others, token_mask, parameters, forward, reduction, token_reduction,
    ignore_index, samples, generator, verify, eval_mode, progress
        As for `KFAC`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `KFAC`; RuntimeError for results before `correct`, or `accumulate` after it.

    Notes
    -----
    .. math::
        F \approx (U_A \otimes U_G) \operatorname{diag}(S) (U_A \otimes U_G)^\top, \qquad
        S = \frac1N \sum_n \Big(U_G^\top \big(\sum_t g_{nt} a_{nt}^\top\big) U_A\Big)^{\circ 2} .

    Of all diagonals in that basis this one is nearest to the Fisher information of the layer. `token_mask` has no part
    in S, which is made of true per-sample gradients.

    References
    ----------
    George et al., 2018, arXiv:1806.03884.
    """

    def _start(self) -> None:
        super()._start()
        self._corrected = Sums({})
        self._basis: dict[str, tuple[Tensor, Tensor]] = {}
        self.corrected_count = 0

    def fit(self, loader: Iterable[Any], *, progress: bool | None = None) -> Any:
        """`accumulate` and `correct` with a loader that can be read twice.

        Raises
        ------
        TypeError
            If it can be read only once.
        """
        if iter(loader) is loader:
            raise TypeError(
                f"{self._op}: loader is a {type(loader).__name__}, which can be read once; expected a list or "
                "a DataLoader"
            )
        self.accumulate(loader, progress=progress)
        return self.correct(loader, progress=progress)

    def accumulate(self, loader: Iterable[Any], *, progress: bool | None = None) -> Any:
        """Add the samples of a loader to the factors, before `correct`."""
        if self._basis:
            raise RuntimeError(f"{self._op}: accumulate after correct would change the basis; call reset first")
        return super().accumulate(loader, progress=progress)

    def correct(self, loader: Iterable[Any], *, progress: bool | None = None) -> Any:
        """Add the samples of a loader to the diagonal. The first call fixes the basis."""
        self._ready()
        if not self._basis:
            basis, like = {}, {}
            for block in self._served().values():
                _, ua, _, ug = self._eigendecomposition(block)
                dtype = self._sums.now[f"{block.key} A"].dtype
                basis[block.key] = (ua.to(dtype).contiguous(), ug.to(dtype).contiguous())
                like[block.key] = ug.new_empty((block.rows, block.cols), dtype=dtype)
            self._basis, self._corrected = basis, Sums(like)
        reduced, self._reduced = self._reduced, False  # that of the factors
        try:
            self._pass(loader, progress, self._correct_batch)
        finally:
            self._reduced = reduced
        return self

    def _correct_batch(self, batch: Any) -> int:
        now = self._corrected.now

        def sink(unit: Unit, module: nn.Module, uses: list[Use], scale: float) -> None:
            block = self._blocks[unit]
            if block.key not in now:
                return
            ua, ug = self._basis[block.key]
            x, grad, _ = self._rows(unit, module, uses, None, ug)
            if block.weight is None:
                rotated = grad.to(ug.dtype) @ ug
                ops.diag_fisher_linear_(None, now[block.key].view(-1), rotated, rotated, scale=scale)
            else:
                both = block.bias is not None
                ops.ekfac_diag_linear_(now[block.key], x, grad, ua, ug, bias=both, scale=scale)

        n = self._engine.run(batch, sink, None)
        self._check_others()
        if n:
            self._corrected.step()
            self.corrected_count += n
        return n

    def _diagonal(self, block: _Block) -> Tensor:
        if not self.corrected_count:
            raise RuntimeError(f"{self._op}: the diagonal is not there yet; call correct, or fit")
        return self._corrected.sum(block.key) / self.corrected_count

    def corrected(self) -> dict[str, Tensor]:
        """Return ``{layer: S}``, ``[rows, cols]``: the diagonal in the eigenbasis; see `factors` for the names."""
        self._ready()
        return {b.key: self._diagonal(b).to(self._corrected.now[b.key].dtype) for b in self._served().values()}

    def _eigendecomposition(self, block: _Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values_a, ua, values_g, ug = super()._eigendecomposition(block)
        if block.key in self._basis:  # the one that the diagonal belongs to
            ua, ug = (u.to(torch.float64) for u in self._basis[block.key])
        return values_a, ua, values_g, ug

    def _spectrum(self, block: _Block) -> Tensor:
        return self._diagonal(block)

    def _times(self, block: _Block, matrix: Tensor) -> Tensor:
        _, ua, _, ug = (t.to(matrix.dtype) for t in self._eigendecomposition(block))
        return ug @ ((ug.T @ matrix @ ua) * self._diagonal(block).to(matrix.dtype)) @ ua.T

    def all_reduce(self, process_group: Any = None) -> Any:
        """Sum the factors (before `correct`) over processes, or, after it, the diagonal.

        Call it after `accumulate`, so that all processes have one basis, and again after `correct`.
        """
        if not self._basis:
            return super().all_reduce(process_group)
        counts = Sums({"count": torch.zeros((), dtype=torch.float64)})
        counts.now["count"].fill_(float(self.corrected_count))
        reduced, count, self._reduced = self._reduced, self.count, False
        try:
            self._all_reduce([self._corrected, counts], process_group)
        finally:
            self._reduced, self.count = reduced, count
        self.corrected_count = round(float(counts.sum("count")))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return all that continues either pass exactly."""
        return {
            **super().state_dict(), "corrected": self._corrected.state_dict(), "corrected_count": self.corrected_count,
            "basis": {key: (a.clone(), g.clone()) for key, (a, g) in self._basis.items()},
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where another object was."""
        super().load_state_dict(state_dict)
        self._basis = {key: (a.clone(), g.clone()) for key, (a, g) in state_dict["basis"].items()}
        self._corrected = Sums(state_dict["corrected"]["now"])
        self._corrected.load_state_dict(state_dict["corrected"])
        self.corrected_count = int(state_dict["corrected_count"])


def _check_damping(op: str, damping: float) -> None:
    if not (isinstance(damping, (int, float)) and damping >= 0 and math.isfinite(damping)):
        raise ValueError(f"{op}: damping is {damping!r}; expected a finite number >= 0")
