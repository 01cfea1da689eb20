r"""What is differentiated: per-sample losses, and labels from the model's own predictive distribution.

A `Probe` is one backward pass: the gradient of ``value(output, target)``, a sum over samples, squared per sample. The
empirical Fisher has one probe, of the loss at the data's labels. The Fisher proper has the labels' expectation under
the model: draws (``samples`` probes) or, exactly, one probe per class or output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

KINDS = ("empirical", "sampled", "exact")


@dataclass(frozen=True)
class Probe:
    """One objective, linear in the output (``(output * aux).sum()``) or the loss (at drawn labels `aux`, if any)."""

    loss: Loss
    linear: bool = False
    aux: Tensor | None = None
    scale: float = 1.0

    def value(self, output: Tensor, target: Any, aux: Tensor | None) -> Tensor:
        """The sum over the samples, of which `aux` may be those of a part of the batch."""
        if self.linear:
            assert aux is not None
            return (output * aux).sum()
        return self.loss.per_sample(output, target if aux is None else aux).sum()


class Loss:
    """A loss by name or as a callable, as per-sample losses."""

    def __init__(
        self, op: str, loss: str | Callable[[Any, Any], Tensor], *, kind: str, reduction: str | None, ignore_index: int,
        token_reduction: str,
    ) -> None:  # fmt: skip
        if kind not in KINDS:
            raise ValueError(f"{op}: kind is {kind!r}; expected one of {', '.join(map(repr, KINDS))}")
        if isinstance(loss, str):
            if loss not in ("cross_entropy", "mse"):
                raise ValueError(f"{op}: loss is {loss!r}; expected 'cross_entropy', 'mse' or a callable")
            if reduction is not None:
                raise ValueError(f"{op}: reduction is {reduction!r} with loss {loss!r}; expected None")
        elif not callable(loss):
            raise TypeError(f"{op}: loss is a {type(loss).__name__}; expected 'cross_entropy', 'mse' or a callable")
        elif kind != "empirical":
            raise ValueError(
                f"{op}: kind is {kind!r} with a callable as loss, which has no predictive distribution; expected "
                "'empirical', or loss 'cross_entropy' or 'mse'"
            )
        if reduction is None and isinstance(loss, nn.Module) and getattr(loss, "reduction", None) in ("mean", "sum"):
            reduction = str(loss.reduction)
        if reduction not in (None, "mean", "sum"):
            raise ValueError(f"{op}: reduction is {reduction!r}; expected None, 'mean' or 'sum'")
        if token_reduction not in ("sum", "mean"):
            raise ValueError(f"{op}: token_reduction is {token_reduction!r}; expected 'sum' or 'mean'")
        self.op, self.loss, self.kind, self.reduction = op, loss, kind, reduction
        self.ignore_index, self.mean = ignore_index, token_reduction == "mean"

    @property
    def name(self) -> str:
        """What a state_dict says of it."""
        if isinstance(self.loss, str):
            return self.loss
        return getattr(self.loss, "__name__", type(self.loss).__name__)

    # ---- the losses [N]

    def per_sample(self, output: Any, target: Any) -> Tensor:
        """Losses ``[N]`` of an output that `check` has seen."""
        if self.loss == "cross_entropy":
            losses = self._cross_entropy(output, target)
            if self.mean:
                losses = losses / self._kept(output, target).flatten(1).sum(1).clamp(min=1)
            return losses
        if self.loss == "mse":
            return 0.5 * (_wide(output) - target).square().flatten(1).sum(1)
        assert callable(self.loss)
        losses = self.loss(output, target)
        if not isinstance(losses, Tensor):
            raise TypeError(f"{self.op}: loss returned a {type(losses).__name__}; expected a tensor")
        n = output.shape[0] if isinstance(output, Tensor) else None
        if losses.dim():
            if n is not None and losses.shape[0] != n:
                raise ValueError(
                    f"{self.op}: loss returned shape {tuple(losses.shape)}; expected the losses of {n} samples, or a "
                    "scalar with reduction='mean' or 'sum'"
                )
            return losses.flatten(1).sum(1) if losses.dim() > 1 else losses
        if self.reduction is None:
            raise ValueError(
                f"{self.op}: loss returned a scalar; expected per-sample losses, or reduction='mean' or 'sum' to say "
                "what it is of them"
            )
        if n is None:
            raise TypeError(f"{self.op}: forward gave a {type(output).__name__} as output; expected a tensor")
        # a sum of equal parts, of which only the sum is used
        return (losses if self.reduction == "mean" else losses / n).expand(n)

    def _cross_entropy(self, output: Tensor, target: Tensor) -> Tensor:
        logs = functional.log_softmax(_wide(output), -1)
        if target.is_floating_point():
            return -(target * logs).sum(-1).reshape(output.shape[0], -1).sum(1)
        kept = target != self.ignore_index
        picked = logs.gather(-1, torch.where(kept, target, 0)[..., None])[..., 0]
        return -torch.where(kept, picked, 0.0).reshape(output.shape[0], -1).sum(1)

    def _kept(self, output: Tensor, target: Any) -> Tensor:
        """1 where a position counts, ``[N, T..]``; [N, 1] for one label per sample."""
        if isinstance(target, Tensor) and not target.is_floating_point():
            kept = (target != self.ignore_index).to(_wide(output).dtype)
        else:
            kept = torch.ones(output.shape[:-1], dtype=_wide(output).dtype, device=output.device)
        return kept.reshape(output.shape[0], -1)

    # ---- what may come in

    def check(self, output: Any, target: Any, n: int) -> None:
        """Raise for an output or labels that do not fit; once per batch, before anything is differentiated."""
        op = self.op
        if not isinstance(output, Tensor):
            if isinstance(self.loss, str) or not callable(self.loss):
                raise TypeError(f"{op}: output is a {type(output).__name__}; expected a tensor, see forward=")
            return
        if output.dim() == 0 or output.shape[0] != n:
            raise ValueError(
                f"{op}: output has shape {tuple(output.shape)}; expected {n} rows, one for each sample of the batch"
            )
        if not isinstance(self.loss, str):
            return
        if target is None and self.kind == "empirical":
            raise ValueError(f"{op}: labels are missing in the batch; expected them, or kind 'sampled' or 'exact'")
        if target is not None and not isinstance(target, Tensor):
            raise TypeError(f"{op}: labels are a {type(target).__name__}; expected a tensor")
        if self.loss == "mse":
            if target is not None and target.shape != output.shape:
                raise ValueError(
                    f"{op}: labels have shape {tuple(target.shape)}; expected {tuple(output.shape)}, like the output"
                )
            return
        if output.dim() < 2:
            raise ValueError(f"{op}: output has shape {tuple(output.shape)}; expected (samples, ..., classes)")
        if target is None:
            return
        if target.is_floating_point():
            if target.shape != output.shape:
                raise ValueError(
                    f"{op}: labels are probabilities of shape {tuple(target.shape)}; expected {tuple(output.shape)}, "
                    "like the output"
                )
            return
        if target.shape != output.shape[:-1]:
            raise ValueError(
                f"{op}: labels have shape {tuple(target.shape)}; expected {tuple(output.shape[:-1])}, the output's "
                "without the classes, which come last"
            )
        wrong = (target != self.ignore_index) & ((target < 0) | (target >= output.shape[-1]))
        if bool(wrong.any()):
            raise ValueError(
                f"{op}: labels hold {int(target[wrong][0])}; expected 0 to {output.shape[-1] - 1}, or ignore_index "
                f"{self.ignore_index}"
            )

    # ---- probes

    def probes(self, output: Any, target: Any, samples: int, generator: torch.Generator | None) -> Iterator[Probe]:
        """The backward passes of one batch."""
        if self.kind == "empirical":
            yield Probe(self)
        elif self.kind == "sampled":
            for _ in range(samples):
                yield Probe(self, aux=self.draw(output.detach(), target, generator), scale=1.0 / samples)
        else:
            yield from (Probe(self, linear=True, aux=aux) for aux in self._square_roots(output.detach(), target))

    def draw(self, output: Tensor, target: Any, generator: torch.Generator | None) -> Tensor:
        """Labels from the predictive distribution; those to be ignored stay so."""
        device = output.device if generator is None else generator.device
        if self.loss == "mse":
            noise = torch.randn(output.shape, generator=generator, device=device, dtype=_wide(output).dtype)
            return output + noise.to(output.device)
        p = _wide(output).softmax(-1).reshape(-1, output.shape[-1]).to(device)
        labels = torch.multinomial(p, 1, generator=generator).reshape(output.shape[:-1]).to(output.device)
        if isinstance(target, Tensor) and not target.is_floating_point():
            labels = torch.where(target == self.ignore_index, target, labels)
        return labels

    def _square_roots(self, output: Tensor, target: Any) -> Iterator[Tensor]:
        r"""Vectors v, like `output`, with :math:`\sum v v^\top` the Hessian of each sample's loss.

        :math:`\sqrt{p_c} (e_c - p)` for each class of each position: labels of different positions are independent
        given the logits, so that cross terms have mean zero, and positions take turns.
        """
        if self.loss == "mse":
            flat = output.flatten(1)
            for j in range(flat.shape[1]):
                aux = torch.zeros_like(flat)
                aux[:, j] = 1.0
                yield aux.view(output.shape)
            return
        p = _wide(output).softmax(-1).reshape(output.shape[0], -1, output.shape[-1])
        kept = self._kept(output, target)
        weight = kept / kept.sum(1, keepdim=True).clamp(min=1) if self.mean else kept
        for t in range(p.shape[1]):
            if not bool(kept[:, t].any()):
                continue
            for c in range(p.shape[2]):
                aux = torch.zeros_like(p)
                aux[:, t] = -p[:, t]
                aux[:, t, c] += 1.0
                aux[:, t] *= (weight[:, t] * p[:, t, c].sqrt())[:, None]
                yield aux.reshape(output.shape).to(output.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
