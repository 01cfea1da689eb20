r"""Self-distillation without labels: DINO on views, iBOT on masked patches.

A teacher, the student's `MomentumEncoder`, gives targets that are centred, against collapse onto one prototype, and
sharpened, against collapse onto all of them:

.. math:: q = \mathrm{softmax}((t - c) / \tau_t), \qquad c \leftarrow m \, c + (1 - m) \, \bar t
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tlkernels.methods._common import check_tensor, wide
from tlkernels.methods.pretrain._common import (
    Reduce,
    alone,
    check_positive,
    check_rows,
    check_share,
    soft_cross_entropy,
)

__all__ = ["DINOLoss", "IBOTLoss"]


class _CenteredTeacher(nn.Module):
    """The centre, the temperatures, and the targets."""

    center: Tensor

    def __init__(
        self, num_prototypes: int, *, student_temperature: float = 0.1,
        teacher_temperature: float | Callable[[int], float] = 0.04, center_momentum: float = 0.9,
        reduce: Reduce | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        op = type(self).__name__
        if num_prototypes < 1:
            raise ValueError(f"{op}: num_prototypes is {num_prototypes}; expected >= 1")
        first = teacher_temperature(0) if callable(teacher_temperature) else teacher_temperature
        check_positive(op, student_temperature=student_temperature, teacher_temperature=first)
        check_share(op, center_momentum=center_momentum)
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.center_momentum, self.reduce = center_momentum, reduce
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    def _temperature(self, step: int) -> float:
        value = self.teacher_temperature(step) if callable(self.teacher_temperature) else self.teacher_temperature
        check_positive(type(self).__name__, teacher_temperature=value)
        return value

    @torch.no_grad()
    def _targets(self, logits: Tensor, temperature: float) -> Tensor:
        logits = wide(logits)
        return torch.softmax((logits - self.center.to(logits.dtype)) / temperature, -1)

    @torch.no_grad()
    def _follow(self, logits: Sequence[Tensor]) -> None:
        """Move the centre towards the mean of the rows of all `logits`, over all processes."""
        reduce = self.reduce or alone
        # wide until it is a mean: a model in 16 bits has such a centre too, and a sum over a batch may not fit there
        total = reduce(torch.stack([wide(t).sum(0) for t in logits]).sum(0))
        number = reduce(total.new_full((1,), float(sum(t.shape[0] for t in logits))))
        center = torch.lerp(self.center.to(total.dtype), (total / number)[None], 1 - self.center_momentum)
        self.center.copy_(center)


class DINOLoss(_CenteredTeacher):
    r"""The loss of DINO: each student view predicts the teacher's views, but not the same one.

    .. math:: L = \frac{1}{|P|} \sum_{(i, v) \in P} \frac1N \sum_b - \sum_k q^{(i)}_{bk}
        \log \mathrm{softmax}_k (s^{(v)}_b / \tau_s), \qquad P = \{(i, v) : i \le T, v \le V, i \ne v\}

    In training mode the centre is updated after the loss is computed.

    Parameters
    ----------
    num_prototypes : int
        K.
    student_temperature : float > 0
    teacher_temperature : float > 0 or callable
        Or a function of the step, such as `linear_warmup`: DINO goes from 0.04 to 0.07 in 30 epochs.
    center_momentum : float
        m in [0, 1].
    reduce : callable, optional
        Sums a tensor over all processes (`GroupSum`), for the centre.

    Attributes
    ----------
    center : Tensor [1, K]
        A buffer, float32.

    Raises
    ------
    ValueError
        If an argument is not as stated.

    References
    ----------
    Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021, arXiv:2104.14294, equations
    1 to 4.

    Examples
    --------
    >>> import torch
    >>> loss_fn = DINOLoss(16)
    >>> teacher = [torch.randn(4, 16) for _ in range(2)]  # the large crops
    >>> student = [torch.randn(4, 16, requires_grad=True) for _ in range(5)]  # the same, then three small ones
    >>> loss_fn(student, teacher).backward()
    """

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], *, step: int = 0) -> Tensor:
        """Compute the loss; in training mode, move the centre.

        Parameters
        ----------
        student : sequence of V Tensors [N, K], float32, bfloat16, float16 or float64
            Logits of each view; the first T are of the teacher's views, in their order.
        teacher : sequence of T Tensors [N, K]
            Logits; detached here. T <= V.
        step : int
            For a schedule of the teacher's temperature.

        Returns
        -------
        Tensor
            0-d, float32 (float64 for float64).

        Raises
        ------
        TypeError, ValueError
            If an argument is not as stated; the centre is as it was then.
        """
        op = "DINOLoss"
        if not 1 <= len(teacher) <= len(student) or len(student) < 2:
            raise ValueError(
                f"{op}: student has {len(student)} views and teacher {len(teacher)}; "
                "expected at least 2 and 1, the teacher's first among the student's"
            )
        views = {f"student[{i}]": s for i, s in enumerate(student)}
        views |= {f"teacher[{i}]": t for i, t in enumerate(teacher)}
        check_rows(op, 1, "the loss is a mean over rows", **views)
        if student[0].shape[1] != self.center.shape[1]:
            raise ValueError(f"{op}: student[0] has {student[0].shape[1]} logits; expected {self.center.shape[1]}")
        temperature = self._temperature(step)
        targets = [self._targets(t.detach(), temperature) for t in teacher]
        loss = targets[0].new_zeros(())
        pairs = 0
        for v, logits in enumerate(student):
            others = [q for i, q in enumerate(targets) if i != v]
            if others:
                # cross-entropy is linear in its targets: those of one student view are added up first
                loss = loss + soft_cross_entropy(wide(logits) / self.student_temperature, torch.stack(others).sum(0))
                pairs += len(others)
        if self.training:
            self._follow([t.detach() for t in teacher])
        return loss / pairs


class IBOTLoss(_CenteredTeacher):
    r"""The loss of iBOT on patches: the student, which sees some of them masked, predicts the teacher's tokens there.

    .. math:: L = \frac1N \sum_b \frac{1}{\max(1, |M_b|)} \sum_{j \in M_b} - \sum_k q_{bjk}
        \log \mathrm{softmax}_k (s_{bj} / \tau_s)

    In training mode the centre is updated after the loss is computed, with all of the teacher's tokens.

    Parameters
    ----------
    num_prototypes, student_temperature, teacher_temperature, center_momentum, reduce
        As for `DINOLoss`, which computes the other half of iBOT's loss, on class tokens.

    Attributes
    ----------
    center : Tensor [1, K]
        A buffer, float32.

    References
    ----------
    Zhou et al., iBOT: Image BERT Pre-Training with Online Tokenizer, ICLR 2022, arXiv:2111.07832, equation 3.
    """

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor, *, step: int = 0) -> Tensor:
        """Compute the loss; in training mode, move the centre.

        Parameters
        ----------
        student : Tensor [N, L, K], float32, bfloat16, float16 or float64
            Logits of the patch tokens of one view, from the masked image; N, L >= 1.
        teacher : Tensor [N, L, K] of student's dtype
            From the whole image; detached here.
        mask : Tensor [N, L]
            Bool, or 0 and 1: where the student's input was masked.
        step : int
            For a schedule of the teacher's temperature.

        Returns
        -------
        Tensor
            0-d, float32 (float64 for float64).

        Raises
        ------
        TypeError, ValueError
            If an argument is not as stated; the centre is as it was then.
        """
        op = "IBOTLoss"
        check_tensor(op, student=student, teacher=teacher, mask=mask)
        if student.dim() != 3 or student.shape[2] != self.center.shape[1]:
            raise ValueError(f"{op}: student has shape {tuple(student.shape)}; expected (N, L, {self.center.shape[1]})")
        if teacher.shape != student.shape:
            raise ValueError(
                f"{op}: teacher has shape {tuple(teacher.shape)}; expected {tuple(student.shape)}, like student"
            )
        check_rows(op, 1, "the loss is a mean over rows", student=student.flatten(0, 1), teacher=teacher.flatten(0, 1))
        if mask.shape != student.shape[:2]:
            raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}; expected {tuple(student.shape[:2])}")
        temperature = self._temperature(step)
        targets = self._targets(teacher.detach(), temperature)
        of_token = -(targets * torch.log_softmax(wide(student) / self.student_temperature, -1)).sum(-1)
        share = mask.to(of_token.dtype)
        loss = ((of_token * share).sum(1) / share.sum(1).clamp(min=1)).mean()
        if self.training:
            self._follow([teacher.detach().flatten(0, 1)])
        return loss
