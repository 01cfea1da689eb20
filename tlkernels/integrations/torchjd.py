r"""Aggregators for TorchJD whose weights come from this library: no solver, no dependency, no regularisation needed.

`aggregator` makes what ``torchjd.autojac`` takes, `weighting` what ``torchjd.autogram`` does:

.. code-block:: python

    from torchjd.autojac import jac_to_grad, mtl_backward

    from tlkernels.integrations.torchjd import aggregator

    upgrad = aggregator("upgrad")
    mtl_backward(losses, features=features)
    jac_to_grad(shared.parameters(), upgrad)

An aggregator reads the Jacobian twice, for `tlkernels.ops.task_gram` and for `tlkernels.ops.task_combine`; between
them its method is a function of `tlkernels.ops` on the Gram matrix, in float64. What differs from TorchJD's class of
the same name:

- UPGrad and DualProj are exact: TorchJD adds 1e-4 to the diagonal of the normalised Gram matrix.
- MGDA is exact; TorchJD stops after 100 steps of Frank and Wolfe's method, or when one is short.
- CAGrad and Nash-MTL need no cvxpy, FairGrad no scipy. CAGrad does not normalise the matrix; Nash-MTL solves its
  equation at every call, and its direction is not shortened to length 1.
- PCGrad takes a generator, or fixed orders.
- None is differentiable.

Pierre Quinton, Valérian Rey. *Jacobian Descent for Multi-Objective Optimization.* 2024, arXiv:2406.16232.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tlkernels import ops
from tlkernels.ops import _gram_solvers as solvers

if TYPE_CHECKING:
    from torchjd.aggregation import GramianWeightedAggregator, Weighting

__all__ = ["METHODS", "aggregator", "weighting"]

#: The methods by name, each the function of `tlkernels.ops` whose options it takes.
METHODS: dict[str, Callable[..., Any]] = {
    "aligned": solvers.aligned_weights,
    "cagrad": solvers.cagrad_weights,
    "config": solvers.config_weights,
    "dualproj": solvers.dualproj_weights,
    "fairgrad": solvers.fairgrad_weights,
    "gradvac": solvers.gradvac_weights,
    "imtl_g": solvers.imtl_g_weights,
    "mgda": solvers.mgda_weights,
    "nash": solvers.nash_weights,
    "pcgrad": solvers.pcgrad_weights,
    "upgrad": solvers.upgrad_weights,
}


def _torchjd() -> Any:
    try:
        import torchjd.aggregation
    except ImportError as error:
        raise ImportError(
            "tlkernels.integrations.torchjd needs torchjd; install it with `pip install torchjd`"
        ) from error
    return torchjd


def weighting(method: str, **options: Any) -> Weighting[Any]:
    """A TorchJD weighting: from a Gramian ``[T, T]`` to the weights ``[T]``, for ``torchjd.autogram``.

    Parameters
    ----------
    method : str
        A key of `METHODS`: ``"aligned"``, ``"cagrad"``, ``"config"``, ``"dualproj"``, ``"fairgrad"``, ``"gradvac"``,
        ``"imtl_g"``, ``"mgda"``, ``"nash"``, ``"pcgrad"`` or ``"upgrad"``.
    **options
        Those of the function of `tlkernels.ops`: ``c`` and ``rescale`` of `tlkernels.ops.cagrad_weights`,
        ``preference`` of `tlkernels.ops.upgrad_weights`, and so on. Their values are checked at the first call.

    Returns
    -------
    torchjd.aggregation.Weighting
        Its weights are of the Gramian's dtype and on its device. That of ``"gradvac"`` carries the usual cosines from
        call to call, and in its ``state_dict``; its ``reset()`` forgets them.

    Raises
    ------
    ImportError
        If torchjd is not installed.
    ValueError
        If there is no such method.
    TypeError
        If it has no such option.
    """
    return _weighting_class()("weighting", method, options)


def aggregator(method: str, **options: Any) -> GramianWeightedAggregator:
    """A TorchJD aggregator: from a Jacobian ``[T, P]`` to the update ``[P]``, for ``torchjd.autojac``.

    Parameters
    ----------
    method : str
        As for `weighting`.
    **options
        As for `weighting`.

    Returns
    -------
    torchjd.aggregation.GramianWeightedAggregator
        Takes a Jacobian of float32, bfloat16, float16 or float64, and gives an update of the same dtype. Its
        ``gramian_weighting`` is `weighting`'s, and TorchJD's ``optimize_gramian_computation`` works with it. That of
        ``"gradvac"`` has a ``reset()``.

    Raises
    ------
    ImportError
        If torchjd is not installed.
    ValueError
        If there is no such method.
    TypeError
        If it has no such option.

    Notes
    -----
    The Gram matrix is summed in float64 from the Jacobian's rows, so that weights do not suffer from a Jacobian in
    bfloat16 beyond its own rounding. The weights that ``jac_to_grad`` returns are float64.
    """
    return _aggregator_class()(method, options)


def __getattr__(name: str) -> Any:
    # classes that extend TorchJD's, which is imported only when they are asked for; pickle finds them here
    makers: dict[str, Callable[[], type]] = {"GramWeighting": _weighting_class, "GramAggregator": _aggregator_class}
    if name in makers:
        return makers[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _checked(function: str, method: str, options: dict[str, Any]) -> Callable[..., Any]:
    if method not in METHODS:
        raise ValueError(f"{function}: method is {method!r}; expected one of {', '.join(METHODS)}")
    names = [n for n in inspect.signature(METHODS[method]).parameters if n not in ("gram", "targets")]
    for name in options:
        if name not in names:
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise TypeError(f"{function}: {method} has no option {name}; {has}")
    return METHODS[method]


def _shown(method: str, options: dict[str, Any]) -> str:
    return ", ".join([repr(method), *(f"{name}={value!r}" for name, value in options.items())])


@functools.cache
def _weighting_class() -> type:
    base = _torchjd().aggregation.Weighting

    class GramWeighting(base):  # type: ignore[misc, valid-type]
        """Weights of one of `METHODS` from a Gramian."""

        def __init__(self, function: str, method: str, options: dict[str, Any]) -> None:
            _checked(function, method, options)
            super().__init__()
            self.method, self.options = method, options
            self.targets: Tensor | None = None  # of GradVac

        def reset(self) -> None:
            """Forget what GradVac carries from call to call."""
            self.targets = None

        def get_extra_state(self) -> Tensor | None:
            return self.targets

        def set_extra_state(self, state: Tensor | None) -> None:
            self.targets = state

        @torch.no_grad()
        def forward(self, stat: Tensor, /) -> Tensor:
            gram = stat if stat.dtype == torch.float64 else stat.float()
            if self.method == "gradvac":
                weights, self.targets = solvers.gradvac_weights(gram, self.targets, **self.options)
            else:
                weights = METHODS[self.method](gram, **self.options)
            return weights.to(stat.dtype)

        def extra_repr(self) -> str:
            return _shown(self.method, self.options)

    return _named(GramWeighting)


def _rows(matrix: Tensor) -> list[list[Tensor]]:
    """The Jacobian as gradients of one parameter: views of its rows."""
    return [[row] for row in matrix.detach().contiguous().unbind(0)]


def _gram(matrix: Tensor) -> Tensor:
    return ops.task_gram(_rows(matrix))


@functools.cache
def _aggregator_class() -> type:
    base = _torchjd().aggregation.GramianWeightedAggregator

    class GramAggregator(base):  # type: ignore[misc, valid-type]
        """The update of one of `METHODS` from a Jacobian, in two reads of it."""

        def __init__(self, method: str, options: dict[str, Any]) -> None:
            super().__init__(_weighting_class()("aggregator", method, options))
            self.weighting = self.gramian_weighting << _gram

        def reset(self) -> None:
            """Forget what GradVac carries from call to call."""
            self.gramian_weighting.reset()

        @torch.no_grad()
        def forward(self, matrix: Tensor, /) -> Tensor:
            (update,) = ops.task_combine(_rows(matrix), self.weighting(matrix))
            return cast(Tensor, update)

        def __repr__(self) -> str:
            return f"GramAggregator({self.gramian_weighting.extra_repr()})"

        def __str__(self) -> str:
            return f"GramAggregator({self.gramian_weighting.method})"

    return _named(GramAggregator)


def _named(cls: type) -> type:
    """The class under the name by which `__getattr__` hands it out."""
    cls.__module__, cls.__qualname__ = __name__, cls.__name__
    return cls
