r"""Replay that looks at gradients: MIR draws what a step would harm most, GSS keeps what points elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from tlkernels import ops
from tlkernels.methods.continual._base import check_number, trainable_parameters
from tlkernels.methods.continual.buffers import ReplayBuffer
from tlkernels.methods.continual.projection import _evaluating
from tlkernels.methods.continual.replay import ER, Loss, _Replay

__all__ = ["GSS", "MIR", "GradientBuffer"]


class MIR(_Replay):
    r"""Maximally interfered retrieval: of drawn examples those are replayed whose loss the coming step raises most.

    Parameters
    ----------
    model : torch.nn.Module
    buffer : ReplayBuffer
        Of (inputs, labels).
    lr : float
        Of the virtual step: that of the optimizer.
    candidates : int
        Examples that are drawn to choose from.
    batch_size : int
        Examples of them that are replayed.
    weight : float
        Of their loss.
    criterion : callable, optional
        ``criterion(outputs, labels)`` returns a loss of each example ``[n]``; default cross entropy.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    `after_backward` does it, `penalty` is 0. ``.grad`` g then is that of the stream's batch; with
    :math:`\theta^v = \theta - \alpha g` the drawn examples are ranked by

    .. math:: s(x, y) = L(f_{\theta^v}(x), y) - L(f_\theta(x), y),

    both in eval mode, and the gradient of the weight times the mean loss of the first of them is added to ``.grad``.
    Parameters without ``.grad`` stay in the virtual step.

    References
    ----------
    Aljundi et al., Online continual learning with maximally interfered retrieval, NeurIPS 2019, arXiv:1908.04742.
    """

    def __init__(
        self, model: nn.Module, buffer: ReplayBuffer, *, lr: float, candidates: int = 50, batch_size: int = 10,
        weight: float = 1.0, criterion: Loss | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, buffer, batch_size=batch_size, criterion=criterion or _each)
        self.lr = check_number("MIR", "lr", lr)
        self.weight = check_number("MIR", "weight", weight)
        if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < batch_size:
            raise ValueError(f"MIR: candidates is {candidates!r}; expected at least batch_size, {batch_size}")
        self.candidates = candidates

    def after_backward(self) -> None:
        """Add the gradient of the loss on the examples that the step would harm most.

        Raises
        ------
        RuntimeError
            If no parameter has a gradient.
        ValueError
            If the criterion returns no loss of each example.
        """
        if not len(self.buffer):
            return
        named = trainable_parameters("MIR", self.model)
        if all(p.grad is None for p in named.values()):
            raise RuntimeError("MIR: no parameter has a gradient; expected after_backward() after backward()")
        x, y, *_ = self.buffer.sample(self.candidates)
        chosen = self.interference(x, y).topk(min(self.batch_size, len(x))).indices
        with torch.enable_grad():
            loss = self.weight * self._losses(self.model(x[chosen]), y[chosen]).mean()
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for p, g in zip(named.values(), grads, strict=True):
            if g is not None:
                p.grad = g if p.grad is None else p.grad.add_(g)

    @torch.no_grad()
    def interference(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """By how much a step along ``.grad`` would raise the loss of each example.

        Parameters
        ----------
        inputs : Tensor [n, ...]
        labels : Tensor [n, ...]

        Returns
        -------
        Tensor [n]

        Raises
        ------
        ValueError
            If the criterion returns no loss of each example.
        """
        named = trainable_parameters("MIR", self.model)
        virtual = {n: p if p.grad is None else p - self.lr * p.grad.to(p.dtype) for n, p in named.items()}
        with _evaluating(self.model):
            now = self._losses(self.model(inputs), labels)
            then = self._losses(functional_call(self.model, virtual, (inputs,)), labels)
        return then - now

    def _losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        losses = self.criterion(outputs, labels)
        if losses.shape != (len(labels),):
            raise ValueError(
                f"MIR: criterion gives shape {tuple(losses.shape)}; expected a loss of each, ({len(labels)},)"
            )
        return losses


class GradientBuffer(ReplayBuffer):
    r"""The buffer of `GSS`: (inputs, labels, scores), of which a low score gets a place and a high one loses it.

    Parameters
    ----------
    capacity : int
    seed : int

    Notes
    -----
    Scores are 1 plus a cosine. When it is full, an example of score c < 1 meets the kept example i, drawn with
    probability :math:`C_i / \sum_j C_j`, and takes its place with probability :math:`C_i / (C_i + c)`; others are
    dropped.

    References
    ----------
    Aljundi et al., Gradient based sample selection for online continual learning, NeurIPS 2019, arXiv:1903.08671,
    algorithm 2.
    """

    def __init__(self, capacity: int, *, seed: int = 0) -> None:
        super().__init__(capacity, seed=seed)

    def _check(self, tensors: tuple[Tensor, ...]) -> None:
        if len(tensors) != 3 or tensors[2].dim() != 1 or not tensors[2].is_floating_point():
            raise ValueError(
                "GradientBuffer: tensors has no scores; expected (inputs, labels, floating-point scores (n,))"
            )
        if not bool(((tensors[2] >= 0) & (tensors[2] <= 2)).all()):
            raise ValueError("GradientBuffer: tensors[2] has a score out of [0, 2]; expected 1 plus a cosine")

    def _place(self, example: tuple[Tensor, ...]) -> int | None:
        if self._count < self.capacity:
            return self._count
        score = float(example[2])
        if score >= 1:
            return None
        kept = self.tensors[2].detach().double().cpu()
        shares = kept if float(kept.sum()) > 0 else torch.ones_like(kept)
        place = int(torch.multinomial(shares, 1, generator=self.generator))
        luck = float(torch.rand((), generator=self.generator, dtype=torch.float64))
        return place if luck * (float(kept[place]) + score) < float(kept[place]) else None


class GSS(ER):
    r"""Gradient-based sample selection, greedy: experience replay of examples whose gradients differ.

    Parameters
    ----------
    model : torch.nn.Module
    buffer : GradientBuffer
        Filled by `observe`.
    compared : int
        n, kept examples that a new one is compared with.
    batch_size, weight, criterion
        As for `ER`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    `observe` scores each example of the batch, one after the other, by

    .. math:: c = 1 + \max_i \frac{\langle g, g_i \rangle}{\|g\| \|g_i\|}

    over n drawn examples of the buffer, with all gradients taken under the model as it is now, in eval mode. The first
    example of all gets 1, as does one whose gradient is 0.

    References
    ----------
    Aljundi et al., Gradient based sample selection for online continual learning, NeurIPS 2019, arXiv:1903.08671,
    algorithm 2.
    """

    def __init__(
        self, model: nn.Module, buffer: GradientBuffer, *, compared: int = 10, batch_size: int = 32,
        weight: float = 1.0, criterion: Loss | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, buffer, batch_size=batch_size, weight=weight, criterion=criterion)
        if not isinstance(buffer, GradientBuffer):
            raise TypeError(f"GSS: buffer is a {type(buffer).__name__}; expected a GradientBuffer")
        if isinstance(compared, bool) or not isinstance(compared, int) or compared < 1:
            raise ValueError(f"GSS: compared is {compared!r}; expected a positive number of examples")
        self.compared = compared

    def observe(self, inputs: Tensor, labels: Tensor, outputs: Tensor | None = None) -> None:
        """Score the examples of a step's batch, once, after it, and show them to the buffer.

        Raises
        ------
        ValueError
            If there are not as many inputs as labels, or a gradient is not finite; the examples before it are kept.
        """
        if len(inputs) != len(labels):
            raise ValueError(f"GSS: got {len(inputs)} inputs and {len(labels)} labels; expected as many")
        params = list(trainable_parameters("GSS", self.model).values())
        for x, y in zip(inputs.split(1), labels.split(1), strict=True):
            score = torch.tensor([self._score(params, x, y)], dtype=torch.float64)
            self.buffer.add(x, y, score)

    def _score(self, params: Sequence[nn.Parameter], x: Tensor, y: Tensor) -> float:
        if not len(self.buffer):
            return 1.0
        xs, ys, *_ = self.buffer.sample(self.compared)
        with _evaluating(self.model):
            grads = [self._gradient(params, x, y)]
            grads += [self._gradient(params, a, b) for a, b in zip(xs.split(1), ys.split(1), strict=True)]
        gram = ops.task_gram(grads).cpu()
        if not torch.isfinite(gram).all():
            raise ValueError("GSS: a gradient has a NaN or an infinity; expected finite numbers")
        lengths = gram.diagonal().clamp(min=0).sqrt()
        cosines = (gram[0, 1:] / (lengths[0] * lengths[1:])).nan_to_num(0.0)
        return 1 + min(max(float(cosines.max()), -1.0), 1.0)

    def _gradient(self, params: Sequence[nn.Parameter], x: Tensor, y: Tensor) -> list[Tensor | None]:
        with torch.enable_grad():
            return list(torch.autograd.grad(self.criterion(self.model(x), y), params, allow_unused=True))


def _each(outputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, labels, reduction="none")
