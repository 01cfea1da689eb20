"""Parts of a fine-tuning loop: gradient accumulation and early stopping. The loop itself is the user's.

A whole loop, with accumulation, mixed precision, clipping, a schedule, an average of the weights and early stopping::

    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)    # bfloat16 needs no scaling
    stopping = EarlyStopping(patience=3, model=model)
    for epoch in range(epochs):
        model.train()
        for micro_batches in batches_of_micro_batches:
            optimizer.zero_grad()

            def loss_fn(batch):
                with torch.autocast("cuda", dtype):
                    return model(**batch).loss                               # the mean over the batch's tokens

            loss = accumulate_gradients(
                micro_batches, loss_fn, lambda batch: (batch["labels"] != -100).sum(), scaler=scaler
            )
            scaler.unscale_(optimizer)                                       # clip the gradients, not their multiples
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            ema.update()
        with ema.swap():
            value = evaluate(model)
        if stopping.step(value):
            break
    stopping.restore()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["EarlyStopping", "accumulate_gradients"]

Batch = TypeVar("Batch")


def accumulate_gradients(
    micro_batches: Sequence[Batch], loss_fn: Callable[[Batch], Tensor],
    count_fn: Callable[[Batch], int | float | Tensor], *, scaler: torch.amp.GradScaler | None = None,
) -> Tensor:  # fmt: skip
    r"""Add to ``.grad`` the gradient of the full batch, from micro-batches of unequal size.

    .. math:: \nabla L = \sum_i \frac{n_i}{N} \nabla L_i, \qquad N = \sum_i n_i

    Parameters
    ----------
    micro_batches : sequence
        A list, not an iterator: :math:`N` must be known before the first backward pass.
    loss_fn : callable
        :math:`L_i`: from a micro-batch to its mean loss over :math:`n_i` targets, a scalar with graph.
    count_fn : callable
        :math:`n_i` >= 0: the number of targets that the mean is over, for language models the labels that are not
        -100. One without targets is passed over; its mean would be NaN.
    scaler : torch.amp.GradScaler, optional
        Scales each loss before its backward pass.

    Returns
    -------
    Tensor
        L, detached, unscaled.

    Raises
    ------
    TypeError
        If `micro_batches` is no sequence.
    ValueError
        If a count is negative, or all are 0.

    Notes
    -----
    The plain mean of the :math:`L_i` weighs each target by the size of the micro-batch that it happens to be in. Each
    graph is freed before the next forward pass. Statistics of the batch, as in batch norm, are those of the
    micro-batches.
    """
    if not isinstance(micro_batches, Sequence):
        raise TypeError(
            f"accumulate_gradients: micro_batches is a {type(micro_batches).__name__}; expected a sequence, such as a "
            "list: the targets are counted first"
        )
    counts = [float(count_fn(batch)) for batch in micro_batches]
    if any(not n >= 0 for n in counts):
        raise ValueError(f"accumulate_gradients: count_fn returned {min(counts)}; expected >= 0")
    total = math.fsum(counts)
    if total == 0:
        raise ValueError(
            f"accumulate_gradients: the {len(counts)} micro_batches have no targets; expected at least one"
        )
    losses = []
    for batch, n in zip(micro_batches, counts, strict=True):
        if n:
            loss = loss_fn(batch) * (n / total)
            (loss if scaler is None else scaler.scale(loss)).backward()
            losses.append(loss.detach())
    return torch.stack(losses).sum()


class EarlyStopping:
    """Stop when a value has not improved for a while; keep the weights of its best.

    Parameters
    ----------
    patience : int
        How many evaluations in a row without improvement end the training, >= 1.
    min_delta : float
        By how much a value must be better than the best to count as improvement, >= 0.
    mode : {"min", "max"}
        Whether lower is better (a loss) or higher (an accuracy).
    model : torch.nn.Module, optional
        Whose best weights and buffers are kept, for `restore`.
    device : torch.device or str, optional
        To keep them on, e.g. ``"cpu"``; by default where they are.

    Attributes
    ----------
    best : float or None
        The best value so far.
    best_step : int or None
        Its number, from 0.
    num_steps : int
        Evaluations so far.
    bad_steps : int
        Evaluations since the best.
    stopped : bool

    Raises
    ------
    ValueError
        If an argument is not as stated.

    Notes
    -----
    A value that is NaN is no improvement.

    Examples
    --------
    >>> stopping = EarlyStopping(patience=2)
    >>> [stopping.step(loss) for loss in (0.9, 0.5, 0.6, 0.7)]
    [False, False, False, True]
    >>> stopping.best, stopping.best_step
    (0.5, 1)
    """

    def __init__(
        self, patience: int = 3, min_delta: float = 0.0, mode: Literal["min", "max"] = "min", *,
        model: nn.Module | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        if patience < 1:
            raise ValueError(f"EarlyStopping: patience is {patience}; expected >= 1")
        if not (math.isfinite(min_delta) and min_delta >= 0):
            raise ValueError(f"EarlyStopping: min_delta is {min_delta}; expected a finite number >= 0")
        if mode not in ("min", "max"):
            raise ValueError(f"EarlyStopping: mode is {mode!r}; expected 'min' or 'max'")
        self.patience, self.min_delta, self.mode, self.model, self.device = patience, min_delta, mode, model, device
        self.best: float | None = None
        self.best_step: int | None = None
        self.bad_steps = 0
        self.num_steps = 0
        self._weights: dict[str, Any] | None = None

    @property
    def stopped(self) -> bool:
        """Whether the last step said to stop."""
        return self.bad_steps >= self.patience

    def step(self, value: float | Tensor) -> bool:
        """Take the value of an evaluation; returns whether to stop."""
        value = float(value)
        sign = 1 if self.mode == "min" else -1
        if not math.isnan(value) and (self.best is None or sign * value < sign * self.best - self.min_delta):
            self.best, self.best_step, self.bad_steps = value, self.num_steps, 0
            if self.model is not None:
                self._weights = {name: self._copy(entry) for name, entry in self.model.state_dict().items()}
        else:
            self.bad_steps += 1
        self.num_steps += 1
        return self.stopped

    def restore(self) -> None:
        """Give the model the weights and buffers of the best evaluation.

        Raises
        ------
        RuntimeError
            If there is no model, or no evaluation was better than none.
        """
        if self.model is None:
            raise RuntimeError("EarlyStopping.restore: there is no model; give one when making it")
        if self._weights is None:
            raise RuntimeError("EarlyStopping.restore: there are no best weights yet; call step with a value first")
        self.model.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """All that has been seen, the best weights included; not the settings."""
        names = ("best", "best_step", "bad_steps", "num_steps")
        return {**{name: getattr(self, name) for name in names}, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what another has seen."""
        for name in ("best", "best_step", "bad_steps", "num_steps"):
            setattr(self, name, state[name])
        self._weights = state["weights"]

    def _copy(self, entry: Any) -> Any:
        return entry.detach().to(self.device or entry.device, copy=True) if isinstance(entry, Tensor) else entry
