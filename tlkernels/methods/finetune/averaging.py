r"""Averages of the weights over training: exponential (EMA) and uniform (SWA).

Both are one multi-tensor interpolation per update, :math:`\bar w \leftarrow \bar w + a_t (w - \bar w)`, with

.. math:: a_t = 1 - d \quad\text{(EMA)}, \qquad a_t = 1 / t \quad\text{(SWA, update } t = 1, 2, \dots).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

__all__ = ["EMA", "SWA", "WeightAverage"]


class WeightAverage(ABC):
    """What both averages share. A subclass says how much each update weighs.

    Parameters
    ----------
    model : torch.nn.Module
        The average starts from its weights. Parameters and buffers are found by name at each update; tied ones count
        once.
    buffers : {"copy", "average"}
        Whether floating-point buffers (the statistics of batch norms) are those of the last update, or averaged like
        the weights. Integer buffers are always copied.
    dtype : torch.dtype, optional
        Of the average. By default float32 for parameters in bfloat16 and float16, whose small steps would be rounded
        away, else the parameter's own.
    device : torch.device or str, optional
        Of the average; by default the parameter's own.

    Attributes
    ----------
    num_updates : int
    parameters, buffers : dict of str to Tensor
        The averages, by name.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.
    """

    def __init__(
        self, model: nn.Module, *, buffers: Literal["copy", "average"] = "copy", dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        own = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(f"{own}: model is a {type(model).__name__}; expected a torch.nn.Module")
        if buffers not in ("copy", "average"):
            raise ValueError(f"{own}: buffers is {buffers!r}; expected 'copy' or 'average'")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"{own}: dtype is {dtype}; expected a floating-point dtype")
        self.model = model
        self.num_updates = 0
        self._average_buffers = buffers == "average"
        self._swapped = False

        def held(tensor: Tensor, averaged: bool) -> Tensor:
            wanted = tensor.dtype
            if averaged and tensor.is_floating_point():
                wanted = dtype or (torch.float32 if wanted in (torch.bfloat16, torch.float16) else wanted)
            return tensor.detach().to(device=device or tensor.device, dtype=wanted, copy=True)

        self.parameters = {name: held(p, True) for name, p in model.named_parameters()}
        self.buffers = {name: held(b, self._average_buffers) for name, b in model.named_buffers()}

    @abstractmethod
    def _next_weight(self) -> float:
        """What the next update weighs; called once for each."""

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average; after ``optimizer.step()``.

        Raises
        ------
        RuntimeError
            If the model has other parameters or buffers than when the average was made, or the average is swapped in.
        """
        own = type(self).__name__
        if self._swapped:
            raise RuntimeError(f"{own}.update: the model holds the average; leave swap() first")
        params, buffers = self._of_model("update")
        weight = self._next_weight()
        averages, values = [], []
        for held, current in ((self.parameters, params), (self.buffers, buffers)):
            for name, average in held.items():
                if average.is_floating_point() and (held is self.parameters or self._average_buffers):
                    averages.append(average)
                    values.append(current[name].detach().to(average))
                else:
                    average.copy_(current[name])
        if averages:
            torch._foreach_lerp_(averages, values, weight)
        self.num_updates += 1

    @contextmanager
    def swap(self) -> Iterator[nn.Module]:
        """Give the model the averaged weights and buffers, and its own back on leaving, bit for bit.

        Yields the model. Meanwhile its memory holds the weights once more.

        Raises
        ------
        RuntimeError
            As `update`.
        """
        if self._swapped:
            raise RuntimeError(f"{type(self).__name__}.swap: the model holds the average already")
        params, buffers = self._of_model("swap")
        backup = [(t, t.detach().clone()) for t in (*params.values(), *buffers.values())]
        self._swapped = True
        try:
            self._write(params, buffers)
            yield self.model
        finally:
            with torch.no_grad():
                for tensor, value in backup:
                    tensor.copy_(value)
            self._swapped = False

    def copy_to(self, model: nn.Module | None = None) -> None:
        """Write the averages into a model, for good.

        Parameters
        ----------
        model : torch.nn.Module, optional
            Of the same form; by default the one that was averaged.

        Raises
        ------
        RuntimeError
            As `update`.
        """
        self._write(*self._of_model("copy_to", model))

    def update_bn(self, loader: Iterable[Any], device: torch.device | str | None = None) -> None:
        """Compute the batch-norm statistics of the averaged weights anew: none of the averaged models had these.

        Parameters
        ----------
        loader : iterable
            Batches for the model: tensors, or tuples with the input first, as `torch.optim.swa_utils.update_bn` takes.
        device : torch.device or str, optional
            To move the batches to.
        """
        with self.swap():
            swa_utils.update_bn(loader, self.model, device)  # type: ignore[arg-type]
            for name, buffer in self.model.named_buffers():
                self.buffers[name].copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """The averages and the count; not the settings."""
        return {"num_updates": self.num_updates, "parameters": dict(self.parameters), "buffers": dict(self.buffers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved average.

        Raises
        ------
        ValueError
            If it has other names or shapes; the average is as it was then.
        """
        own = type(self).__name__
        pairs = []
        for kind, held in (("parameters", self.parameters), ("buffers", self.buffers)):
            for name in sorted(state[kind].keys() ^ held.keys()):
                raise ValueError(
                    f"{own}.load_state_dict: {name} is in the {kind} of the state or of the model, not both"
                )
            for name, average in held.items():
                if state[kind][name].shape != average.shape:
                    raise ValueError(
                        f"{own}.load_state_dict: {name} has shape {tuple(state[kind][name].shape)}; "
                        f"expected {tuple(average.shape)}"
                    )
                pairs.append((average, state[kind][name]))
        for average, value in pairs:
            average.copy_(value)
        self.num_updates = state["num_updates"]

    def _of_model(self, op: str, model: nn.Module | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = self.model if model is None else model
        params: dict[str, Tensor] = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        for held, found in ((self.parameters, params), (self.buffers, buffers)):
            odd = sorted(held.keys() ^ found.keys())
            odd += [name for name in held if not odd and held[name].shape != found[name].shape]
            if odd:
                raise RuntimeError(
                    f"{type(self).__name__}.{op}: {odd[0]} is not in the model as it was when the average was made "
                    f"({len(odd)} such); expected the same names and shapes"
                )
        return params, buffers

    @torch.no_grad()
    def _write(self, params: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
        for held, target in ((self.parameters, params), (self.buffers, buffers)):
            for name, average in held.items():
                target[name].copy_(average)


class EMA(WeightAverage):
    r"""Exponential moving average of the weights.

    .. math:: \bar w_t = d_t \, \bar w_{t-1} + (1 - d_t) \, w_t, \qquad \bar w_0 = \text{the weights at the start}

    Parameters
    ----------
    model, buffers, dtype, device
        As for `WeightAverage`.
    decay : float
        d, in [0, 1).
    warmup : bool
        :math:`d_t = \min(d, (1 + n) / (10 + n))` with n the updates made before: a short memory while there is little
        to remember.
    bias_correction : bool
        Leave the weights at the start out, as Adam does: :math:`\bar w_t = \sum_i c_i w_i / \sum_i c_i` over the
        updates alone, :math:`c_i = (1 - d_i) \prod_{j > i} d_j`. The first update then is the average.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as stated.

    References
    ----------
    Polyak and Juditsky, Acceleration of stochastic approximation by averaging, SIAM J. Control Optim. 30, 1992. Bias
    correction: Kingma and Ba, Adam, ICLR 2015, arXiv:1412.6980, section 3.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> ema = EMA(model, decay=0.99)
    >>> ema.update()  # after each optimizer.step()
    >>> with ema.swap():
    ...     out = model(torch.ones(1, 2))  # by the averaged weights
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.999, *, warmup: bool = False, bias_correction: bool = False,
        buffers: Literal["copy", "average"] = "copy", dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay is {decay}; expected 0 <= decay < 1")
        super().__init__(model, buffers=buffers, dtype=dtype, device=device)
        self.decay, self.warmup, self.bias_correction = decay, warmup, bias_correction
        self._product = 1.0  # of all decays so far: the share of the start, which the correction takes out

    def _next_weight(self) -> float:
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        self._product *= decay
        return (1 - decay) / (1 - self._product) if self.bias_correction else 1 - decay

    def state_dict(self) -> dict[str, Any]:
        """The averages, the count and the product of the decays; not the settings."""
        return {**super().state_dict(), "decay_product": self._product}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved average; raises as `WeightAverage.load_state_dict`."""
        super().load_state_dict(state)
        self._product = state["decay_product"]


class SWA(WeightAverage):
    r"""Stochastic weight averaging: the mean of the weights at the updates.

    .. math:: \bar w_t = \bar w_{t-1} + (w_t - \bar w_{t-1}) / t

    Parameters
    ----------
    model, buffers, dtype, device
        As for `WeightAverage`.

    Notes
    -----
    Update once each epoch (or cycle of the learning rate) near the end of training, and `update_bn` before use.
    Before the first update the average is the model as it was given.

    References
    ----------
    Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018, arXiv:1803.05407.
    """

    def _next_weight(self) -> float:
        return 1 / (self.num_updates + 1)
