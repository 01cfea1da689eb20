r"""EWC, MAS and SI of this library as plugins of Avalanche's strategies.

.. code-block:: python

    from avalanche.training.supervised import Naive
    from tlkernels.integrations.avalanche import EWCPlugin

    strategy = Naive(model, optimizer, criterion, plugins=[EWCPlugin(model, lambda_=100.0)])

They follow the callbacks of Avalanche's ``SupervisedPlugin`` by name, as its strategies call them, and import nothing
of it. What differs from Avalanche's own plugins:

=======  ============================================================================================================
EWC      theirs squares the gradients of batches' mean losses, which is less than the Fisher information by about the
         batch size, and has no one half: their ``ewc_lambda`` at batch size 1 is half of `lambda_`
MAS      theirs has :math:`\lVert f \rVert^2` without one half, absolute values of batches' gradients, and a running
         mean: their ``lambda_reg`` is a quarter of `lambda_` for the first experience, at batch size 1
SI       theirs takes the regularised gradient, and clips the importance to 0.001
=======  ============================================================================================================

Vincenzo Lomonaco et al. *Avalanche: an End-to-End Library for Continual Learning.* CVPRW 2021, arXiv:2104.00405.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tlkernels.methods.continual._base import ContinualMethod
from tlkernels.methods.continual.regularization import EWC, MAS, SI

__all__ = ["ContinualPlugin", "EWCPlugin", "MASPlugin", "SIPlugin"]


def _forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """(outputs, targets) of a batch of Avalanche's, ``(x, y, ..., task labels)``.

    A model that Avalanche would call with the task labels is one with the attribute that its multi-task modules have.
    """
    x, y, task = batch[0], batch[1], batch[-1]
    return (model(x, task) if len(batch) > 2 and _is_multi_task(model) else model(x)), y


def _is_multi_task(model: nn.Module) -> bool:
    return any(base.__name__ == "MultiTaskModule" for base in type(model).__mro__)


class ContinualPlugin:
    """Any method of `tlkernels.methods.continual` with the common hooks as a plugin.

    Parameters
    ----------
    method : ContinualMethod
        Made for the strategy's model.
    batch_size : int, optional
        Of the loader that the method gets; the strategy's ``train_mb_size`` by default.

    Attributes
    ----------
    method : ContinualMethod
        With ``state_dict``, for checkpoints.

    Raises
    ------
    TypeError
        If `method` is none.
    ValueError
        If `batch_size` is not positive; in training, if the method is for another model than the strategy's.

    Notes
    -----
    =======================  ==============================================================
    Avalanche calls          the method does
    =======================  ==============================================================
    ``before_training_exp``  ``before_task``
    ``before_backward``      ``penalty``, where it depends on the batch (LwF)
    ``after_backward``       ``after_backward``: gradients of penalties, projections
    ``after_update``         ``after_step``
    ``after_training_exp``   ``after_task`` with a loader over ``strategy.experience``
    =======================  ==============================================================
    """

    supports_distributed = False

    def __init__(self, method: ContinualMethod, *, batch_size: int | None = None) -> None:
        if not isinstance(method, ContinualMethod):
            raise TypeError(
                f"{type(self).__name__}: method is a {type(method).__name__}; expected one of methods.continual"
            )
        if batch_size is not None and not (isinstance(batch_size, int) and batch_size > 0):
            raise ValueError(f"{type(self).__name__}: batch_size is {batch_size!r}; expected a whole number >= 1")
        self.method, self.batch_size = method, batch_size
        # a penalty that is a function of the parameters alone is added as a gradient, in one sweep
        self._in_loss = type(method).after_backward is ContinualMethod.after_backward

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Begin a task; Avalanche has given the model its new heads by now."""
        self._check(strategy)
        self.method.before_task(_Loader(strategy, self.batch_size))

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the penalty to ``strategy.loss``, where it depends on the batch."""
        if self._in_loss:
            self._check(strategy)
            strategy.loss = strategy.loss + self.method.penalty(strategy.mb_x, strategy.mb_output)

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Change the gradients."""
        self._check(strategy)
        self.method.after_backward()

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        """Note the step."""
        self.method.after_step()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Close the task."""
        self._check(strategy)
        self.method.after_task(_Loader(strategy, self.batch_size))

    def _check(self, strategy: Any) -> None:
        if strategy.model is not self.method.model:
            raise ValueError(
                f"{type(self).__name__}: strategy has another model than the one that the plugin was made for"
            )


class EWCPlugin(ContinualPlugin):
    """`tlkernels.methods.continual.EWC` as a plugin.

    Parameters
    ----------
    model : torch.nn.Module
        The strategy's.
    lambda_ : float
    batch_size : int, optional
        Of the pass for the Fisher information, which does not depend on it.
    **options
        Of `EWC`.
    """

    def __init__(
        self, model: nn.Module, lambda_: float = 1.0, *, batch_size: int | None = None, **options: Any
    ) -> None:
        super().__init__(EWC(model, lambda_, **{"forward": _forward, **options}), batch_size=batch_size)


class MASPlugin(ContinualPlugin):
    """`tlkernels.methods.continual.MAS` as a plugin.

    Parameters
    ----------
    model : torch.nn.Module
        The strategy's.
    lambda_ : float
    batch_size : int, optional
        Of the pass for the importances.
    **options
        Of `MAS`.
    """

    def __init__(
        self, model: nn.Module, lambda_: float = 1.0, *, batch_size: int | None = None, **options: Any
    ) -> None:
        super().__init__(MAS(model, lambda_, **{"forward": _forward, **options}), batch_size=batch_size)


class SIPlugin(ContinualPlugin):
    """`tlkernels.methods.continual.SI` as a plugin.

    Parameters
    ----------
    model : torch.nn.Module
        The strategy's.
    lambda_ : float
    **options
        Of `SI`.
    """

    def __init__(self, model: nn.Module, lambda_: float = 1.0, **options: Any) -> None:
        super().__init__(SI(model, lambda_, **options))


class _Loader:
    """Batches of the current experience on the strategy's device, made anew at each pass."""

    def __init__(self, strategy: Any, batch_size: int | None) -> None:
        experience = getattr(strategy, "experience", None)
        if experience is None:
            raise ValueError("ContinualPlugin: strategy has no experience; expected one that is in training")
        self._data, self._device = experience.dataset, torch.device(strategy.device)
        self._batch_size = batch_size or int(strategy.train_mb_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        collate: Callable[[list[Any]], Any] | None = getattr(self._data, "collate_fn", None)
        for batch in DataLoader(self._data, self._batch_size, collate_fn=collate):
            yield [t.to(self._device) for t in batch]
