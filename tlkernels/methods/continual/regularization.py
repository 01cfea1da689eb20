r"""Regularisers that hold a model near what earlier tasks taught it.

==============  ==============================================================  ============================
`EWC`           diagonal Fisher information, one term a task or a running one   Kirkpatrick 2017, Schwarz 2018
`KFACEWC`       Kronecker-factored Fisher information                           Ritter 2018
`MAS`           sensitivity of the outputs, without labels                      Aljundi 2018
`SI`            what a weight's path contributed to the loss                    Zenke 2017
`RWalk`         both a path in the Fisher metric and the Fisher information     Chaudhry 2018
`L2Anchor`      all weights alike                                               (baseline)
`LwF`           outputs of the old model on the new data                        Li and Hoiem 2017
==============  ==============================================================  ============================

All but `LwF` are quadratic,

.. math:: \frac{\lambda}{2} \sum_i \Omega_i (\theta_i - \theta_i^*)^2 ,

with the factor one half whatever the paper or another library has: their :math:`\lambda` is half of ours where they
leave it out. ``penalty()`` is that term for the loss; ``after_backward()`` adds its gradient to ``.grad`` in one sweep
instead. Either, not both, needs to be in the loop: what went through the backward pass is not added again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from tlkernels import ops
from tlkernels.methods.continual._base import (
    ContinualMethod,
    check_loader,
    check_number,
    trainable_parameters,
    zero,
)
from tlkernels.nn.fisher import KFAC, FisherDiagonal
from tlkernels.nn.fisher._batches import Samples, count_samples, default_forward
from tlkernels.nn.quantize import _matches

__all__ = ["EWC", "KFACEWC", "MAS", "SI", "L2Anchor", "LwF", "RWalk"]

Named = dict[str, Tensor]
Forward = Callable[[nn.Module, Any], tuple[Any, Any]]


def _importance_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _grown(op: str, name: str, old: Tensor, shape: torch.Size) -> Tensor:
    """`old`, with zeros where a parameter of `shape` has got new rows or columns."""
    if old.shape == shape:
        return old
    _check_grown(op, name, old.shape, shape)
    new = old.new_zeros(shape)
    new[tuple(slice(n) for n in old.shape)] = old
    return new


def _check_grown(op: str, name: str, old: torch.Size, new: torch.Size) -> None:
    if len(old) != len(new) or any(a > b for a, b in zip(old, new, strict=True)):
        raise ValueError(f"{op}: parameter {name!r} has shape {tuple(new)}; expected {tuple(old)} as it was, or larger")


class _Anchored(ContinualMethod):
    """Quadratic penalties: a list of terms (anchors, importances), by parameter name."""

    def __init__(self, model: nn.Module, lambda_: float, exclude: Sequence[str]) -> None:
        super().__init__(model)
        self.lambda_ = check_number(self._op, "lambda_", lambda_)
        if isinstance(exclude, str) or not all(isinstance(p, str) for p in exclude):
            raise TypeError(f"{self._op}: exclude is {exclude!r}; expected a sequence of patterns, such as ['head']")
        self.exclude = tuple(exclude)
        self._terms: list[tuple[Named, Named]] = []
        self._in_grad: Tensor | None = None  # by how much the backward pass multiplied the penalty, since the last step
        self._named()

    def _named(self) -> dict[str, nn.Parameter]:
        """The parameters that are served: those that require grad, without the excluded ones."""
        named = trainable_parameters(self._op, self.model)
        named = {name: p for name, p in named.items() if not _matches(name, self.exclude)}
        if not named:
            raise ValueError(f"{self._op}: exclude has {list(self.exclude)}, which leaves no parameter")
        return named

    @property
    def importance(self) -> Named:
        """The importances by parameter name, summed over the terms of the penalty; new tensors."""
        total: Named = {}
        for _, importances in self._terms:
            for name, f in importances.items():
                old = total.get(name)
                if old is None:
                    total[name] = f.clone()
                elif old.numel() > f.numel():
                    total[name] = old + _grown(self._op, name, f, old.shape)
                else:
                    total[name] = _grown(self._op, name, old, f.shape) + f
        return total

    def _lists(self) -> Iterator[tuple[list[nn.Parameter], list[Tensor], list[Tensor], list[tuple[slice, ...]]]]:
        """Per term: parameters, anchors, importances, and which part of a parameter the anchor is of."""
        every = dict(self.model.named_parameters(remove_duplicate=False))
        for anchors, importances in self._terms:
            params: list[nn.Parameter] = []
            cuts: list[tuple[slice, ...]] = []
            names: list[str] = []
            for name, anchor in anchors.items():
                if name not in every:
                    raise RuntimeError(f"{self._op}: model has no parameter {name!r} any more; expected its old names")
                p = every[name]
                _check_grown(self._op, name, anchor.shape, p.shape)
                if p.requires_grad:  # what is frozen stays where it is
                    params.append(p)
                    names.append(name)
                    cuts.append(tuple(slice(n) for n in anchor.shape) if anchor.shape != p.shape else ())
            if params:
                yield params, [anchors[n] for n in names], [importances[n] for n in names], cuts

    def penalty(self, inputs: Any = None, outputs: Tensor | None = None) -> Tensor:
        r"""Return :math:`\lambda/2 \sum \Omega (\theta - \theta^*)^2`; the arguments are not used.

        Returns
        -------
        Tensor []
            float32, or float64 for parameters of that; differentiable. 0 before the first `after_task`.

        Raises
        ------
        RuntimeError, ValueError
            If a parameter that has an anchor is gone, or has become smaller.
        """
        total = zero(self.model)
        for params, anchors, importances, cuts in self._lists():
            parts = [p[cut] if cut else p for p, cut in zip(params, cuts, strict=True)]
            total = total + ops.quad_penalty(parts, anchors, importances)
        total = self.lambda_ * total
        if total.requires_grad:
            total.register_hook(self._passed)
        return total

    def _passed(self, weight: Tensor) -> None:
        self._in_grad = weight.detach() if self._in_grad is None else self._in_grad + weight.detach()

    def after_backward(self) -> None:
        """Add the gradient of the penalty to ``.grad``, unless a backward pass through `penalty` did.

        ``.grad`` of a parameter that has none starts at 0: the penalty also pulls what a task does not use.
        """
        if self._in_grad is None:
            self._pull(self.lambda_)
        self._in_grad = None

    @torch.no_grad()
    def _pull(self, scale: float) -> None:
        terms = list(self._lists())  # all of it is checked before the first gradient changes
        for params, anchors, importances, cuts in terms:
            grads = []
            for p, cut in zip(params, cuts, strict=True):
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                grads.append(p.grad[cut] if cut else p.grad)
            parts = [p[cut] if cut else p for p, cut in zip(params, cuts, strict=True)]
            ops.quad_penalty_grad_(grads, parts, anchors, importances, scale=scale)

    def _anchors(self, importances: Mapping[str, Tensor]) -> Named:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: named[name].detach().clone() for name in importances}

    def _accumulate(self, new: Named, *, decay: float = 1.0) -> None:
        """The one running term: old importances times `decay`, plus `new`; anchored where the parameters are now."""
        total = dict(new)
        for _, old in self._terms:
            for name, f in old.items():
                if name in total:
                    total[name] = decay * _grown(self._op, name, f, total[name].shape) + total[name]
                else:  # frozen by now, or not served this time
                    total[name] = decay * f
        every = dict(self.model.named_parameters(remove_duplicate=False))
        gone = [name for name in total if name not in every]
        if gone:
            raise RuntimeError(f"{self._op}: model has no parameter {gone[0]!r} any more; expected its old names")
        total = {name: _grown(self._op, name, f, every[name].shape) for name, f in total.items()}
        self._terms = [(self._anchors(total), total)]

    def _state(self) -> dict[str, Any]:
        return {"terms": [{"anchors": a, "importances": f} for a, f in self._terms]}

    def _check_named(self, key: str, tensors: Any, *, exact: bool = False) -> Named:
        """Tensors of a state by parameter name, on the parameters' devices."""
        every = dict(self.model.named_parameters(remove_duplicate=False))
        found: Named = {}
        for name, t in tensors.items():
            if name not in every:
                raise ValueError(f"{self._op}: state_dict has {key} of {name!r}, which the model has not")
            if exact and t.shape != every[name].shape:
                raise ValueError(
                    f"{self._op}: state_dict has {key} of {name!r} of shape {tuple(t.shape)}; "
                    f"expected {tuple(every[name].shape)}"
                )
            _check_grown(self._op, name, t.shape, every[name].shape)
            found[name] = t.to(every[name].device)
        return found

    def _load(self, state: dict[str, Any]) -> None:
        self._terms = self._loaded_terms(state)
        self._in_grad = None

    def _loaded_terms(self, state: dict[str, Any]) -> list[tuple[Named, Named]]:
        return [
            (self._check_named("anchors", term["anchors"]), self._check_named("importances", term["importances"]))
            for term in state["terms"]
        ]

    def _check_importances(self, found: Any) -> Named:
        """Importances that the user gives: by name, shaped like the parameters, finite and not negative."""
        if not isinstance(found, Mapping):
            raise TypeError(
                f"{self._op}: importances is a {type(found).__name__}; expected a mapping by parameter name"
            )
        every = dict(self.model.named_parameters(remove_duplicate=False))
        checked: Named = {}
        for name, f in found.items():
            if name not in every:
                raise ValueError(f"{self._op}: importances has {name!r}; expected names of parameters")
            p = every[name]
            if not isinstance(f, Tensor) or f.shape != p.shape:
                got = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
                raise ValueError(f"{self._op}: importances[{name!r}] is {got}; expected a tensor {tuple(p.shape)}")
            if not bool((f >= 0).all()) or not bool(f.isfinite().all()):
                raise ValueError(f"{self._op}: importances[{name!r}] has a negative number, NaN or infinity")
            if not _matches(name, self.exclude):
                checked[name] = f.detach().to(p.device, _importance_dtype(p), copy=True)
        return checked


class L2Anchor(_Anchored):
    r"""Pull all weights alike to where the last task left them.

    Parameters
    ----------
    model : torch.nn.Module
    lambda_ : float
        :math:`\lambda \ge 0`. Default 1.
    exclude : sequence of str
        Patterns of parameters that are left alone, such as ``["head"]``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    .. math:: \frac{\lambda}{2} \lVert \theta - \theta^*_{t-1} \rVert^2

    The baseline of Kirkpatrick et al. for their EWC. Rows that a head gets later have no anchor.

    References
    ----------
    Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS 2017, arXiv:1612.00796.
    """

    def __init__(self, model: nn.Module, lambda_: float = 1.0, *, exclude: Sequence[str] = ()) -> None:
        super().__init__(model, lambda_, exclude)

    def after_task(self, loader: Iterable[Any] | None = None) -> None:
        """Anchor the parameters where they are; `loader` is not used."""
        ones = {n: torch.ones_like(p, dtype=_importance_dtype(p)).detach() for n, p in self._named().items()}
        self._terms = [(self._anchors(ones), ones)]
        super().after_task()


class EWC(_Anchored):
    r"""Elastic weight consolidation, with the exact diagonal of the Fisher information.

    Parameters
    ----------
    model : torch.nn.Module
    lambda_ : float
        :math:`\lambda \ge 0`. Default 1.
    mode : "separate" or "online"
        A term for each task, or one running term.
    decay : float
        :math:`\gamma` of ``"online"``, in [0, 1]. Default 1.
    loss : "cross_entropy", "mse" or callable
        As for `tlkernels.FisherDiagonal`: a sample's negative log-likelihood.
    kind : "empirical", "sampled" or "exact"
        Labels of the data, drawn ones, or the expectation over them. Default "empirical".
    forward : callable, optional
        ``forward(model, batch) -> (output, target)``; by default a batch is ``(x, y)``.
    exclude : sequence of str
        Patterns of parameters that are left alone, such as ``["head"]``.
    fisher_options : dict, optional
        Further arguments of `tlkernels.FisherDiagonal`, such as ``reduction`` or ``generator``.

    Attributes
    ----------
    importance : dict of str to Tensor
        By parameter name, summed over the terms.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    .. math::
        \frac{\lambda}{2} \sum_t \sum_i F_{t,i} (\theta_i - \theta^*_{t,i})^2
        \qquad\text{or}\qquad
        \frac{\lambda}{2} \sum_i \tilde F_i (\theta_i - \theta^*_i)^2, \quad
        \tilde F \leftarrow \gamma \tilde F + F_t

    :math:`F_t` is the *mean* over task t's samples of the squared per-sample gradient; multiply :math:`\lambda` by
    their number for the posterior's Hessian. Libraries that square the gradient of a batch's mean loss have a smaller
    one, by about the batch size, and some leave out the one half.

    References
    ----------
    Kirkpatrick et al., PNAS 2017, arXiv:1612.00796. Schwarz et al., Progress & compress, ICML 2018, arXiv:1805.06370
    (online). Huszár, PNAS 2018, arXiv:1712.03847.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 3)
    >>> ewc = EWC(model, lambda_=10.0)
    >>> ewc.after_task([(torch.randn(8, 2), torch.randint(3, (8,)))])
    >>> ewc.penalty().item()
    0.0
    """

    def __init__(
        self, model: nn.Module, lambda_: float = 1.0, *, mode: str = "separate", decay: float = 1.0,
        loss: str | Callable[[Any, Any], Tensor] = "cross_entropy", kind: str = "empirical",
        forward: Forward | None = None, exclude: Sequence[str] = (), fisher_options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if mode not in ("separate", "online"):
            raise ValueError(f"{self._op}: mode is {mode!r}; expected 'separate' or 'online'")
        check_number(self._op, "decay", decay, 0.0, 1.0)
        if mode == "separate" and decay != 1.0:
            raise ValueError(f"{self._op}: decay is {decay} with mode 'separate'; expected 1, or mode='online'")
        super().__init__(model, lambda_, exclude)
        self.mode, self.decay = mode, float(decay)
        self._options = {"progress": False, **(fisher_options or {}), "loss": loss, "kind": kind, "forward": forward}
        FisherDiagonal(model, parameters=list(self._named()), **self._options)  # complains now, not after a task

    def after_task(
        self, loader: Iterable[Any] | None = None, *, importances: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take the Fisher information at the parameters as they are, and anchor them.

        Parameters
        ----------
        loader : iterable of batches
            The task's data; not needed with `importances`.
        importances : mapping of str to Tensor, optional
            The diagonal, where it is known already, such as ``FisherDiagonal.diagonal()``; >= 0.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            If neither is there, or one is not as stated; nothing has changed then.
        """
        if importances is not None:
            fisher = self._check_importances(importances)
        else:
            data = check_loader(self._op, loader)
            named = self._named()
            estimate = FisherDiagonal(self.model, parameters=list(named), **self._options)
            with estimate:
                estimate.accumulate(data)
            fisher = self._check_importances(estimate.diagonal())
        if self.mode == "online":
            self._accumulate(fisher, decay=self.decay)
        else:
            self._terms.append((self._anchors(fisher), fisher))
        super().after_task()


class KFACEWC(ContinualMethod):
    r"""EWC with Kronecker factors: weights of a layer may move together where that does not change the outputs.

    Parameters
    ----------
    model : torch.nn.Module
    lambda_ : float
        :math:`\lambda \ge 0`. Default 1.
    loss, kind, forward
        As for `EWC`.
    approx : "expand" or "reduce"
        What the tokens of a sample are; see `tlkernels.KFAC`.
    parameters : iterable of str, optional
        Names of the parameters to serve, of those in linear layers and convolutions. All by default; parameters of
        other layers are left alone.
    kfac_options : dict, optional
        Further arguments of `tlkernels.KFAC`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated; if the model has no layer that K-FAC knows.

    Notes
    -----
    .. math::
        \frac{\lambda}{2} \sum_t \sum_l \langle \Delta_{t,l}, \; G_{t,l} \, \Delta_{t,l} \, A_{t,l} \rangle ,
        \qquad \Delta_{t,l} = [W_l, b_l] - [W^*_{t,l}, b^*_{t,l}]

    A term for each task, since sums of Kronecker products are none. `after_backward` adds
    :math:`\lambda \sum_t G \Delta A`.

    References
    ----------
    Ritter, Botev and Barber, Online structured Laplace approximations for overcoming catastrophic forgetting,
    NeurIPS 2018, arXiv:1805.07810.
    """

    def __init__(
        self, model: nn.Module, lambda_: float = 1.0, *, loss: str | Callable[[Any, Any], Tensor] = "cross_entropy",
        kind: str = "empirical", forward: Forward | None = None, approx: str = "expand",
        parameters: Iterable[str] | None = None, kfac_options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.lambda_ = check_number(self._op, "lambda_", lambda_)
        self._parameters = None if parameters is None else list(parameters)
        self._options = {
            "progress": False, **(kfac_options or {}), "loss": loss, "kind": kind, "forward": forward, "approx": approx,
        }  # fmt: skip
        # a task: {layer: {"A": ..., "G": ..., "weight": anchor, "bias": anchor}}, the names of parameters for keys
        self._terms: list[dict[str, dict[str, Tensor]]] = []
        self._in_grad = False
        self._estimate()

    def _estimate(self) -> KFAC:
        return KFAC(self.model, parameters=self._parameters, **self._options)

    def after_task(self, loader: Iterable[Any] | None = None) -> None:
        """Take the factors at the parameters as they are, and anchor these; `loader` gives the task's data."""
        data = check_loader(self._op, loader)
        with self._estimate() as estimate:
            estimate.accumulate(data)
        every = dict(self.model.named_parameters(remove_duplicate=False))
        term: dict[str, dict[str, Tensor]] = {}
        for key, (a, g) in estimate.factors().items():
            if not (bool(a.isfinite().all()) and bool(g.isfinite().all())):
                raise ValueError(f"{self._op}: the factors of {key} are not finite; expected finite gradients")
            names = [key] if key in every else [f"{key}.weight", f"{key}.bias"]
            if key in every and every[key].numel() < a.shape[0] * g.shape[0]:
                names.append("bias")  # a model that is a layer itself: its block goes by the weight's name
            term[key] = {"A": a, "G": g, **{n: every[n].detach().clone() for n in names}}
        self._terms.append(term)
        super().after_task()

    def _blocks(self) -> Iterator[tuple[dict[str, nn.Parameter], dict[str, Tensor], Tensor, Tensor, Tensor]]:
        """Per layer of each task: parameters, anchors, A, G, and Delta ``[rows, columns]``."""
        every = dict(self.model.named_parameters(remove_duplicate=False))
        for term in self._terms:
            for block in term.values():
                anchors = {name: t for name, t in block.items() if name not in ("A", "G")}
                params: dict[str, nn.Parameter] = {}
                for name, anchor in anchors.items():
                    if name not in every:
                        raise RuntimeError(f"{self._op}: model has no parameter {name!r} any more")
                    _check_grown(self._op, name, anchor.shape, every[name].shape)
                    params[name] = every[name]
                rows = block["G"].shape[0]
                delta = [
                    (params[n][tuple(slice(s) for s in t.shape)] - t).to(block["A"].dtype).reshape(rows, -1)
                    for n, t in anchors.items()
                ]
                yield params, anchors, block["A"], block["G"], torch.cat(delta, 1)

    def penalty(self, inputs: Any = None, outputs: Tensor | None = None) -> Tensor:
        """Return the penalty, a differentiable scalar; the arguments are not used."""
        total = zero(self.model)
        for _, _, a, g, delta in self._blocks():
            total = total + 0.5 * self.lambda_ * (delta * (g @ delta @ a)).sum()
        if total.requires_grad:
            total.register_hook(self._passed)
        return total

    def _passed(self, weight: Tensor) -> None:
        self._in_grad = True

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add the gradient of the penalty to ``.grad``, unless a backward pass through `penalty` did."""
        if not self._in_grad:
            for params, anchors, a, g, delta in list(self._blocks()):
                force, column = self.lambda_ * (g @ delta @ a), 0
                for name, p in params.items():
                    shape, width = anchors[name].shape, anchors[name].numel() // force.shape[0]
                    if p.requires_grad:
                        if p.grad is None:
                            p.grad = torch.zeros_like(p)
                        part = force[:, column : column + width].reshape(shape)
                        p.grad[tuple(slice(s) for s in shape)] += part.to(p.dtype)
                    column += width
        self._in_grad = False

    def _state(self) -> dict[str, Any]:
        return {"terms": self._terms}

    def _load(self, state: dict[str, Any]) -> None:
        every = dict(self.model.named_parameters(remove_duplicate=False))
        for term in state["terms"]:
            for block in term.values():
                for name, t in block.items():
                    if name in ("A", "G"):
                        continue
                    if name not in every:
                        raise ValueError(f"{self._op}: state_dict has {name!r}, which the model has not")
                    _check_grown(self._op, name, t.shape, every[name].shape)
        device = next(iter(every.values())).device
        self._terms = [
            {key: {n: t.to(device) for n, t in block.items()} for key, block in term.items()} for term in state["terms"]
        ]
        self._in_grad = False


class MAS(_Anchored):
    r"""Memory aware synapses: importance is how strongly the outputs depend on a weight. Needs no labels.

    Parameters
    ----------
    model : torch.nn.Module
    lambda_ : float
        :math:`\lambda \ge 0`. Default 1.
    mode : "exact" or "batch"
        The absolute value of each sample's gradient, as the paper has it, or of a batch's mean gradient, which is
        smaller where samples disagree, and takes one backward pass a batch (Avalanche and the authors' code).
    decay : float
        Of the importances of earlier tasks, in [0, 1]. Default 1: they add up.
    forward : callable, optional
        ``forward(model, batch) -> (output, target)``, the target not used; by default a batch is ``(x, y)`` or ``x``.
    exclude : sequence of str
        Patterns of parameters that are left alone, such as ``["head"]``.
    chunk_size : int
        Samples whose gradients ``"exact"`` holds at a time; it takes `torch.func.vmap`. With 1 it is a loop over the
        samples instead, for models that vmap does not take. Default 32.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    .. math::
        \Omega_i = \frac1N \sum_n \Big| \frac{\partial\, \tfrac12 \lVert f(x_n) \rVert_2^2}{\partial \theta_i} \Big|

    taken in eval mode over all of an output's elements. Avalanche's has no one half, so twice the importance.

    References
    ----------
    Aljundi et al., Memory aware synapses, ECCV 2018, arXiv:1711.09601.
    """

    def __init__(
        self, model: nn.Module, lambda_: float = 1.0, *, mode: str = "exact", decay: float = 1.0,
        forward: Forward | None = None, exclude: Sequence[str] = (), chunk_size: int = 32,
    ) -> None:  # fmt: skip
        if mode not in ("exact", "batch"):
            raise ValueError(f"{self._op}: mode is {mode!r}; expected 'exact' or 'batch'")
        check_number(self._op, "decay", decay, 0.0, 1.0)
        check_number(self._op, "chunk_size", chunk_size, 1)
        super().__init__(model, lambda_, exclude)
        self.mode, self.decay, self.chunk_size = mode, float(decay), int(chunk_size)
        self._forward = forward or default_forward

    def after_task(
        self, loader: Iterable[Any] | None = None, *, importances: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take the importances at the parameters as they are, and anchor these.

        Parameters
        ----------
        loader : iterable of batches
            Any data of the task, also without labels; not needed with `importances`.
        importances : mapping of str to Tensor, optional
            Known ones, >= 0.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            If neither is there, or one is not as stated; nothing has changed then.
        """
        if importances is None:
            importances = self._sensitivities(check_loader(self._op, loader))
        self._accumulate(self._check_importances(importances), decay=self.decay)
        super().after_task()

    def _sensitivities(self, loader: Iterable[Any]) -> Named:
        named = self._named()
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
        count, modes = 0, [(m, m.training) for m in self.model.modules()]
        self.model.eval()
        try:
            for batch in loader:
                n = count_samples(self._op, batch)
                if not n:
                    continue
                whole = Samples(batch, n)
                size = n if self.mode == "batch" else self.chunk_size
                for start in range(0, n, size):
                    part = list(range(start, min(start + size, n)))
                    for name, g in self._gradients(named, whole.part(part), len(part)).items():
                        total[name] += g
                count += n
        finally:
            for module, training in modes:
                module.training = training
        if not count:
            raise ValueError(f"{self._op}: loader gives no samples; expected one at least")
        return {name: (t / count).to(_importance_dtype(named[name])) for name, t in total.items()}

    def _gradients(self, named: dict[str, nn.Parameter], samples: Samples, n: int) -> Named:
        """The sum of absolute gradients of a chunk's samples, or n times that of their mean."""
        if self.mode == "exact" and n > 1:
            model = _Bound(self.model, self._forward)
            bound = {f"model.{name}": p.detach() for name, p in named.items()}

            def length(params: Named, rows: list[Tensor]) -> Tensor:
                out = functional_call(model, params, (samples.of(t.unsqueeze(0) for t in rows),))
                return self._half_square(out)

            found = vmap(grad(length), in_dims=(None, 0))(bound, samples.tensors)
            return {name.removeprefix("model."): g.abs().sum(0) for name, g in found.items()}
        with torch.enable_grad():
            value = self._half_square(self._forward(self.model, samples.batch)[0])
            grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        # the mean's gradient, times the samples it stands for, is the sum's
        acc = {n_: torch.zeros_like(p, dtype=_importance_dtype(p)) for n_, p in named.items()}
        used = [(a, g) for a, g in zip(acc.values(), grads, strict=True) if g is not None]
        ops.importance_accum_([a for a, _ in used], [g for _, g in used], mode="abs")
        return acc

    def _half_square(self, out: Any) -> Tensor:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            raise TypeError(f"{self._op}: forward gives a {type(out).__name__}; expected a floating-point tensor first")
        return 0.5 * out.to(_importance_dtype(out)).square().sum()


class _Bound(nn.Module):
    """The model and how it is called, as a module that torch.func can call with other parameters."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self._forward = model, forward

    def forward(self, batch: Any) -> Any:
        return self._forward(self.model, batch)[0]


class _Path(_Anchored):
    """What SI and RWalk share: the gradient of the task's own loss at each step, and the step."""

    def __init__(self, model: nn.Module, lambda_: float, exclude: Sequence[str]) -> None:
        super().__init__(model, lambda_, exclude)
        self._omega: Named = {}  # what the task's steps took off its loss
        self._before: Named = {}  # the parameters before the step to come
        self._grads: Named = {}  # the task's gradient, until the step is made
        self._open = False

    def before_task(self, loader: Iterable[Any] | None = None) -> None:
        """Start the path at the parameters as they are; `loader` is not used.

        A model gets new heads before this is called, and keeps its parameters until `after_task`.
        """
        named = self._named()
        for _, importances in self._terms:
            for name, p in named.items():
                if name in importances:
                    _check_grown(self._op, name, importances[name].shape, p.shape)
        self._omega = {name: torch.zeros_like(p, dtype=_importance_dtype(p)) for name, p in named.items()}
        self._before = {name: p.detach().clone() for name, p in named.items()}
        self._grads, self._open = {}, True

    def _params(self) -> dict[str, nn.Parameter]:
        """The parameters of the path."""
        if not self._open:
            raise RuntimeError(f"{self._op}: no task is open; call before_task first")
        every = dict(self.model.named_parameters(remove_duplicate=False))
        for name, t in self._before.items():
            if name not in every or every[name].shape != t.shape:
                raise RuntimeError(f"{self._op}: parameter {name!r} changed its shape within a task, or is gone")
        return {name: every[name] for name in self._before}

    @torch.no_grad()
    def after_backward(self) -> None:
        """Note the gradient of the task's own loss, then add that of the penalty, unless it went through `penalty`.

        Call it before gradients are clipped, after a scaler has unscaled them. With a scaler leave `penalty` out of
        the loss: the scaled penalty's gradient could not be told from the task's.

        Raises
        ------
        RuntimeError
            If no task is open, or a parameter changed its shape within it.
        """
        params = self._params()
        self._grads = {name: p.grad.detach().clone() for name, p in params.items() if p.grad is not None}
        if self._in_grad is not None:  # take the penalty's part out again
            weight = self.lambda_ * float(self._in_grad)
            for parts, anchors, importances, cuts in self._lists():
                names = {id(p): name for name, p in params.items()}
                for p, a, f, cut in zip(parts, anchors, importances, cuts, strict=True):
                    g = self._grads.get(names.get(id(p), ""))
                    if g is not None:
                        delta = (p[cut] if cut else p).to(f.dtype) - a.to(f.dtype)
                        (g[cut] if cut else g).sub_((weight * f * delta).to(g.dtype))
        self._noted(params)
        super().after_backward()

    def _noted(self, params: dict[str, nn.Parameter]) -> None:
        """What a subclass does with the task's gradient before the step."""

    @torch.no_grad()
    def after_step(self) -> None:
        """Add the step to the path.

        Raises
        ------
        RuntimeError
            If no task is open.
        """
        params = self._params()
        names = list(self._grads)
        deltas = [params[name].detach() - self._before[name] for name in names]
        ops.si_accum_([self._omega[name] for name in names], [self._grads[name] for name in names], deltas, scale=-1.0)
        for name, p in params.items():
            self._before[name].copy_(p.detach())
        self._grads = {}

    def _state(self) -> dict[str, Any]:
        return {
            **super()._state(), "open": self._open, "omega": self._omega, "before": self._before, "grads": self._grads,
        }  # fmt: skip

    def _load(self, state: dict[str, Any]) -> None:
        self._check_path(state)
        super()._load(state)
        self._open = bool(state["open"])
        self._omega, self._before, self._grads = (
            self._check_named(key, state[key], exact=True) for key in ("omega", "before", "grads")
        )

    def _check_path(self, state: dict[str, Any]) -> None:
        self._loaded_terms(state)
        for key in ("omega", "before", "grads"):
            self._check_named(key, state[key], exact=True)


class SI(_Path):
    r"""Synaptic intelligence: importance is what a weight's path took off the loss, by the square of its length.

    Parameters
    ----------
    model : torch.nn.Module
    lambda_ : float
        :math:`\lambda \ge 0`, twice the paper's c. Default 1.
    xi : float
        Added to the squared change, > 0. Default 0.1 as in the paper's code; smaller values make weights that hardly
        moved important.
    exclude : sequence of str
        Patterns of parameters that are left alone, such as ``["head"]``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    .. math::
        \omega_i = -\sum_s g_i(s) \, \big(\theta_i(s+1) - \theta_i(s)\big), \qquad
        \Omega_i \leftarrow \Omega_i + \max\Big(0, \frac{\omega_i}{(\theta_i^{end} - \theta_i^{start})^2 + \xi}\Big)

    with g the gradient of the task's loss *without* the penalty. Each step needs `after_backward` and `after_step`.

    References
    ----------
    Zenke, Poole and Ganguli, Continual learning through synaptic intelligence, ICML 2017, arXiv:1703.04200.
    """

    def __init__(self, model: nn.Module, lambda_: float = 1.0, *, xi: float = 0.1, exclude: Sequence[str] = ()) -> None:
        check_number(self._op, "xi", xi)
        if not xi > 0:
            raise ValueError(f"{self._op}: xi is {xi}; expected > 0")
        super().__init__(model, lambda_, exclude)
        self.xi = float(xi)
        self._start: Named = {}

    def before_task(self, loader: Iterable[Any] | None = None) -> None:  # noqa: D102
        super().before_task(loader)
        self._start = {name: t.clone() for name, t in self._before.items()}

    def after_task(self, loader: Iterable[Any] | None = None) -> None:
        """Turn the path into importances, and anchor the parameters; `loader` is not used.

        Raises
        ------
        RuntimeError
            If no task is open.
        ValueError
            If the path has a NaN or an infinity, as from infinite gradients; nothing has changed then.
        """
        params = self._params()
        new: Named = {}
        for name, omega in self._omega.items():
            change = params[name].detach().to(omega.dtype) - self._start[name].to(omega.dtype)
            new[name] = (omega / (change.square() + self.xi)).clamp(min=0.0)
        self._accumulate(self._check_importances(new))
        self._omega, self._before, self._grads, self._start, self._open = {}, {}, {}, {}, False
        super().after_task()

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "start": self._start}

    def _load(self, state: dict[str, Any]) -> None:
        start = self._check_named("start", state["start"], exact=True)
        super()._load(state)
        self._start = start


class RWalk(_Path):
    r"""Riemannian walk: a running Fisher information, and the path's gain by its length in the Fisher metric.

    Parameters
    ----------
    model : torch.nn.Module
    lambda_ : float
        :math:`\lambda \ge 0`, twice the paper's. Default 1.
    alpha : float
        Weight of the newest gradient in the running Fisher information, in (0, 1]. Default 0.9.
    interval : int
        Steps between two scores, :math:`\Delta t \ge 1`. Default 10.
    eps : float
        Added to the length, > 0. Default 1e-8.
    exclude : sequence of str
        Patterns of parameters that are left alone, such as ``["head"]``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    At every step :math:`F \leftarrow \alpha g^2 + (1 - \alpha) F`; every :math:`\Delta t` steps, and at the end,

    .. math::
        s_i \leftarrow s_i + \frac{\max(0, \Delta L_i)}{\tfrac12 F_i \Delta\theta_i^2 + \epsilon}, \qquad
        \Delta L_i = -\sum g_i \, \delta\theta_i .

    After a task the scores are averaged with those of before, :math:`s \leftarrow (s_{old} + s)/2`, and the importance
    is :math:`\hat F + \hat s`, both divided by their largest element over the model. g is a batch's gradient, as in
    the paper: its square is about the Fisher information by the batch size, a factor that the division takes away.

    References
    ----------
    Chaudhry et al., Riemannian walk for incremental learning, ECCV 2018, arXiv:1801.10112.
    """

    def __init__(
        self, model: nn.Module, lambda_: float = 1.0, *, alpha: float = 0.9, interval: int = 10, eps: float = 1e-8,
        exclude: Sequence[str] = (),
    ) -> None:  # fmt: skip
        check_number(self._op, "alpha", alpha, 0.0, 1.0)
        check_number(self._op, "eps", eps)
        for name, value in (("alpha", alpha), ("eps", eps)):
            if not value > 0:
                raise ValueError(f"{self._op}: {name} is {value}; expected > 0")
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"{self._op}: interval is {interval!r}; expected a whole number >= 1")
        super().__init__(model, lambda_, exclude)
        self.alpha, self.interval, self.eps = float(alpha), interval, float(eps)
        self._fisher: Named = {}
        self._scores: Named = {}  # of this task
        self._old_scores: Named = {}
        self._since: Named = {}  # the parameters at the last score
        self._steps = 0

    def before_task(self, loader: Iterable[Any] | None = None) -> None:  # noqa: D102
        super().before_task(loader)
        self._scores = {name: torch.zeros_like(t) for name, t in self._omega.items()}
        self._since = {name: t.clone() for name, t in self._before.items()}
        self._fisher = {
            name: _grown(self._op, name, self._fisher[name], t.shape) if name in self._fisher else torch.zeros_like(t)
            for name, t in self._omega.items()
        }
        self._steps = 0

    def _noted(self, params: dict[str, nn.Parameter]) -> None:
        names = list(self._grads)
        ops.importance_accum_(
            [self._fisher[name] for name in names], [self._grads[name] for name in names],
            mode="sq", decay=1.0 - self.alpha, scale=self.alpha,
        )  # fmt: skip

    def after_step(self) -> None:
        """Add the step to the path, and at the end of an interval the path to the scores."""
        super().after_step()
        self._steps += 1
        if self._steps % self.interval == 0:
            self._score()

    @torch.no_grad()
    def _score(self) -> None:
        for name, gain in self._omega.items():
            moved = self._before[name].to(gain.dtype) - self._since[name].to(gain.dtype)
            self._scores[name] += gain.clamp(min=0.0) / (0.5 * self._fisher[name] * moved.square() + self.eps)
            gain.zero_()
            self._since[name].copy_(self._before[name])

    def after_task(self, loader: Iterable[Any] | None = None) -> None:
        """Turn Fisher information and scores into importances, and anchor the parameters; `loader` is not used.

        Raises
        ------
        RuntimeError
            If no task is open.
        ValueError
            If they have a NaN or an infinity.
        """
        self._params()
        if self._steps % self.interval:
            self._score()
        scores = {}
        for name, s in self._scores.items():
            old = self._old_scores.get(name)
            scores[name] = s if old is None else 0.5 * (_grown(self._op, name, old, s.shape) + s)
        parts = [self._normalized(self._fisher), self._normalized(scores)]
        new = self._check_importances({name: parts[0][name] + parts[1][name] for name in scores})
        self._accumulate(new, decay=0.0)
        self._old_scores = scores
        self._omega, self._before, self._grads, self._open = {}, {}, {}, False
        self._scores, self._since, self._steps = {}, {}, 0
        super().after_task()

    @staticmethod
    def _normalized(tensors: Named) -> Named:
        """Divided by the largest element of all; zeros stay."""
        top = torch.stack([t.max().double() for t in tensors.values() if t.numel()]).max()
        return {name: t / top.to(t) if bool(top != 0) else t.clone() for name, t in tensors.items()}

    def _state(self) -> dict[str, Any]:
        return {
            **super()._state(), "fisher": self._fisher, "scores": self._scores, "old_scores": self._old_scores,
            "since": self._since, "steps": self._steps,
        }  # fmt: skip

    def _load(self, state: dict[str, Any]) -> None:
        found = [self._check_named(key, state[key], exact=True) for key in ("scores", "since")]
        running = [self._check_named(key, state[key]) for key in ("fisher", "old_scores")]
        super()._load(state)
        (self._scores, self._since), (self._fisher, self._old_scores) = found, running
        self._steps = int(state["steps"])


class LwF(ContinualMethod):
    r"""Learning without forgetting: on the new task's inputs, the old outputs stay as they were.

    Parameters
    ----------
    model : torch.nn.Module
        ``model(inputs)`` gives logits ``[N, classes]``, or ``[N, ..., classes]``.
    alpha : float
        :math:`\alpha \ge 0`. Default 1.
    temperature : float
        T > 0. Default 2.
    forward : callable, optional
        ``forward(model, inputs) -> logits``, for models that are called in another way. By default ``model(inputs)``.

    Attributes
    ----------
    teacher : torch.nn.Module or None
        The model as the last task left it: frozen, in eval mode.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    .. math::
        \alpha \, T^2 \, \frac1N \sum_n \sum_{h} \mathrm{KL}\big(
        \mathrm{softmax}(z^{old}_{n,h} / T) \,\Vert\, \mathrm{softmax}(z_{n,h} / T) \big)

    over the groups h of classes that earlier tasks named in `after_task`; without any, all of the old model's outputs
    are one group. A head that got more outputs keeps the old ones first. Other dimensions than the last are samples.
    The gradient is that of the paper's distillation loss. Avalanche leaves out :math:`T^2`.

    References
    ----------
    Li and Hoiem, Learning without forgetting, TPAMI 2017, arXiv:1606.09282. Hinton, Vinyals and Dean, 2015,
    arXiv:1503.02531 (:math:`T^2`).
    """

    def __init__(
        self, model: nn.Module, alpha: float = 1.0, *, temperature: float = 2.0,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.alpha = check_number(self._op, "alpha", alpha)
        check_number(self._op, "temperature", temperature)
        if not temperature > 0:
            raise ValueError(f"{self._op}: temperature is {temperature}; expected > 0")
        self.temperature = float(temperature)
        self._forward = forward or (lambda model, inputs: model(inputs))
        self.teacher: nn.Module | None = None
        self._groups: list[list[int]] = []

    def after_task(self, loader: Iterable[Any] | None = None, *, classes: Sequence[int] | None = None) -> None:
        """Keep a copy of the model.

        Parameters
        ----------
        loader : iterable of batches, optional
            Not used.
        classes : sequence of int, optional
            The outputs that belong to this task, for a softmax of its own (task-incremental learning).

        Raises
        ------
        TypeError, ValueError
            If `classes` is empty, has an index twice or a negative one.
        """
        group = None
        if classes is not None:
            group = [int(c) for c in classes]
            if not group or len(set(group)) < len(group) or min(group) < 0:
                raise ValueError(f"{self._op}: classes is {list(classes)}; expected different indices >= 0")
        teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        for p in teacher.parameters():
            p.grad = None
        self.teacher = teacher
        if group is not None and group not in self._groups:
            self._groups.append(group)
        super().after_task()

    def penalty(self, inputs: Any = None, outputs: Tensor | None = None) -> Tensor:
        """Return the distillation term of a batch.

        Parameters
        ----------
        inputs : Tensor
            The batch's inputs.
        outputs : Tensor, optional
            The model's logits for them; computed if they are not given.

        Returns
        -------
        Tensor []
            0 before the first `after_task`.

        Raises
        ------
        ValueError
            If `inputs` is not given, or the model has fewer outputs than it had.
        """
        if self.teacher is None:
            return zero(self.model)
        if inputs is None:
            raise ValueError(f"{self._op}: inputs is None; expected the inputs of the batch")
        with torch.no_grad():
            old = self._forward(self.teacher, inputs)
        new = self._forward(self.model, inputs) if outputs is None else outputs
        width = old.shape[-1]
        if new.shape[:-1] != old.shape[:-1] or new.shape[-1] < width:
            raise ValueError(
                f"{self._op}: outputs has shape {tuple(new.shape)}; expected {tuple(old.shape)} as the old model "
                "gives, or more classes"
            )
        samples = max(old.numel() // max(width, 1), 1)
        total = zero(self.model)
        for group in self._groups or [list(range(width))]:
            if max(group) >= width:
                raise ValueError(f"{self._op}: classes has {max(group)}; expected indices < {width}, the old outputs")
            dtype = _importance_dtype(new)
            p = functional.log_softmax(old[..., group].to(dtype) / self.temperature, -1)
            q = functional.log_softmax(new[..., group].to(dtype) / self.temperature, -1)
            total = total + functional.kl_div(q, p, reduction="sum", log_target=True) / samples
        return self.alpha * self.temperature**2 * total

    def _state(self) -> dict[str, Any]:
        return {"teacher": None if self.teacher is None else self.teacher.state_dict(), "groups": self._groups}

    def load_state_dict(self, state_dict: Mapping[str, Any], *, teacher: nn.Module | None = None) -> None:
        """Take over the state of another object.

        Parameters
        ----------
        state_dict : mapping
        teacher : torch.nn.Module, optional
            A model of the old one's architecture to load the old parameters into. By default a copy of the model, so
            call this before its head grows.

        Raises
        ------
        TypeError, ValueError
            If it is no such state, or of a model of other shapes; nothing has changed then.
        """
        self._frame = copy.deepcopy(self.model if teacher is None else teacher)
        try:
            super().load_state_dict(state_dict)
        finally:
            del self._frame

    def _load(self, state: dict[str, Any]) -> None:
        if state["teacher"] is not None:
            try:
                self._frame.load_state_dict(state["teacher"])
            except RuntimeError as error:
                raise ValueError(f"{self._op}: state_dict has another model's teacher: {error}") from error
        self.teacher = None if state["teacher"] is None else self._frame.eval().requires_grad_(False)
        self._groups = [list(group) for group in state["groups"]]
