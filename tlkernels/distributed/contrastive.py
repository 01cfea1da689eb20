r"""Contrastive losses over the batch of all processes, each of which holds a part.

Process p of W brings :math:`x_p` (``[N_p, D]``) and :math:`y_p` (``[M_p, D]``). With x and y all of them, one under the
other, the log-sum-exps are those of `tlkernels.ops.contrastive` over the whole matrix
:math:`z_{ij} = s \, x_i \cdot y_j + b`. Process p computes the tiles of its rows, against all columns, once:

.. math::
    r_i = \log \sum_j e^{z_{ij}} \text{ is its own affair}, \qquad
    c_j = \log \sum_p e^{c_j^{(p)}}, \quad c_j^{(p)} = \log \sum_{i \text{ of } p} e^{z_{ij}},

so that only O(M) sums cross the network besides the features, and no similarity is computed on two processes: half the
flops of computing x against all of y, and y against all of x. There are two ways for the features to meet.

================ ================================================ =================================================
`exchange`       "gather"                                         "ring"
================ ================================================ =================================================
forward          all-gathers y, computes all its tiles in one     passes y from neighbour to neighbour, computes the
                 call, merges the columns' sums by two            tile of the chunk it holds; the columns' sums travel
                 all-reduces                                      with the chunk, and come home
backward         reduce-scatters the gradient of y, float32       the chunk goes around again with its gradient, float32
memory           O(M D): y of all processes, and its gradient     O(M_p D), whatever the number of processes
waits            before and after the tiles                       for nothing that the tiles' time covers
================ ================================================ =================================================

**What is returned, and what backward differentiates.** With ``local_loss=True``, process p returns its share,
:math:`L_p = W / N \sum_{i \text{ of } p} \ell_i` with N the pairs of all processes: with equal parts the mean over its
own pairs, and always so that the *mean over processes* is the loss of the whole batch. With ``local_loss=False`` it
returns that mean, the same number everywhere. Either way backward differentiates the *sum of what all processes
return*, each weighed with its own ``grad_output``: features get W times the gradient of the mean, since what averages
the gradients of parameters afterwards (DDP, FSDP) divides by W. This is open_clip's ``gather_with_grad=True``. The
scale and the bias are taken for one parameter that every process holds a copy of: their gradient is already averaged,
and the same everywhere, whether they are then averaged once more or not.

Gradients of features in 16 bits are rounded for each tile, and summed in float32.

Alec Radford et al. *Learning Transferable Visual Models From Natural Language Supervision.* ICML 2021 (CLIP).
Xiaohua Zhai et al. *Sigmoid Loss for Language Image Pre-Training.* ICCV 2023 (SigLIP: chunks passed around).
Zesen Cheng et al. *Breaking the Memory Barrier of Contrastive Loss via Tile-Based Strategy.* CVPR 2025,
arXiv:2410.17243 (Inf-CL: log-sum-exps merged over a ring).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tlkernels.distributed import _collectives
from tlkernels.distributed._collectives import Agreed, Call
from tlkernels.nn import contrastive as one_process
from tlkernels.ops._common import check_device, no_autocast
from tlkernels.ops._registry import call
from tlkernels.ops.contrastive import (
    SimLSE,
    _acc,
    _as_scalar,
    _bias_gradient,
    _check_features,
    _check_given,
    _check_index,
    _check_scalars,
    _check_smoothing,
    _check_tensors,
    _labels_of,
    _like,
    _logit_gradients,
    _merged,
    _scalar,
)

__all__ = ["CLIPLoss", "InfoNCELoss", "SigLIPLoss", "info_nce", "sigmoid_contrastive", "sim_lse"]

EXCHANGES = ("gather", "ring")


@dataclass(frozen=True)
class _Plan:
    agreed: Agreed
    exchange: str
    cols: bool = True


#: makes x, y, the scale and the bias from what the user gave; may raise
_Inputs = Callable[[], tuple[Tensor, Tensor, "float | Tensor", "float | Tensor | None"]]


@dataclass(frozen=True)
class _Arguments:
    """A call's arguments, checked."""

    agreed: Agreed
    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor | None
    labels: Tensor | None
    exclude: Tensor | None


def _agree(
    op: str, settings: str, inputs: _Inputs, process_group: dist.ProcessGroup | None, exchange: str,
    indices: Callable[[int, int, torch.device], tuple[Tensor | None, Tensor | None, int]],
) -> _Arguments:  # fmt: skip
    """Check this process's arguments, and whether they go with those of the others.

    `indices` makes labels, exclude, and the number of pairs from the numbers of rows and columns. No argument is
    looked at outside of `check`: an error there would keep this process from telling the others.
    """
    group = _collectives.resolve(op, process_group)
    found: list[Any] = []

    def check() -> Call:
        if exchange not in EXCHANGES:
            raise ValueError(f"{op}: exchange is {exchange!r}; expected 'gather' or 'ring'")
        x, y, logit_scale, logit_bias = inputs()
        _check_tensors(op, x=x, y=y)
        rows, columns = _check_features(op, x, y)
        if group.size > 1 and x.device.type not in group.device_types:
            have = " and ".join(group.device_types)
            raise ValueError(f"{op}: x is on {x.device}; expected {have}, which process_group has backends for")
        scale = _as_scalar(op, "logit_scale", logit_scale, x)
        bias = None if logit_bias is None else _as_scalar(op, "logit_bias", logit_bias, x)
        _check_scalars(op, logit_scale=scale, logit_bias=bias)
        labels, exclude, pairs = indices(rows, columns, x.device)
        check_device(op, x.device, y=y, logit_scale=scale, logit_bias=bias, labels=labels, exclude=exclude)
        found.extend((x, y, scale, bias, _own(labels, columns), _own(exclude, columns)))
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, scale, bias))
        given = f"exchange={exchange!r}, {settings}, logit_bias={bias is not None}"
        return Call(given, rows, columns, x.shape[1], x.dtype, pairs, x.requires_grad, y.requires_grad, recorded)

    agreed = _collectives.agree(op, group, check)
    return _Arguments(agreed, *found)


def _own(index: Tensor | None, columns: int) -> Tensor | None:
    """-1 for what is no column of this process, also where that could not be checked: shifted, it were another's."""
    return None if index is None else torch.where((index >= 0) & (index < columns), index, -1)


def _shifted(index: Tensor | None, first: int) -> Tensor | None:
    """Own columns as columns of all processes' y; -1, none, stays."""
    return None if index is None else torch.where(index >= 0, index + first, -1)


# ---- differentiated once --------------------------------------------------------------------------------------------


class _Refusal(torch.autograd.Function):
    """A gradient that is no constant, and cannot be differentiated either."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, recorded: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("the losses of tlkernels.distributed may be differentiated once: this is their gradient's")


def _once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A backward pass whose results raise when they are differentiated.

    torch's `once_differentiable` does so only where the incoming gradient is a function of something; a second
    derivative would then take the features' part for a constant, and be wrong in silence.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        recorded = torch.zeros((), requires_grad=True)
        return tuple(None if grad is None else _Refusal.apply(grad, recorded) for grad in found)

    return run


# ---- log-sum-exps ---------------------------------------------------------------------------------------------------


def _nll_of_more(nll: Tensor, target: Tensor, others: Tensor, chosen: Tensor) -> Tensor:
    """The nll when its sum goes on over `others`. What it was is kept exactly where they add nothing."""
    return torch.where(chosen, _merged(nll, others - target), torch.zeros_like(nll))


class _SimLSE(torch.autograd.Function):
    """`sim_lse` of this process's rows with all columns, of all rows with this process's columns, and its pairs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, labels: Tensor | None,
        exclude: Tensor | None, plan: _Plan,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        agreed, cols = plan.agreed, plan.cols
        first, count = agreed.first, agreed.own.columns
        others_row: Tensor | None = None
        others_col: Tensor | None = None
        if plan.exchange == "gather":
            ys = _collectives.gather_rows(y, agreed.columns, agreed.group)
            row, col, nll_row, nll_col = call(
                "sim_lse", x, ys, scale, bias, _shifted(labels, first), _shifted(exclude, first), cols=cols
            )
            if cols:
                others_col = _collectives.lse_of_others(col, agreed.group, first, count)
                col = col[first : first + count]
        else:
            ys = y
            own: list[Tensor] = []

            def visit(owner: int, chunk: Sequence[Tensor]) -> Tensor | None:
                nonlocal others_row
                mine = owner == agreed.group.rank
                indices = (labels, exclude) if mine else (None, None)
                tile = call("sim_lse", x, chunk[0], scale, bias, *indices, cols=cols)
                if mine:
                    own.extend(tile)
                    return None
                others_row = tile[0] if others_row is None else _merged(others_row, tile[0])
                return tile[1] if cols else None

            others_col = _collectives.ring([y], agreed.columns, agreed.group, visit, _merged)
            row, col, nll_row, nll_col = own

        if labels is not None:
            chosen = labels >= 0
            target = row - nll_row
            if exclude is not None:
                # a sum over nothing: the logit is lost in it
                column = labels.clamp(0, max(count - 1, 0))
                logit = x.new_zeros(x.shape[0], dtype=row.dtype)
                if count:
                    logit = scale.reshape(()).to(row.dtype) * (x.to(row.dtype) * y[column].to(row.dtype)).sum(1)
                logit = logit if bias is None else logit + bias.reshape(()).to(row.dtype)
                target = torch.where(row == -torch.inf, logit, target)
            if others_row is not None:
                nll_row = _nll_of_more(nll_row, target, others_row, chosen)
            if others_col is not None and count:
                nll_col = _nll_of_more(nll_col, target, others_col[labels.clamp(min=0)], chosen)
        if others_row is not None:
            row = _merged(row, others_row)
        if others_col is not None:
            col = _merged(col, others_col)
        ctx.plan = plan
        ctx.save_for_backward(x, ys, scale, bias, labels, exclude, row, col)
        return row, col, nll_row, nll_col

    @staticmethod
    @_once
    def backward(ctx: Any, of_row: Tensor, of_col: Tensor, of_nll_row: Tensor, of_nll_col: Tensor) -> Any:
        x, ys, scale, bias, labels, exclude, row, col = ctx.saved_tensors
        agreed, cols = ctx.plan.agreed, ctx.plan.cols
        group, count = agreed.group, agreed.own.columns
        need_x, need_y = ctx.needs_input_grad[0], agreed.grad_y
        needs = {"need_x": need_x, "need_y": need_y}

        grad_row, grad_col, grad_pair = _logit_gradients(
            labels, count, of_row, of_col if cols else None, of_nll_row, of_nll_col
        )
        columns = torch.stack([col, grad_col], 1) if grad_col is not None else None

        def tile(y: Tensor, of_columns: Tensor | None, shift: int | None) -> Any:
            lse_col, weight = (None, None) if of_columns is None else (c.contiguous() for c in of_columns.unbind(1))
            target, without, of_pair = None, None, None
            if shift is not None:
                target, without, of_pair = _shifted(labels, shift), _shifted(exclude, shift), grad_pair
            return call(
                "sim_lse_backward", x, y, scale, bias, target, without, row, lse_col, grad_row, weight, of_pair, **needs
            )

        if ctx.plan.exchange == "gather":
            all_columns = None if columns is None else _collectives.gather_rows(columns, agreed.columns, group)
            grad_x, grad_y, grad_scale = tile(ys, all_columns, agreed.first)
            if need_y:
                grad_y = _collectives.reduce_scatter_rows(grad_y.to(_acc(x.dtype)), agreed.columns, group)
        else:

            def visit(own: bool, chunk: Sequence[Tensor]) -> Any:
                return tile(chunk[0], chunk[1] if cols else None, 0 if own else None)

            chunk = [ys] if columns is None else [ys, columns]
            grad_x, grad_y, grad_scale = _around(agreed, chunk, x, need_x, need_y, visit)

        grad_bias = _bias_gradient(row, col, grad_row, grad_col, grad_pair)
        return _gradients(ctx, group, (x, scale, bias), grad_x, grad_y, torch.stack([grad_scale, grad_bias]))


def _around(
    agreed: Agreed, chunk: Sequence[Tensor], x: Tensor, need_x: bool, need_y: bool,
    tile: Callable[[bool, Sequence[Tensor]], tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of x, of this process's y, and of scalars, summed over the tiles of a ring.

    `tile` makes the three for a chunk, and is told whether it is this process's own.
    """
    acc = _acc(x.dtype)
    grad_x = x.new_zeros(x.shape, dtype=acc) if need_x else None
    own_y: list[Tensor] = []
    scalars: list[Tensor] = []

    def visit(owner: int, held: Sequence[Tensor]) -> Tensor | None:
        own = owner == agreed.group.rank
        of_x, of_y, of_scalars = tile(own, held)
        scalars.append(of_scalars)
        if grad_x is not None:
            grad_x.add_(of_x)
        if not need_y:
            return None
        if own:
            own_y.append(of_y.to(acc))
            return None
        return of_y.to(acc)

    others = _collectives.ring(chunk, agreed.columns, agreed.group, visit, torch.add)
    grad_y = own_y[0] if own_y else None
    if grad_y is not None and others is not None:
        grad_y = grad_y + others
    return grad_x, grad_y, torch.stack(scalars).sum(0)


def _gradients(
    ctx: Any, group: _collectives.Group, like: tuple[Tensor, Tensor, Tensor | None], grad_x: Tensor | None,
    grad_y: Tensor | None, grad_scalars: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """Of x, y, scale and bias, and None for the rest. The scalars' are averaged on every process, wanted or not."""
    x, scale, bias = like
    needs = ctx.needs_input_grad
    of_scale, of_bias = (_collectives.sum_over_ranks(grad_scalars, group) / group.size).unbind()
    return (
        grad_x.to(x.dtype) if needs[0] and grad_x is not None else None,
        grad_y.to(x.dtype) if needs[1] and grad_y is not None else None,
        _like(of_scale, scale) if needs[2] else None,
        _like(of_bias, bias) if bias is not None and needs[3] else None,
        *[None] * (len(needs) - 4),
    )


# ---- mean logits ----------------------------------------------------------------------------------------------------


class _MeanLogits(torch.autograd.Function):
    """The mean logit of each of this process's rows over all columns, and of each of its columns over all rows.

    They are logits with the mean y and the mean x, so only sums of features cross the network.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, plan: _Plan
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        agreed, acc = plan.agreed, _acc(x.dtype)
        sums = torch.stack([y.sum(0, dtype=acc), x.sum(0, dtype=acc)])
        mean_y, mean_x = _collectives.sum_over_ranks(sums, agreed.group) / _counts(agreed, sums)
        ctx.agreed = agreed
        ctx.save_for_backward(x, y, scale, bias, mean_x, mean_y)
        with no_autocast(x.device):
            of_rows, of_cols = x.to(acc) @ mean_y, y.to(acc) @ mean_x
            factor, offset = _scalar(scale, sums), _scalar(bias, sums)
            return factor * of_rows + offset, factor * of_cols + offset

    @staticmethod
    @_once
    def backward(ctx: Any, of_row: Tensor, of_col: Tensor) -> Any:
        x, y, scale, bias, mean_x, mean_y = ctx.saved_tensors
        agreed, factor = ctx.agreed, _scalar(scale, of_row)
        with no_autocast(x.device):
            weighted = torch.stack([of_row @ x.to(of_row.dtype), of_col @ y.to(of_row.dtype)])
            of_scale = (weighted * torch.stack([mean_y, mean_x])).sum()
        # what all processes' rows ask of the mean y, and all columns of the mean x
        to_y, to_x = _collectives.sum_over_ranks(weighted, agreed.group) / _counts(agreed, weighted)
        grad_x = factor * (of_row[:, None] * mean_y + to_x)
        grad_y = factor * (of_col[:, None] * mean_x + to_y)
        scalars = torch.stack([of_scale, of_row.sum() + of_col.sum()])
        return _gradients(ctx, agreed.group, (x, scale, bias), grad_x, grad_y, scalars)


def _counts(agreed: Agreed, like: Tensor) -> Tensor:
    """[2, 1], the number of columns and of rows of all processes."""
    rows = sum(c.rows for c in agreed.calls)
    return like.new_tensor([[max(sum(agreed.columns), 1)], [max(rows, 1)]])


# ---- the sigmoid loss -----------------------------------------------------------------------------------------------


class _SigmoidSum(torch.autograd.Function):
    """The sum of the sigmoid loss over this process's rows and all columns."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, labels: Tensor, plan: _Plan
    ) -> Tensor:  # fmt: skip
        agreed = plan.agreed
        ctx.plan = plan
        if plan.exchange == "gather":
            ys = _collectives.gather_rows(y, agreed.columns, agreed.group)
            inputs = (x, ys, scale, bias, _shifted(labels, agreed.first))
            ctx.made = agreed.own.recorded and x.dtype != torch.float16
            if not ctx.made:
                # float16: the gradient of the sum may leave its range, where that of the mean does not
                ctx.save_for_backward(*inputs)
                return call("sigmoid_contrastive", *inputs).sum()
            # from the same tiles; the backward pass scales it, and needs no features
            loss, *grads = call("sigmoid_contrastive_sum", *inputs, need_x=agreed.own.grad_x, need_y=agreed.grad_y)
            ctx.save_for_backward(x, scale, bias, *grads)
            return loss
        total = x.new_zeros(x.shape[0], dtype=_acc(x.dtype))

        def visit(owner: int, chunk: Sequence[Tensor]) -> None:
            nonlocal total
            target = labels if owner == agreed.group.rank else None
            total = total + call("sigmoid_contrastive", x, chunk[0], scale, bias, target)

        _collectives.ring([y], agreed.columns, agreed.group, visit, torch.add)
        ctx.save_for_backward(x, y, scale, bias, labels)
        return total.sum()

    @staticmethod
    @_once
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        agreed = ctx.plan.agreed
        group, need_x, need_y = agreed.group, ctx.needs_input_grad[0], agreed.grad_y
        if ctx.plan.exchange == "gather":
            if ctx.made:
                x, scale, bias, of_x, of_y, of_scale, of_bias = ctx.saved_tensors
                factor = grad_loss
            else:
                x, ys, scale, bias, labels = ctx.saved_tensors
                of_x, of_y, of_scale, of_bias = call(
                    "sigmoid_contrastive_backward", x, ys, scale, bias, labels,
                    grad_loss.expand(x.shape[0]).contiguous(), need_x=need_x, need_y=need_y,
                )  # fmt: skip
                factor = torch.ones_like(grad_loss)
            grad_x = of_x * factor if need_x else None
            grad_y = None
            if need_y:
                grad_y = _collectives.reduce_scatter_rows(of_y.to(factor.dtype) * factor, agreed.columns, group)
            scalars = torch.stack([of_scale, of_bias]) * factor
            return _gradients(ctx, group, (x, scale, bias), grad_x, grad_y, scalars)

        x, y, scale, bias, labels = ctx.saved_tensors
        weights = grad_loss.expand(x.shape[0]).contiguous()

        def visit(own: bool, chunk: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            of_x, of_y, of_scale, of_bias = call(
                "sigmoid_contrastive_backward", x, chunk[0], scale, bias, labels if own else None, weights,
                need_x=need_x, need_y=need_y,
            )  # fmt: skip
            return of_x, of_y, torch.stack([of_scale, of_bias])

        grad_x, grad_y, scalars = _around(agreed, [y], x, need_x, need_y, visit)
        return _gradients(ctx, group, (x, scale, bias), grad_x, grad_y, scalars)


# ---- public functions -----------------------------------------------------------------------------------------------


class _Mean(torch.autograd.Function):
    """The sum over all processes divided by `count`: one number, which all processes return."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: _collectives.Group, count: int) -> Tensor:
        ctx.group, ctx.count = group, count
        return _collectives.sum_over_ranks(local, group) / count

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _collectives.sum_over_ranks(grad, ctx.group) / ctx.count, None, None


def _of_batch(local: Tensor, agreed: Agreed, count: int, local_loss: bool) -> Tensor:
    """From the sum over this process's rows what it returns: its share, or the mean over the whole batch."""
    count = max(count, 1)
    if local_loss:
        return local * (agreed.group.size / count)
    return _Mean.apply(local, agreed.group, count)


def sim_lse(
    x: Tensor, y: Tensor, logit_scale: float | Tensor = 1.0, logit_bias: float | Tensor | None = None, *,
    labels: Tensor | None = None, exclude: Tensor | None = None, cols: bool = True,
    process_group: dist.ProcessGroup | None = None, exchange: str = "gather",
) -> SimLSE:  # fmt: skip
    r"""Log-sum-exps of the rows and columns of the similarities of all processes' x with all processes' y.

    The block that the softmax losses of this module are made of. Each process gets the values of its own rows and its
    own columns, and every function of them has exact gradients.

    Parameters
    ----------
    x : Tensor [N, D], float32, bfloat16, float16 or float64
        This process's part; parts may differ in size, and be empty.
    y : Tensor [M, D] of x's dtype
        This process's part, of its own size.
    logit_scale : float or Tensor of one element
        The same on all processes, as the bias.
    logit_bias : float or Tensor of one element, optional
    labels : int64 Tensor [N], optional
        For each row of x the row *of this process's y* that belongs to it; a negative entry means none.
    exclude : int64 Tensor [N], optional
        A row of this process's y that the sum leaves out, for each row; a negative entry means none.
    cols : bool
        Whether the columns' sums are wanted too.
    process_group : ProcessGroup, optional
        Default: all processes. Where torch.distributed is not initialized, and no launcher says that there are more
        processes, this one alone.
    exchange : "gather" or "ring"
        How the features meet: see the top of the module.

    Returns
    -------
    SimLSE
        (row [N], col [M], nll_row [N], nll_col [N]), as `tlkernels.ops.sim_lse` returns them for the whole batch, of it
        this process's part. float32, float64 for float64.

    Raises
    ------
    TypeError, ValueError, IndexError, RuntimeError
        Naming the argument. A wrong call on one process, and processes that do not agree on D, dtype or the other
        arguments, raise on all of them. Differentiating twice raises.

    Notes
    -----
    All processes of the group must call it, and run the backward pass, which communicates too, in the same order. It
    differentiates the sum over processes; the scale and the bias get the mean over processes, the same on each.
    """
    op = "sim_lse"

    def indices(rows: int, columns: int, device: torch.device) -> tuple[Tensor | None, Tensor | None, int]:
        _check_given(op, device, labels=labels, exclude=exclude)
        _check_index(op, "labels", labels, rows, columns)
        _check_index(op, "exclude", exclude, rows, columns)
        return labels, exclude, rows

    given = f"cols={cols}, labels={labels is not None}, exclude={exclude is not None}"
    a = _agree(op, given, lambda: (x, y, logit_scale, logit_bias), process_group, exchange, indices)
    return _run_sim_lse(a, exchange, cols)


def _run_sim_lse(a: _Arguments, exchange: str, cols: bool) -> SimLSE:
    return SimLSE(*_SimLSE.apply(a.x, a.y, a.scale, a.bias, a.labels, a.exclude, _Plan(a.agreed, exchange, cols)))


def info_nce(
    x: Tensor, y: Tensor, logit_scale: float | Tensor = 1.0, logit_bias: float | Tensor | None = None,
    labels: Tensor | None = None, *, symmetric: bool = True, decoupled: bool = False, label_smoothing: float = 0.0,
    ignore_index: int = -100, local_loss: bool = True, process_group: dist.ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:  # fmt: skip
    r"""InfoNCE, and CLIP's loss where `symmetric`, over the batch of all processes.

    Parameters
    ----------
    x : Tensor [N, D], float32, bfloat16, float16 or float64
        This process's anchors. Features are used as they are: normalize them for cosine similarity. Parts may differ
        in size, and be empty.
    y : Tensor [M, D] of x's dtype
        This process's candidates; rows that no label names are negatives of all anchors of all processes.
    logit_scale : float or Tensor of one element
        What similarities are multiplied with. The same on all processes, as the bias. Differentiable.
    logit_bias : float or Tensor of one element, optional
        It cancels.
    labels : integer Tensor [N], optional
        The row *of this process's y* that belongs to each row of x; default arange(N). Rows with `ignore_index` stay
        among the negatives of others, and count in no mean.
    symmetric : bool
        Also each y of a pair among all x, and the mean of both directions.
    decoupled : bool
        Leave the positive out of the sums (DCL).
    label_smoothing : float in [0, 1]
        The weight that is spread evenly over all candidates of all processes.
    ignore_index : int
        Negative, or a label that does not occur.
    local_loss : bool
        Return this process's share, as open_clip's ``local_loss=True, gather_with_grad=True``; else the mean over the
        whole batch, the same on every process. Gradients are the same.
    process_group : ProcessGroup, optional
        Default: all processes; where torch.distributed is not initialized, and no launcher says that there are more
        processes, this one alone.
    exchange : "gather" or "ring"
        How the features meet: see the top of the module.

    Returns
    -------
    Tensor
        0-d, float32 (float64 for float64). Of no pairs on any process it is 0.

    Raises
    ------
    TypeError, ValueError, IndexError, RuntimeError
        Naming the argument. A wrong call on one process, and processes that do not agree on D, dtype or the other
        arguments, raise on all of them. Differentiating twice raises.

    Notes
    -----
    .. math:: L_p = \frac{W}{N} \sum_{i \text{ of } p} \frac12 \left( \log \sum_j e^{z_{ij} - z_{i \ell_i}}
        + \log \sum_k e^{z_{k \ell_i} - z_{i \ell_i}} \right)

    with N the number of pairs of all W processes, and sums over the whole batch. All processes of the group must call
    it, and run the backward pass, which communicates too, in the same order.

    References
    ----------
    van den Oord 2018 (InfoNCE); Radford 2021 (CLIP); Yeh 2022 (DCL: `decoupled`); Cheng 2024 (Inf-CL: the ring).

    Examples
    --------
    >>> import torch
    >>> from tlkernels.distributed import info_nce
    >>> info_nce(torch.ones(4, 8), torch.ones(4, 8), exchange="ring")  # one process; log(4): all alike
    tensor(1.3863)
    """
    return _info_nce(
        "info_nce", lambda: (x, y, logit_scale, logit_bias), labels, symmetric=symmetric, decoupled=decoupled,
        label_smoothing=label_smoothing, ignore_index=ignore_index, local_loss=local_loss,
        process_group=process_group, exchange=exchange,
    )  # fmt: skip


def _info_nce(
    op: str, inputs: _Inputs, labels: Tensor | None = None, *, symmetric: bool = True, decoupled: bool = False,
    label_smoothing: float = 0.0, ignore_index: int = -100, local_loss: bool,
    process_group: dist.ProcessGroup | None, exchange: str,
) -> Tensor:  # fmt: skip
    def indices(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor | None, int]:
        _check_smoothing(op, label_smoothing)
        target = _targets(op, rows, columns, labels, ignore_index, device)
        return target, target if decoupled else None, rows if labels is None else int((target >= 0).sum())

    given = f"symmetric={symmetric}, decoupled={decoupled}, label_smoothing={label_smoothing}, local_loss={local_loss}"
    a = _agree(op, given, inputs, process_group, exchange, indices)
    lse = _run_sim_lse(a, exchange, symmetric)
    of_rows, of_cols = lse.nll_row, lse.nll_col
    if label_smoothing > 0.0 and a.labels is not None:
        chosen, zero = a.labels >= 0, of_rows.new_zeros(())
        mean_row, mean_col = _MeanLogits.apply(a.x, a.y, a.scale, a.bias, _Plan(a.agreed, exchange))
        smooth = lse.row - mean_row
        of_rows = torch.where(chosen, (1.0 - label_smoothing) * of_rows + label_smoothing * smooth, zero)
        if symmetric and a.agreed.own.columns:
            smooth = (lse.col - mean_col)[a.labels.clamp(min=0)]
            of_cols = torch.where(chosen, (1.0 - label_smoothing) * of_cols + label_smoothing * smooth, zero)
    loss = 0.5 * (of_rows.sum() + of_cols.sum()) if symmetric else of_rows.sum()
    return _of_batch(loss, a.agreed, sum(c.pairs for c in a.agreed.calls), local_loss)


def _targets(
    op: str, rows: int, columns: int, labels: Tensor | None, ignore_index: int, device: torch.device
) -> Tensor:  # fmt: skip
    """Labels as the ops want them, -1 for none; rows of this process's y."""
    target = _labels_of(op, rows, columns, labels, 0, ignore_index, device)
    _check_index(op, "labels", target, rows, columns)
    return target


def sigmoid_contrastive(
    x: Tensor, y: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor, *, labels: Tensor | None = None,
    ignore_index: int = -100, local_loss: bool = True, process_group: dist.ProcessGroup | None = None,
    exchange: str = "gather",
) -> Tensor:  # fmt: skip
    r"""The pairwise sigmoid loss of SigLIP over the batch of all processes.

    Parameters
    ----------
    x : Tensor [N, D], float32, bfloat16, float16 or float64
        This process's part. Parts may differ in size, and be empty.
    y : Tensor [M, D] of x's dtype
    logit_scale, logit_bias : float or Tensor of one element
        SigLIP starts from 10 and -10. The same on all processes.
    labels : integer Tensor [N], optional
        The row *of this process's y* that belongs to each row of x; default arange(N). With `ignore_index` a row has
        negatives only.
    ignore_index : int
    local_loss : bool
        Return this process's share, as open_clip does; else the mean over the whole batch, the same on every process.
        Gradients are the same.
    process_group : ProcessGroup, optional
        Default: all processes; where torch.distributed is not initialized, and no launcher says that there are more
        processes, this one alone.
    exchange : "gather" or "ring"
        How the features meet. "gather" makes the gradient in the forward pass, from the same tiles; "ring" makes the
        tiles again.

    Returns
    -------
    Tensor
        0-d, float32 (float64 for float64). Of no rows on any process it is 0.

    Raises
    ------
    TypeError, ValueError, IndexError, RuntimeError
        Naming the argument. A wrong call on one process, and processes that do not agree on D, dtype or the other
        arguments, raise on all of them. Differentiating twice raises.

    Notes
    -----
    .. math:: L_p = \frac{W}{N} \sum_{i \text{ of } p} \sum_j \log(1 + e^{-\sigma_{ij} (s \, x_i \cdot y_j + b)}),
        \qquad \sigma_{ij} = 2 [j = \ell_i] - 1

    with N the rows of all W processes, and j over the whole batch. All processes of the group must call it, and run
    the backward pass, which communicates too, in the same order.

    References
    ----------
    Zhai 2023 (SigLIP).
    """
    return _sigmoid_contrastive(
        "sigmoid_contrastive", lambda: (x, y, logit_scale, logit_bias), labels, ignore_index=ignore_index,
        local_loss=local_loss, process_group=process_group, exchange=exchange,
    )  # fmt: skip


def _sigmoid_contrastive(
    op: str, inputs: _Inputs, labels: Tensor | None = None, *, ignore_index: int = -100, local_loss: bool,
    process_group: dist.ProcessGroup | None, exchange: str,
) -> Tensor:  # fmt: skip
    def indices(rows: int, columns: int, device: torch.device) -> tuple[Tensor, None, int]:
        return _targets(op, rows, columns, labels, ignore_index, device), None, rows

    def complete() -> tuple[Tensor, Tensor, float | Tensor, float | Tensor]:
        x, y, logit_scale, logit_bias = inputs()
        return x, y, logit_scale, 0.0 if logit_bias is None else logit_bias

    a = _agree(op, f"local_loss={local_loss}", complete, process_group, exchange, indices)
    loss = _SigmoidSum.apply(a.x, a.y, a.scale, a.bias, a.labels, _Plan(a.agreed, exchange))
    return _of_batch(loss, a.agreed, sum(c.rows for c in a.agreed.calls), local_loss)


# ---- modules --------------------------------------------------------------------------------------------------------


def _options(op: str, local_loss: bool, process_group: dist.ProcessGroup | None, exchange: str) -> dict[str, Any]:
    if exchange not in EXCHANGES:
        raise ValueError(f"{op}: exchange is {exchange!r}; expected 'gather' or 'ring'")
    return {"local_loss": local_loss, "process_group": process_group, "exchange": exchange}


def _shown(options: dict[str, Any]) -> str:
    return f"exchange={options['exchange']!r}, local_loss={options['local_loss']}"


class CLIPLoss(nn.Module):
    """CLIP's loss over the batch of all processes.

    `tlkernels.nn.CLIPLoss` where there are several; called like it, and like open_clip's ``ClipLoss``.

    Parameters
    ----------
    local_loss : bool
        Return this process's share, as open_clip's ``local_loss=True``; else the mean over the whole batch, the same
        on every process. Gradients are the same.
    process_group : ProcessGroup, optional
        Default: all processes; where torch.distributed is not initialized, and no launcher says that there are more
        processes, this one alone. open_clip's ``rank`` and ``world_size`` are read from it.
    exchange : "gather" or "ring"
        How the features meet: see the top of the module.

    Raises
    ------
    ValueError
        If `exchange` is neither.

    Notes
    -----
    Gradients always cross processes, open_clip's ``gather_with_grad=True``. `info_nce` has the equation.

    References
    ----------
    Radford 2021.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.distributed import CLIPLoss
    >>> features = torch.nn.functional.normalize(torch.ones(4, 8), dim=1)
    >>> CLIPLoss()(features, features, logit_scale=torch.tensor(10.0))  # one process; log(4): all alike
    tensor(1.3863)
    """

    def __init__(
        self, *, local_loss: bool = True, process_group: dist.ProcessGroup | None = None, exchange: str = "gather"
    ) -> None:  # fmt: skip
        super().__init__()
        self.options = _options("CLIPLoss", local_loss, process_group, exchange)

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Compute the loss. All processes of the group must call it, and run the backward pass.

        Parameters
        ----------
        image_features, text_features : Tensor [N, D], float32, bfloat16, float16 or float64
            This process's part, in pairs; of one dtype, unless under autocast. Used as they are: CLIP normalizes in its
            model. Parts may differ in size, and be empty.
        logit_scale : float or Tensor of one element
            The factor itself, ``model.logit_scale.exp()``.
        logit_bias : float or Tensor of one element, optional
        output_dict : bool
            Return ``{"contrastive_loss": loss}``.

        Returns
        -------
        Tensor, or dict of it
            0-d.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            Naming the argument, or what the processes do not agree on: on all of them.
        """
        inputs = _paired("CLIPLoss", image_features, text_features, logit_scale, logit_bias)
        loss = _info_nce("CLIPLoss", inputs, **self.options)
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return _shown(self.options)


class SigLIPLoss(nn.Module):
    """SigLIP's loss over the batch of all processes.

    `tlkernels.nn.SigLIPLoss` where there are several; called like it, and like open_clip's ``SigLipLoss``.

    Parameters
    ----------
    local_loss : bool
        Return this process's share, as open_clip does; else the mean over the whole batch, the same on every process.
        Gradients are the same.
    process_group : ProcessGroup, optional
        As in `CLIPLoss`.
    exchange : "gather" or "ring"
        How the features meet: "gather" is open_clip's ``dist_impl="gather"``, "ring" its "shift".

    Raises
    ------
    ValueError
        If `exchange` is neither.

    Notes
    -----
    `sigmoid_contrastive` has the equation.

    References
    ----------
    Zhai 2023.
    """

    def __init__(
        self, *, local_loss: bool = True, process_group: dist.ProcessGroup | None = None, exchange: str = "gather"
    ) -> None:  # fmt: skip
        super().__init__()
        self.options = _options("SigLIPLoss", local_loss, process_group, exchange)

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Compute the loss; arguments, result and errors are those of `CLIPLoss`, a `logit_bias` of None is 0."""
        inputs = _paired("SigLIPLoss", image_features, text_features, logit_scale, logit_bias)
        loss = _sigmoid_contrastive("SigLIPLoss", inputs, **self.options)
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return _shown(self.options)


def _paired(
    op: str, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
) -> _Inputs:  # fmt: skip
    def inputs() -> tuple[Tensor, Tensor, float | Tensor, float | Tensor | None]:
        one_process._check_paired(op, image_features=image_features, text_features=text_features)
        x, y = (one_process._ready(t, False) for t in (image_features, text_features))
        return x, y, logit_scale, logit_bias

    return inputs


class InfoNCELoss(one_process.InfoNCELoss):
    """InfoNCE over the batch of all processes: each query finds its key among the keys of all.

    `tlkernels.nn.InfoNCELoss` where there are several processes.

    Parameters
    ----------
    temperature : float > 0
        Where it starts from, with `learnable_temperature`.
    normalize : bool
        Divide all vectors by their length, so that similarities are cosines.
    symmetric : bool
        Also the other direction, each key among all queries, and the mean of both.
    decoupled : bool
        Leave the positive out of the sums (DCL).
    label_smoothing : float in [0, 1]
        The weight that is spread evenly over all candidates of all processes.
    learnable_temperature, max_logit_scale
        See `tlkernels.nn.InfoNCELoss`. The gradient of the parameter is the same on all processes, so that it stays so
        also where the loss is not in DDP.
    local_loss, process_group, exchange
        See `CLIPLoss`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    `info_nce` has the equation.

    References
    ----------
    van den Oord 2018; Karpukhin 2020 (DPR, negatives of all processes); Yeh 2022 (`decoupled`).
    """

    def __init__(
        self, temperature: float = 0.1, *, normalize: bool = True, symmetric: bool = False, decoupled: bool = False,
        label_smoothing: float = 0.0, learnable_temperature: bool = False, max_logit_scale: float = 100.0,
        local_loss: bool = True, process_group: dist.ProcessGroup | None = None, exchange: str = "gather",
    ) -> None:  # fmt: skip
        super().__init__(
            temperature, normalize=normalize, symmetric=symmetric, label_smoothing=label_smoothing,
            learnable_temperature=learnable_temperature, max_logit_scale=max_logit_scale,
        )  # fmt: skip
        self.decoupled = decoupled
        self.options = _options("InfoNCELoss", local_loss, process_group, exchange)

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        """Compute the loss. All processes of the group must call it, and run the backward pass.

        Parameters
        ----------
        query, positive_key : Tensor [N, D], float32, bfloat16, float16 or float64
            This process's part, in pairs; of one dtype, unless under autocast. Parts may differ in size, and be empty.
        negative_keys : Tensor [M, D], optional
            Keys of no query (hard negatives), with which the queries of all processes are compared besides.

        Returns
        -------
        Tensor
            0-d.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            Naming the argument, or what the processes do not agree on: on all of them.
        """
        op = "InfoNCELoss"

        def inputs() -> tuple[Tensor, Tensor, float | Tensor, None]:
            one_process._check_paired(op, query=query, positive_key=positive_key)
            x, y = (one_process._ready(t, self.normalize) for t in (query, positive_key))
            if negative_keys is not None:
                one_process._check_matrices(op, query=query, negative_keys=negative_keys)
                y = torch.cat([y, one_process._ready(negative_keys, self.normalize)])
            return x, y, self._scale(), None

        return _info_nce(
            op, inputs, symmetric=self.symmetric, decoupled=self.decoupled, label_smoothing=self.label_smoothing,
            **self.options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        shown = f"{super().extra_repr()}, decoupled=True" if self.decoupled else super().extra_repr()
        return f"{shown}, {_shown(self.options)}"
