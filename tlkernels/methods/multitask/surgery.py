r"""Gradient surgery: one update of several tasks' gradients, from two reads of them.

`backward` stands where ``loss.backward()`` does: it differentiates each task once, takes the Gram matrix of the shared
parameters' gradients in one read (`tlkernels.ops.task_gram`), asks a method for weights, and adds the weighted sum to
``.grad`` in another. Heads get the plain gradient of their own tasks in the same passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tlkernels import ops

__all__ = [
    "IMTLG",
    "METHODS",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "Mean",
    "NashMTL",
    "PCGrad",
    "Step",
    "Sum",
    "Surgery",
    "UPGrad",
    "backward",
]


class Surgery:
    """The base of the methods: weights of the tasks' gradients from their Gram matrix.

    A method of one's own overrides `weights`; one that is no weighted sum overrides `combine`.
    """

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Weights ``[T]`` from the Gram matrix ``[T, T]``, float64, and the losses' values ``[T]``."""
        raise NotImplementedError(f"{type(self).__name__}: weights is not written")

    def combine(
        self, out: list[Tensor], grads: list[list[Tensor | None]], weights: Tensor | None, accumulate: bool
    ) -> None:
        """Write the combination of ``grads[task][parameter]`` to `out`, or add it."""
        assert weights is not None
        ops.task_combine_(out, grads, weights, accumulate=accumulate)

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers between steps; empty for most."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        if state:
            raise ValueError(f"{type(self).__name__}: state_dict holds {sorted(state)}; expected nothing")

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_") and k != "generator")
        return f"{type(self).__name__}({options})"


class _Random(Surgery):
    """A method that draws: its generator's state is kept."""

    generator: torch.Generator | None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "generator" in state:
            if self.generator is None:
                raise ValueError(f"{type(self).__name__}: state_dict holds a generator's state; expected generator=")
            self.generator.set_state(state["generator"])


class Sum(Surgery):
    """The sum of the gradients: what ``sum(losses).backward()`` does."""

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Ones."""
        return torch.ones(len(gram), dtype=torch.float64, device=gram.device)


class Mean(Surgery):
    """The mean of the gradients."""

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """1 / T each."""
        return torch.full((len(gram),), 1.0 / len(gram), dtype=torch.float64, device=gram.device)


class PCGrad(_Random):
    r"""Project each task's gradient off those it conflicts with, in random order, and add them up.

    Parameters
    ----------
    reduction : "sum" or "mean"
        The paper's is the sum.
    generator : torch.Generator, optional
        Where the orders come from.

    References
    ----------
    Yu et al., Gradient surgery for multi-task learning, NeurIPS 2020, arXiv:2001.06782.
    """

    def __init__(self, *, reduction: Literal["sum", "mean"] = "sum", generator: torch.Generator | None = None) -> None:
        _check_choice("PCGrad", "reduction", reduction, ("sum", "mean"))
        self.reduction, self.generator = reduction, generator

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `tlkernels.ops.pcgrad_weights`."""
        return ops.pcgrad_weights(gram, generator=self.generator, reduction=self.reduction)


class GradVac(_Random):
    r"""Raise the cosine of each pair of gradients to a running target.

    Parameters
    ----------
    beta : float
        Of the targets' running mean, 0 to 1.
    reduction : "sum" or "mean"
    generator : torch.Generator, optional
        Where the orders come from.

    References
    ----------
    Wang et al., Gradient vaccine, ICLR 2021, arXiv:2010.05874.
    """

    def __init__(
        self, *, beta: float = 0.5, reduction: Literal["sum", "mean"] = "sum", generator: torch.Generator | None = None
    ) -> None:
        if not 0 <= beta <= 1:
            raise ValueError(f"GradVac: beta is {beta}; expected 0 <= beta <= 1")
        _check_choice("GradVac", "reduction", reduction, ("sum", "mean"))
        self.beta, self.reduction, self.generator = beta, reduction, generator
        self._targets: Tensor | None = None

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `tlkernels.ops.gradvac_weights`; moves the targets."""
        if self._targets is not None and self._targets.shape != gram.shape:
            raise ValueError(f"GradVac: losses holds {len(gram)}; expected {len(self._targets)}, as in the last step")
        weights, self._targets = ops.gradvac_weights(
            gram, self._targets, beta=self.beta, generator=self.generator, reduction=self.reduction
        )
        return weights

    def state_dict(self) -> dict[str, Any]:
        """Targets, and the generator's state."""
        return {**super().state_dict(), "targets": self._targets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        super().load_state_dict(state)
        self._targets = state.get("targets")


class CAGrad(Surgery):
    r"""The direction near the mean that helps the worst task most: :math:`\max_d \min_t g_t \cdot d`,
    :math:`\|d - g_0\| \le c \|g_0\|`.

    Parameters
    ----------
    c : float
        Radius, at least 0; 0 is the mean.
    rescale : 0, 1 or 2
        Divide the result by nothing, 1 + c^2 or 1 + c.

    References
    ----------
    Liu et al., Conflict-averse gradient descent, NeurIPS 2021, arXiv:2110.14048.
    """  # noqa: D205

    def __init__(self, c: float = 0.4, *, rescale: Literal[0, 1, 2] = 0) -> None:
        if not (c >= 0 and math.isfinite(c)):
            raise ValueError(f"CAGrad: c is {c}; expected >= 0")
        if rescale not in (0, 1, 2):
            raise ValueError(f"CAGrad: rescale is {rescale!r}; expected 0, 1 or 2")
        self.c, self.rescale = c, rescale

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `tlkernels.ops.cagrad_weights`."""
        return ops.cagrad_weights(gram, self.c, rescale=self.rescale)


class MGDA(Surgery):
    r"""The shortest convex combination of the gradients.

    Parameters
    ----------
    normalization : "none", "l2", "loss" or "loss+"
        What each gradient is divided by before the weights are sought: nothing, its length, its loss, or both. The
        weights are those of the gradients as they are (Sener & Koltun's code).

    References
    ----------
    Desideri, C. R. Math. 2012. Sener & Koltun, Multi-task learning as multi-objective optimization, NeurIPS 2018,
    arXiv:1810.04650.
    """

    def __init__(self, *, normalization: Literal["none", "l2", "loss", "loss+"] = "none") -> None:
        _check_choice("MGDA", "normalization", normalization, ("none", "l2", "loss", "loss+"))
        self.normalization = normalization

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `tlkernels.ops.mgda_weights`."""
        by = torch.ones_like(losses)
        if self.normalization in ("l2", "loss+"):
            by = by * gram.diagonal().sqrt().to(by)
        if self.normalization in ("loss", "loss+"):
            if bool((losses <= 0).any()):
                t = int((losses <= 0).nonzero()[0])
                raise ValueError(f"MGDA: losses[{t}] is {float(losses[t]):g}; expected > 0 to divide by")
            by = by * losses
        by = torch.where(by > 0, by, torch.ones_like(by)).to(gram)  # a gradient of 0 stays one
        return ops.mgda_weights(gram / by[:, None] / by)


class UPGrad(Surgery):
    r"""The mean of the gradients' projections on the cone of directions that no task minds.

    Parameters
    ----------
    preference : sequence of T numbers, optional
        Default 1 / T each.

    References
    ----------
    Quinton & Rey, Jacobian descent for multi-objective optimization, 2024, arXiv:2406.16232.
    """

    def __init__(self, preference: Tensor | Sequence[float] | None = None) -> None:
        self.preference = preference

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `tlkernels.ops.upgrad_weights`."""
        return ops.upgrad_weights(gram, self.preference)


class DualProj(Surgery):
    r"""The projection of the weighted mean on the cone of directions that no task minds.

    Parameters
    ----------
    preference : sequence of T numbers, optional
        Default 1 / T each.

    References
    ----------
    Lopez-Paz & Ranzato, Gradient episodic memory, NeurIPS 2017, arXiv:1706.08840.
    """

    def __init__(self, preference: Tensor | Sequence[float] | None = None) -> None:
        self.preference = preference

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `tlkernels.ops.dualproj_weights`."""
        return ops.dualproj_weights(gram, self.preference)


class IMTLG(Surgery):
    r"""The direction with equal projections on all gradients.

    References
    ----------
    Liu et al., Towards impartial multi-task learning, ICLR 2021.
    """

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `tlkernels.ops.imtl_g_weights`."""
        return ops.imtl_g_weights(gram)


class AlignedMTL(Surgery):
    r"""Gradients with equal singular values, and no more than that changed.

    Parameters
    ----------
    preference : sequence of T numbers, optional
    scale : "min", "median" or "rmse"
        Of the singular values: what all become.

    References
    ----------
    Senushkin et al., Independent component alignment for multi-task learning, CVPR 2023, arXiv:2305.19000.
    """

    def __init__(
        self, preference: Tensor | Sequence[float] | None = None, *, scale: Literal["min", "median", "rmse"] = "min"
    ) -> None:
        _check_choice("AlignedMTL", "scale", scale, ("min", "median", "rmse"))
        self.preference, self.scale = preference, scale

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `tlkernels.ops.aligned_weights`."""
        return ops.aligned_weights(gram, self.preference, scale=self.scale)


class FairGrad(Surgery):
    r"""Alpha-fair weights: :math:`G w = w^{-1/\alpha}`.

    Parameters
    ----------
    alpha : float
        0.05 to 20.

    References
    ----------
    Ban & Ji, Fair resource allocation in multi-task learning, ICML 2024, arXiv:2402.15638.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        if not 0.05 <= alpha <= 20:
            raise ValueError(f"FairGrad: alpha is {alpha}; expected 0.05 <= alpha <= 20")
        self.alpha = alpha

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `tlkernels.ops.fairgrad_weights`."""
        return ops.fairgrad_weights(gram, self.alpha)


class ConFIG(Surgery):
    r"""The direction with equal cosines to all gradients.

    Parameters
    ----------
    preference : sequence of T numbers, optional

    References
    ----------
    Liu et al., ConFIG: towards conflict-free training of physics informed neural networks, 2024, arXiv:2408.11104.
    """

    def __init__(self, preference: Tensor | Sequence[float] | None = None) -> None:
        self.preference = preference

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `tlkernels.ops.config_weights`."""
        return ops.config_weights(gram, self.preference)


class NashMTL(Surgery):
    r"""The Nash bargaining solution: :math:`G w = 1 / w`.

    Parameters
    ----------
    update_weights_every : int
        Steps that weights are kept for.

    References
    ----------
    Navon et al., Multi-task learning as a bargaining game, ICML 2022, arXiv:2202.01017.
    """

    def __init__(self, *, update_weights_every: int = 1) -> None:
        if (
            isinstance(update_weights_every, bool)
            or not isinstance(update_weights_every, int)
            or update_weights_every < 1
        ):
            raise ValueError(f"NashMTL: update_weights_every is {update_weights_every!r}; expected an integer >= 1")
        self.update_weights_every = update_weights_every
        self._kept: Tensor | None = None
        self._step = 0

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """See `tlkernels.ops.nash_weights`."""
        if self._kept is None or len(self._kept) != len(gram) or self._step % self.update_weights_every == 0:
            self._kept = ops.nash_weights(gram)
            self._step = 0
        self._step += 1
        return self._kept

    def state_dict(self) -> dict[str, Any]:
        """The kept weights and their age."""
        return {"weights": self._kept, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._kept, self._step = state["weights"], state["step"]


class GradDrop(_Random):
    r"""Keep, element by element, the gradients of one sign, chosen with the probability that their sum has.

    Parameters
    ----------
    generator : torch.Generator, optional
        On the parameters' device.

    Notes
    -----
    With :math:`P = \frac12 (1 + \sum_t g_t / \sum_t |g_t|)` and u uniform, positive elements stay where u < P, negative
    ones elsewhere. It looks at each element, so it is no function of the Gram matrix.

    References
    ----------
    Chen et al., Just pick a sign, NeurIPS 2020, arXiv:2010.06808.
    """

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Ones: signs are chosen in `combine`."""
        return torch.ones(len(gram), dtype=torch.float64, device=gram.device)

    @torch.no_grad()
    def combine(
        self, out: list[Tensor], grads: list[list[Tensor | None]], weights: Tensor | None, accumulate: bool
    ) -> None:
        """Element by element, a parameter at a time."""
        for p, to in enumerate(out):
            rows = [row[p] for row in grads if row[p] is not None]
            stack = torch.stack([r for r in rows if r is not None]).to(torch.promote_types(to.dtype, torch.float32))
            total, size = stack.sum(0), stack.abs().sum(0)
            keep_positive = 0.5 * (1 + total / torch.where(size > 0, size, torch.ones_like(size)))
            u = torch.rand(total.shape, generator=self.generator, device=total.device, dtype=total.dtype)
            kept = torch.where(u < keep_positive, stack.clamp(min=0), stack.clamp(max=0)).sum(0)
            if accumulate:
                to.add_(kept.to(to.dtype))
            else:
                to.copy_(kept)


#: methods by name
METHODS: dict[str, type[Surgery]] = {
    "sum": Sum, "mean": Mean, "pcgrad": PCGrad, "cagrad": CAGrad, "mgda": MGDA, "gradvac": GradVac,
    "graddrop": GradDrop, "imtl_g": IMTLG, "nash_mtl": NashMTL, "aligned_mtl": AlignedMTL, "fairgrad": FairGrad,
    "upgrad": UPGrad, "dualproj": DualProj, "config": ConFIG,
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What `backward` did: weights ``[T]`` and the Gram matrix ``[T, T]`` of the shared gradients, both float64."""

    weights: Tensor
    gram: Tensor


def backward(
    losses: Sequence[Tensor],
    shared_parameters: Iterable[Tensor],
    method: str | Surgery = "pcgrad",
    *,
    task_parameters: Sequence[Iterable[Tensor]] | None = None,
    features: Tensor | None = None,
    retain_graph: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> Step:
    r"""Differentiate several tasks' losses and add their combined gradient to ``.grad`` of the shared parameters.

    Parameters
    ----------
    losses : sequence of T scalar tensors
        The tasks' losses, of one forward pass or of several.
    shared_parameters : iterable of Tensor
        What all tasks share: ``model.trunk.parameters()``. Those that require no gradient, or that no task uses, are
        left alone.
    method : str or Surgery
        A name of `METHODS`, or an object, which keeps its state from step to step.
    task_parameters : sequence of T iterables of Tensor, optional
        The tasks' own parameters, which get the plain gradient of their task. Default: all leaves that a loss depends
        on and that are not shared. Where a graph does not show its leaves (reentrant checkpointing), give them.
    features : Tensor, optional
        The shared representation, an intermediate result of the forward pass: gradients are then compared there,
        which is cheaper, and only their combination goes through the shared part (MGDA-UB; also for other methods).
        Losses must depend on the shared parameters through it alone.
    retain_graph : bool
        Keep the graph for another backward pass.
    scaler : torch.amp.GradScaler, optional
        Losses are scaled by it; ``scaler.step`` and ``update`` are the caller's, as ever.

    Returns
    -------
    Step
        The weights and the Gram matrix, for a report of conflicts.

    Raises
    ------
    TypeError, ValueError
        Naming the argument: no loss, a loss that is no scalar or depends on nothing, no shared parameter that any loss
        uses, a sparse gradient of one, a loss that reaches one past `features`, an unknown method. Nothing has been
        written to ``.grad`` then.

    Notes
    -----
    Gradients are *added* to what is in ``.grad``: a batch in pieces is a call for each piece, and is the sum of the
    pieces' combinations. One task gets its plain gradient. What a task whose gradient is 0 does is said at its method's
    weights (`tlkernels.ops`). Where a gradient is inf or NaN all are added up as they are, so that a scaler sees it and
    leaves out the step.

    Gradients come from ``torch.autograd.grad``, which runs no hooks of accumulation: under DistributedDataParallel
    average ``.grad`` over the ranks after the call.

    Examples
    --------
    >>> losses = [task_loss(head(trunk(x)), y) for head, task_loss, y in tasks]
    >>> optimizer.zero_grad()
    >>> backward(losses, trunk.parameters(), "pcgrad")
    >>> optimizer.step()
    """
    losses = _checked_losses(losses)
    shared = list(dict.fromkeys(p for p in shared_parameters if _checked_parameter(p).requires_grad))
    surgery = _method(method)
    own = _own_parameters(losses, shared, task_parameters)
    if features is not None:
        _check_features(features, losses, shared)
    at = shared if features is None else [features]
    scaled = losses if scaler is None else [scaler.scale(loss) for loss in losses]
    rows: list[list[Tensor | None]] = []
    heads: list[tuple[Tensor, Tensor]] = []
    for t, loss in enumerate(scaled):
        keep = retain_graph or features is not None or t + 1 < len(scaled)
        found = torch.autograd.grad(loss, [*at, *own[t]], retain_graph=keep, allow_unused=True)
        rows.append(list(found[: len(at)]))
        heads += [(p, g) for p, g in zip(own[t], found[len(at) :], strict=True) if g is not None]
    used = [p for p in range(len(at)) if any(row[p] is not None for row in rows)]
    if not used:
        raise ValueError("backward: shared_parameters holds none that a loss depends on; expected at least one")
    for row in rows:
        for p in used:
            g = row[p]
            if g is not None and g.is_sparse:
                raise ValueError(f"backward: the gradient of shared_parameters[{p}] is sparse; expected a dense one")
    grads = [[row[p] for p in used] for row in rows]
    gram = ops.task_gram(grads)
    if scaler is not None:
        gram = gram / scaler.get_scale() ** 2
    values = torch.stack([loss.detach().double().reshape(()) for loss in losses]).to(gram.device)
    plain = len(losses) == 1 or not bool(gram.isfinite().all())
    weights = (
        torch.ones(len(losses), dtype=torch.float64, device=gram.device) if plain else surgery.weights(gram, values)
    )
    combining = Sum() if plain else surgery
    if features is None:
        into = [at[p] for p in used]
        for has in (True, False):
            chosen = [i for i, target in enumerate(into) if (target.grad is not None) == has]
            if not chosen:
                continue
            out = [_grad_of(into[i]) for i in chosen]
            combining.combine(out, [[row[i] for i in chosen] for row in grads], weights, accumulate=has)
            for i, g in zip(chosen, out, strict=True):
                into[i].grad = g
    else:
        combined = torch.empty_like(features)
        combining.combine([combined], grads, weights, accumulate=False)
        torch.autograd.backward(features, combined, inputs=shared, retain_graph=retain_graph)
    for parameter, grad in heads:
        _add_grad(parameter, grad)
    return Step(weights, gram)


def _add_grad(p: Tensor, grad: Tensor) -> None:
    """Add to ``.grad``, which must be memory of its own: autograd may give two parameters one tensor, or expanded ones,
    and what changes gradients in place (clipping, a scaler) would do so twice."""  # noqa: D205, D209
    if p.grad is None:
        p.grad = grad.clone() if grad.is_sparse else torch.empty_like(p, requires_grad=False).copy_(grad)
    elif p.grad.is_sparse and not grad.is_sparse:
        p.grad = grad + p.grad  # a dense sum does not fit into a sparse tensor
    else:
        p.grad.add_(grad)


def _grad_of(p: Tensor) -> Tensor:
    return p.grad if p.grad is not None else torch.empty_like(p)


def _check_choice(name: str, argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: {argument} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def _method(method: str | Surgery) -> Surgery:
    if isinstance(method, Surgery):
        return method
    if not isinstance(method, str):
        raise TypeError(f"backward: method is a {type(method).__name__}; expected a name or a Surgery")
    _check_choice("backward", "method", method, tuple(METHODS))
    return METHODS[method]()


def _checked_parameter(p: object) -> Tensor:
    if not isinstance(p, Tensor):
        raise TypeError(f"backward: shared_parameters holds a {type(p).__name__}; expected tensors")
    if p.requires_grad and not p.is_leaf:
        raise ValueError(
            "backward: shared_parameters holds a result of a computation; expected leaves (features= takes one)"
        )
    return p


def _checked_losses(losses: object) -> list[Tensor]:
    if isinstance(losses, Tensor) or not isinstance(losses, Sequence):
        raise TypeError(f"backward: losses is a {type(losses).__name__}; expected a list of scalar tensors")
    if not losses:
        raise ValueError("backward: losses is empty; expected at least one loss")
    for t, loss in enumerate(losses):
        if not isinstance(loss, Tensor):
            raise TypeError(f"backward: losses[{t}] is a {type(loss).__name__}; expected a tensor")
        if loss.numel() != 1:
            raise ValueError(f"backward: losses[{t}] has shape {tuple(loss.shape)}; expected one number")
        if not loss.requires_grad:
            raise ValueError(f"backward: losses[{t}] does not require a gradient; expected a result of the parameters")
    return list(losses)


def _own_parameters(
    losses: list[Tensor], shared: list[Tensor], given: Sequence[Iterable[Tensor]] | None
) -> list[list[Tensor]]:
    common = {id(p) for p in shared}
    if given is None:
        return [[p for p in _leaves(loss) if id(p) not in common] for loss in losses]
    if len(given) != len(losses):
        raise ValueError(f"backward: task_parameters has {len(given)} lists; expected {len(losses)}, one for each loss")
    own = [list(dict.fromkeys(p for p in row if p.requires_grad)) for row in given]
    for t, row in enumerate(own):
        if any(id(p) in common for p in row):
            raise ValueError(f"backward: task_parameters[{t}] holds a shared parameter; expected the task's own")
    return own


def _check_features(features: Tensor, losses: list[Tensor], shared: list[Tensor]) -> None:
    if not (isinstance(features, Tensor) and features.requires_grad):
        raise ValueError("backward: features does not require a gradient; expected a result of the shared part")
    if features.grad_fn is None:
        raise ValueError("backward: features is a leaf; expected a result of the shared part, not detached from it")
    common = {id(p) for p in shared}
    for t, loss in enumerate(losses):
        if any(id(p) in common for p in _leaves(loss, stop=features.grad_fn)):
            raise ValueError(
                f"backward: losses[{t}] depends on shared_parameters past features, a gradient that would be lost; "
                f"expected losses of features alone"
            )


def _leaves(loss: Tensor, stop: Any = None) -> list[Tensor]:
    """The leaves that accumulate a gradient when the loss is differentiated, in the order they are met.

    Those behind the node `stop` alone are left out.
    """
    found: dict[int, Tensor] = {}
    seen: set[Any] = {stop}
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":  # a Function of the user's may have a `variable` as well
            variable = node.variable
            found.setdefault(id(variable), variable)
        waiting += [following for following, _ in node.next_functions]
    return list(found.values())
