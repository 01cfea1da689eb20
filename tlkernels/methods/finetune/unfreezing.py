"""Which layers train in which epoch: gradual unfreezing, chain-thaw, frozen bottoms, probes.

Each schedule sets ``requires_grad`` over the layer groups of a model (`layer_groups`), bottom to top ``0 ... L``. It is
in force from the moment it is made (epoch 0), changes with ``step``, and puts everything back with ``restore``::

    optimizer = torch.optim.AdamW(discriminative_lr_groups(model, lr=1e-3))
    schedule = GradualUnfreezing(model)
    for epoch in range(epochs):
        schedule.step(epoch)
        model.train()
        ...
    schedule.restore()

The optimizer is given all parameters from the start; it passes over those without gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tlkernels.methods.finetune.layers import LayerGroup, Layers, layer_groups

__all__ = ["LPFT", "ChainThaw", "FreezeBottom", "GradualUnfreezing", "LinearProbe", "UnfreezingSchedule"]


class UnfreezingSchedule(ABC):
    """What all schedules share. A subclass says in `trainable` which groups train in an epoch.

    Parameters
    ----------
    model : torch.nn.Module
        Whose ``requires_grad`` flags are set. Parameters that do not require gradients when the schedule is made stay
        frozen throughout.
    layers
        As for `layer_groups`, bottom to top; also groups that it made.
    freeze_batch_norm : bool
        Keep the running statistics of batch norms in frozen layers, and normalise with them, as in evaluation: also
        after ``model.train()``. Without it, data of the new task overwrite the statistics of layers that are to stay.

    Attributes
    ----------
    groups : list of LayerGroup
    epoch : int
        The epoch whose setting is in force.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated, and as `layer_groups`.

    Notes
    -----
    A parameter that becomes frozen loses its ``.grad``: an optimizer would go on with the last one. Momentum stays in
    the optimizer, and acts again when the parameter is unfrozen.
    """

    def __init__(self, model: nn.Module, layers: Layers | None = None, *, freeze_batch_norm: bool = True) -> None:
        self.model = model
        self.groups: list[LayerGroup] = layer_groups(model, layers)
        self._original = {name: p.requires_grad for group in self.groups for name, p in group.parameters.items()}
        self._frozen_norms: set[_BatchNorm] = set()
        self._hooks: list[Any] = []
        self._freeze_batch_norm = freeze_batch_norm
        self.epoch = 0
        self.step(0)

    @abstractmethod
    def trainable(self, epoch: int) -> range | tuple[int, ...]:
        """The indices, into `groups`, of the groups that train in an epoch."""

    def step(self, epoch: int | None = None) -> list[str]:
        """Set the flags for an epoch.

        Parameters
        ----------
        epoch : int, optional
            From 0; the one after `epoch` by default. The same epoch may be set again.

        Returns
        -------
        list of str
            The names of the groups that train, bottom to top.

        Raises
        ------
        ValueError
            If `epoch` is negative.
        """
        epoch = self.epoch + 1 if epoch is None else epoch
        if epoch < 0:
            raise ValueError(f"{type(self).__name__}.step: epoch is {epoch}; expected >= 0")
        on = set(self.trainable(epoch))
        self._install_hooks()
        for index, group in enumerate(self.groups):
            for name, p in group.parameters.items():
                if self._original[name]:  # the others may not even be able to require gradients
                    p.requires_grad_(index in on)
                    if index not in on:
                        p.grad = None
            for module in group.modules.values():
                if isinstance(module, _BatchNorm):
                    self._set_norm(module, index not in on)
        self.epoch = epoch
        return [group.name for index, group in enumerate(self.groups) if index in on]

    def restore(self) -> None:
        """Give every parameter the flag that it had before the schedule, and batch norms the mode of the model."""
        for group in self.groups:
            for name, p in group.parameters.items():
                p.requires_grad_(self._original[name])
        for module in list(self._frozen_norms):
            self._set_norm(module, False)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and the flags before the schedule."""
        return {"epoch": self.epoch, "requires_grad": dict(self._original)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another schedule of the same kind, over a model of the same form, was saved.

        Raises
        ------
        ValueError
            If the state is of a model with other parameters.
        """
        flags = dict(state["requires_grad"])
        if flags.keys() != self._original.keys():
            odd = sorted(flags.keys() ^ self._original.keys())
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: {odd[0]} is a parameter of the state or of the model, not of "
                f"both ({len(odd)} such); expected the state of a model with the same parameters"
            )
        self._original = flags
        for group in self.groups:
            for name, p in group.parameters.items():
                p.requires_grad_(flags[name])
        self.step(state["epoch"])

    def _set_norm(self, module: _BatchNorm, frozen: bool) -> None:
        if not self._freeze_batch_norm:
            return
        if frozen:
            self._frozen_norms.add(module)
            module.eval()
        elif module in self._frozen_norms:
            self._frozen_norms.remove(module)
            module.train(self.model.training)

    def _install_hooks(self) -> None:
        if self._hooks or not self._freeze_batch_norm:
            return
        for group in self.groups:
            norms = [module for module in group.modules.values() if isinstance(module, _BatchNorm)]
            self._hooks += [module.register_forward_pre_hook(self._before_norm) for module in norms]

    def _before_norm(self, module: nn.Module, args: Any) -> None:
        if module in self._frozen_norms:  # model.train() comes between step and forward
            module.eval()


class GradualUnfreezing(UnfreezingSchedule):
    """Unfreeze from the top: the head first, and one group more with each epoch.

    In epoch e the upper ``min(L + 1, start + groups_per_epoch * e)`` groups train.

    Parameters
    ----------
    model, layers, freeze_batch_norm
        As for `UnfreezingSchedule`.
    start : int
        Groups that train in epoch 0, >= 1.
    groups_per_epoch : int
        Groups added each epoch, >= 1.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Howard and Ruder, Universal Language Model Fine-tuning for Text Classification, ACL 2018, section 3.3.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    >>> schedule = GradualUnfreezing(model)
    >>> [schedule.step(epoch) for epoch in range(4)]
    [['2'], ['1', '2'], ['0', '1', '2'], ['0', '1', '2']]
    """

    def __init__(
        self, model: nn.Module, layers: Layers | None = None, *, start: int = 1, groups_per_epoch: int = 1,
        freeze_batch_norm: bool = True,
    ) -> None:  # fmt: skip
        if start < 1:
            raise ValueError(f"GradualUnfreezing: start is {start}; expected >= 1")
        if groups_per_epoch < 1:
            raise ValueError(f"GradualUnfreezing: groups_per_epoch is {groups_per_epoch}; expected >= 1")
        self.start, self.groups_per_epoch = start, groups_per_epoch
        super().__init__(model, layers, freeze_batch_norm=freeze_batch_norm)

    def trainable(self, epoch: int) -> range:
        """The upper groups."""
        count = min(len(self.groups), self.start + self.groups_per_epoch * epoch)
        return range(len(self.groups) - count, len(self.groups))


class ChainThaw(UnfreezingSchedule):
    """Train the head alone, then each other group alone from the bottom up, then all together.

    With groups 0 ... L the stages are: L; 0; 1; ...; L - 1; all. The last one stays.

    Parameters
    ----------
    model, layers, freeze_batch_norm
        As for `UnfreezingSchedule`.
    epochs_per_stage : int
        >= 1. The paper trains each stage until the validation loss stops to fall: then call ``step`` after each stage
        instead of after each epoch.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Felbo et al., Using millions of emoji occurrences to learn any-domain representations for detecting sentiment,
    emotion and sarcasm, EMNLP 2017, arXiv:1708.00524, section 3.3.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    >>> schedule = ChainThaw(model)
    >>> [schedule.step(stage) for stage in range(4)]
    [['2'], ['0'], ['1'], ['0', '1', '2']]
    """

    def __init__(
        self, model: nn.Module, layers: Layers | None = None, *, epochs_per_stage: int = 1,
        freeze_batch_norm: bool = True,
    ) -> None:  # fmt: skip
        if epochs_per_stage < 1:
            raise ValueError(f"ChainThaw: epochs_per_stage is {epochs_per_stage}; expected >= 1")
        self.epochs_per_stage = epochs_per_stage
        super().__init__(model, layers, freeze_batch_norm=freeze_batch_norm)

    def trainable(self, epoch: int) -> range | tuple[int, ...]:
        """One group, or all."""
        stage, count = epoch // self.epochs_per_stage, len(self.groups)
        if stage >= count:
            return range(count)
        return ((stage - 1) % count,)


class FreezeBottom(UnfreezingSchedule):
    """Keep the k lowest groups frozen, for good.

    Parameters
    ----------
    model, layers, freeze_batch_norm
        As for `UnfreezingSchedule`.
    k : int
        0 to the number of groups - 1.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated. The model is as it was.

    References
    ----------
    Yosinski et al., How transferable are features in deep neural networks?, NeurIPS 2014, arXiv:1411.1792.
    """

    def __init__(
        self, model: nn.Module, k: int, layers: Layers | None = None, *, freeze_batch_norm: bool = True
    ) -> None:
        groups = layer_groups(model, layers)
        if not 0 <= k < len(groups):
            raise ValueError(
                f"FreezeBottom: k is {k}; expected 0 to {len(groups) - 1}: the model has {len(groups)} groups"
            )
        self.k = k
        super().__init__(model, groups, freeze_batch_norm=freeze_batch_norm)

    def trainable(self, epoch: int) -> range:
        """All but the k lowest."""
        return range(self.k, len(self.groups))


class LPFT(UnfreezingSchedule):
    """Linear probing, then fine-tuning: the top group alone for some epochs, then all.

    Parameters
    ----------
    model, layers, freeze_batch_norm
        As for `UnfreezingSchedule`.
    probe_epochs : int
        >= 1.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    Notes
    -----
    With a head at random, the first steps of fine-tuning distort the features that were to be transferred; with a head
    that fits them already they hardly move. The paper fine-tunes with a learning rate well below that of the probe.

    References
    ----------
    Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, ICLR 2022,
    arXiv:2202.10054.
    """

    def __init__(
        self, model: nn.Module, layers: Layers | None = None, *, probe_epochs: int = 1, freeze_batch_norm: bool = True
    ) -> None:
        if probe_epochs < 1:
            raise ValueError(f"LPFT: probe_epochs is {probe_epochs}; expected >= 1")
        self.probe_epochs = probe_epochs
        super().__init__(model, layers, freeze_batch_norm=freeze_batch_norm)

    def trainable(self, epoch: int) -> range:
        """The top group, or all."""
        count = len(self.groups)
        return range(count - 1 if epoch < self.probe_epochs else 0, count)


class LinearProbe(UnfreezingSchedule):
    """Train the top group alone.

    Parameters
    ----------
    model, layers, freeze_batch_norm
        As for `UnfreezingSchedule`. Where the top group holds more than the classifier (the pooler of BERT, a final
        norm), ``layers=["*.encoder", "classifier"]`` or the like separates them.

    References
    ----------
    Alain and Bengio, Understanding intermediate layers using linear classifier probes, 2016, arXiv:1610.01644.
    """

    def trainable(self, epoch: int) -> range:
        """The top group."""
        return range(len(self.groups) - 1, len(self.groups))
