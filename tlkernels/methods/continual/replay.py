r"""Replay: losses on remembered examples beside the stream's own.

The loop of `ContinualMethod`, with one line more, which shows the buffer the batch that was learned from::

    loss = criterion(out, y) + method.penalty(x, out)
    loss.backward(); optimizer.step()
    method.observe(x, y, out)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlkernels.methods.continual._base import ContinualMethod, check_number, zero
from tlkernels.methods.continual.buffers import ReplayBuffer

__all__ = ["DER", "ER", "ERACE", "DERPlusPlus", "GenerativeReplay"]

Loss = Callable[[Tensor, Tensor], Tensor]


class _Replay(ContinualMethod):
    """A model, a buffer of (inputs, labels, ...), and how many are drawn for a step."""

    def __init__(self, model: nn.Module, buffer: ReplayBuffer, *, batch_size: int, criterion: Loss | None) -> None:
        super().__init__(model)
        if not isinstance(buffer, ReplayBuffer):
            raise TypeError(f"{self._op}: buffer is a {type(buffer).__name__}; expected a ReplayBuffer")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"{self._op}: batch_size is {batch_size!r}; expected a positive number of examples")
        self.buffer, self.batch_size = buffer, batch_size
        self.criterion: Loss = functional.cross_entropy if criterion is None else criterion

    def observe(self, inputs: Tensor, labels: Tensor, outputs: Tensor | None = None) -> None:
        """Show the buffer the batch of a step, once, after it: (inputs, labels), with logits where they are kept."""
        self.buffer.add(inputs, labels)

    def _state(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict()}

    def _load(self, state: dict[str, Any]) -> None:
        if not isinstance(state["buffer"], Mapping):
            raise ValueError(f"{self._op}: state_dict holds no buffer; expected what state_dict() returns")
        self.buffer.load_state_dict(state["buffer"])


class ER(_Replay):
    r"""Experience replay: the loss of a batch drawn from the buffer is added.

    Parameters
    ----------
    model : torch.nn.Module
    buffer : ReplayBuffer
        Of (inputs, labels).
    batch_size : int
        Examples that are drawn for a step.
    weight : float
        Of the drawn batch's loss.
    criterion : callable, optional
        ``criterion(outputs, labels)``; default cross entropy.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    `penalty` is :math:`w \cdot L(f(x_b), y_b)`, 0 while the buffer is empty.

    References
    ----------
    Chaudhry et al., On tiny episodic memories in continual learning, 2019, arXiv:1902.10486. Rolnick et al.,
    Experience replay for continual learning, NeurIPS 2019, arXiv:1811.11682.
    """

    def __init__(
        self, model: nn.Module, buffer: ReplayBuffer, *, batch_size: int = 32, weight: float = 1.0,
        criterion: Loss | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, buffer, batch_size=batch_size, criterion=criterion)
        self.weight = check_number(self._op, "weight", weight)

    def penalty(self, inputs: Any = None, outputs: Tensor | None = None) -> Tensor:
        """The loss of a drawn batch, times the weight."""
        if not len(self.buffer):
            return zero(self.model)
        x, y, *_ = self.buffer.sample(self.batch_size)
        return self.weight * self.criterion(self.model(x), y)


class ERACE(ER):
    r"""Experience replay with asymmetric cross entropy: new classes do not push against old ones.

    Parameters
    ----------
    model, buffer, batch_size, weight
        As for `ER`.

    Notes
    -----
    The stream's batch is judged by `incoming`: cross entropy among the classes that are in it (and those not seen
    before); logits of all other classes are left out. The drawn batch is judged among all.

    References
    ----------
    Caccia et al., New insights on reducing abrupt representation change in online continual learning, ICLR 2022,
    arXiv:2203.03798.
    """

    def __init__(self, model: nn.Module, buffer: ReplayBuffer, *, batch_size: int = 32, weight: float = 1.0) -> None:
        super().__init__(model, buffer, batch_size=batch_size, weight=weight)
        self._seen: set[int] = set()

    def incoming(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of the stream's batch: logits ``[N, C]`` of classes ``[N]``."""
        if outputs.dim() != 2 or labels.dim() != 1 or len(outputs) != len(labels):
            raise ValueError(
                f"ERACE: outputs has shape {tuple(outputs.shape)} and labels {tuple(labels.shape)}; "
                f"expected (N, C) and (N,)"
            )
        present = {int(c) for c in labels.unique()}
        absent = sorted(self._seen - present)
        if absent:
            left_out = torch.zeros(outputs.shape[1], dtype=torch.bool, device=outputs.device)
            left_out[torch.tensor(absent, device=outputs.device)] = True
            outputs = outputs.masked_fill(left_out, float("-inf"))
        return functional.cross_entropy(outputs, labels)

    def observe(self, inputs: Tensor, labels: Tensor, outputs: Tensor | None = None) -> None:
        """Show the buffer the batch of a step, once, after it; its classes count as seen from then on."""
        super().observe(inputs, labels, outputs)
        self._seen |= {int(c) for c in labels.unique()}

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "seen": sorted(self._seen)}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self._seen = set(state["seen"])


class DER(_Replay):
    r"""Dark experience replay: remembered examples keep their logits.

    Parameters
    ----------
    model : torch.nn.Module
    buffer : ReplayBuffer
        Filled by `observe` with (inputs, labels, logits).
    alpha : float
        Of the logits' term.
    batch_size : int
        Examples that are drawn for a step.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    `penalty` is :math:`\alpha` times the mean over a drawn batch's logits of :math:`(f(x_b) - z_b)^2`; a head that has
    grown since is compared on the logits that there were. Examples are remembered with the logits of the step in which
    they were seen, not of the task's end.

    References
    ----------
    Buzzega et al., Dark experience for general continual learning, NeurIPS 2020, arXiv:2004.07211.
    """

    def __init__(
        self, model: nn.Module, buffer: ReplayBuffer, *, alpha: float = 0.5, batch_size: int = 32,
        criterion: Loss | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, buffer, batch_size=batch_size, criterion=criterion)
        self.alpha = check_number(self._op, "alpha", alpha)

    def penalty(self, inputs: Any = None, outputs: Tensor | None = None) -> Tensor:
        """The distance of a drawn batch's logits from the remembered ones."""
        if not len(self.buffer):
            return zero(self.model)
        x, _, z = self.buffer.sample(self.batch_size)
        return self.alpha * functional.mse_loss(self.model(x)[:, : z.shape[1]], z)

    def observe(self, inputs: Tensor, labels: Tensor, outputs: Tensor | None = None) -> None:
        """Show the buffer the batch of a step and its logits ``[N, C]``, once, after it."""
        if outputs is None:
            raise ValueError(f"{self._op}: outputs is None; expected the logits of the batch")
        self.buffer.add(inputs, labels, outputs.detach())


class DERPlusPlus(DER):
    r"""Dark experience replay with labels: DER's term and the loss of another drawn batch.

    Parameters
    ----------
    model, buffer, alpha, batch_size
        As for `DER`.
    beta : float
        Of the labels' term.
    criterion : callable, optional
        ``criterion(outputs, labels)``; default cross entropy.

    Notes
    -----
    :math:`\alpha\, \mathrm{mse}(f(x_b), z_b) + \beta\, L(f(x_{b'}), y_{b'})` with two draws.

    References
    ----------
    Buzzega et al., Dark experience for general continual learning, NeurIPS 2020, arXiv:2004.07211.
    """

    def __init__(
        self, model: nn.Module, buffer: ReplayBuffer, *, alpha: float = 0.5, beta: float = 0.5, batch_size: int = 32,
        criterion: Loss | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, buffer, alpha=alpha, batch_size=batch_size, criterion=criterion)
        self.beta = check_number(self._op, "beta", beta)

    def penalty(self, inputs: Any = None, outputs: Tensor | None = None) -> Tensor:
        """Both terms, each of a draw of its own."""
        if not len(self.buffer):
            return zero(self.model)
        first = super().penalty(inputs, outputs)
        x, y, _ = self.buffer.sample(self.batch_size)
        return first + self.beta * self.criterion(self.model(x), y)


class GenerativeReplay(ContinualMethod):
    r"""Replay of generated examples, labelled by the model of before.

    Parameters
    ----------
    model : torch.nn.Module
    generate : callable
        ``generate(n)`` returns n inputs like those of the earlier tasks: any generative model.
    labeller : callable
        The model before this task: ``labeller(inputs)`` returns logits. Give a frozen copy.
    batch_size : int
        Examples that are generated for a step.
    weight : float
        Of their loss; the paper mixes by the tasks' shares, 1 - 1 / t.
    soft : bool
        Learn the labeller's probabilities instead of its class.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    Before the first task has ended (``tasks == 0``) `penalty` is 0: there is nothing to replay.

    References
    ----------
    Shin et al., Continual learning with deep generative replay, NeurIPS 2017, arXiv:1705.08690.
    """

    def __init__(
        self, model: nn.Module, generate: Callable[[int], Tensor], labeller: Callable[[Tensor], Tensor], *,
        batch_size: int = 32, weight: float = 1.0, soft: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model)
        for name, value in (("generate", generate), ("labeller", labeller)):
            if not callable(value):
                raise TypeError(f"GenerativeReplay: {name} is a {type(value).__name__}; expected a callable")
        if batch_size < 1:
            raise ValueError(f"GenerativeReplay: batch_size is {batch_size}; expected >= 1")
        self.generate, self.labeller, self.batch_size, self.soft = generate, labeller, batch_size, soft
        self.weight = check_number("GenerativeReplay", "weight", weight)

    def penalty(self, inputs: Any = None, outputs: Tensor | None = None) -> Tensor:
        """The loss of generated examples, times the weight."""
        if self.tasks == 0:
            return zero(self.model)
        with torch.no_grad():
            x = self.generate(self.batch_size)
            logits = self.labeller(x)
        target = logits.softmax(1) if self.soft else logits.argmax(1)
        return self.weight * functional.cross_entropy(self.model(x), target)
