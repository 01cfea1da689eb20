r"""Contrastive losses: log-sum-exps over rows and columns of a similarity matrix that is never stored.

With features :math:`x` (``[N, D]``), :math:`y` (``[M, D]``), a scale :math:`s` and a bias :math:`b`, every loss here is
a function of

.. math::
    z_{ij} = s \, x_i \cdot y_j + b, \qquad
    r_i = \log \sum_j e^{z_{ij}}, \qquad c_j = \log \sum_i e^{z_{ij}},

    \frac{\partial L}{\partial z_{ij}} = G_{ij} = \frac{\partial L}{\partial r_i} e^{z_{ij} - r_i}
    + \frac{\partial L}{\partial c_j} e^{z_{ij} - c_j} + \pi_i \, [j = \ell_i], \qquad
    dx = s \, G y, \quad dy = s \, G^T x, \quad ds = \sum_{ij} G_{ij} \, x_i \cdot y_j,

or, for the sigmoid loss, of :math:`\log(1 + e^{\mp z_{ij}})`. Two ops are the kernels behind all softmax losses:
``sim_lse`` makes r and c in one pass of tiles, with the logit of each row's label from the same accumulation;
``sim_lse_backward`` makes the tiles again and feeds them to both gradient products. InfoNCE, CLIP, NT-Xent, MoCo,
SupCon and their forms across processes are O(N) arithmetic on their results. 8 N M D flops forward and backward; the
state kept for the backward pass is the inputs and O(N + M) statistics.

Logits, exponentials and sums are float32 (float64 for float64), whatever the features' dtype; losses and log-sum-exps
are returned so. Gradients of features are rounded once, to the features' dtype; where the machine multiplies 16-bit
numbers (AVX-512 BF16, GPUs), G is one factor of these products and is rounded to it as well, which is one more rounding
error of 2^-9 an element before the sum. The gradients of scale and bias are summed from G before that.

Aaron van den Oord et al. *Representation Learning with Contrastive Predictive Coding.* arXiv:1807.03748 (InfoNCE).
Alec Radford et al. *Learning Transferable Visual Models From Natural Language Supervision.* ICML 2021 (CLIP).
Ting Chen et al. *A Simple Framework for Contrastive Learning of Visual Representations.* ICML 2020 (NT-Xent).
Prannay Khosla et al. *Supervised Contrastive Learning.* NeurIPS 2020 (SupCon).
Xiaohua Zhai et al. *Sigmoid Loss for Language Image Pre-Training.* ICCV 2023 (SigLIP).
Chun-Hsiao Yeh et al. *Decoupled Contrastive Learning.* ECCV 2022 (DCL).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tlkernels.ops._common import batch_of_rows, check_device, check_float, name_of, no_autocast
from tlkernels.ops._registry import call, define, not_differentiable

__all__ = ["SimLSE", "info_nce", "lse_merge", "nt_xent", "sigmoid_contrastive", "sim_lse", "sup_con"]


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ---- argument checks ------------------------------------------------------------------------------------------------


def _check_tensors(op: str, **arguments: Any) -> None:
    for name, t in arguments.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is {type(t).__name__}; expected a tensor")


def _check_given(op: str, device: torch.device, **arguments: Any) -> None:
    """What may be None is a tensor on the device where it is not."""
    given = {name: t for name, t in arguments.items() if t is not None}
    _check_tensors(op, **given)
    check_device(op, device, **given)


def _check_features(op: str, x: Tensor, y: Tensor | None) -> tuple[int, int]:
    """N and M."""
    _check_tensors(op, x=x)
    check_float(op, x=x)
    if x.dim() != 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (N, D)")
    if y is None:
        return x.shape[0], x.shape[0]
    _check_tensors(op, y=y)
    if y.dtype != x.dtype:
        raise TypeError(f"{op}: y has dtype {name_of(y.dtype)}; expected {name_of(x.dtype)}, like x")
    if y.dim() != 2 or y.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: y has shape {tuple(y.shape)}; expected (M, {x.shape[1]}), like x")
    return x.shape[0], y.shape[0]


def _check_scalars(op: str, **scalars: Tensor | None) -> None:
    for name, t in scalars.items():
        if t is not None:
            check_float(op, **{name: t})
            if t.numel() != 1:
                raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected one element")


def _readable(t: Tensor) -> bool:
    """Whether its values may be looked at: on the CPU, not while tracing, not as a batch of torch.func."""
    plain = type(t) is Tensor and t.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def _check_index(op: str, name: str, index: Tensor | None, rows: int, columns: int) -> None:
    """int64 [rows], entries below `columns`; a negative one means none."""
    if index is None:
        return
    if index.dtype != torch.int64 or tuple(index.shape) != (rows,):
        raise ValueError(
            f"{op}: {name} has dtype {name_of(index.dtype)} and shape {tuple(index.shape)}; expected int64 ({rows},)"
        )
    if _readable(index) and index.numel() and int(index.max()) >= columns:
        raise IndexError(f"{op}: {name} has an entry {int(index.max())}; expected less than {columns}")


def _check_vector(op: str, name: str, t: Tensor | None, size: int, dtype: torch.dtype) -> None:
    if t is not None and (t.dtype != dtype or tuple(t.shape) != (size,)):
        raise ValueError(
            f"{op}: {name} has dtype {name_of(t.dtype)} and shape {tuple(t.shape)}; expected {name_of(dtype)} ({size},)"
        )


# ---- references: the formulas ---------------------------------------------------------------------------------------


def _similarities(x: Tensor, y: Tensor | None) -> Tensor:
    wide = x.to(_acc(x.dtype))
    return wide @ (wide if y is None else y.to(wide.dtype)).T


def _scalar(t: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device) if t is None else t.reshape(()).to(like.dtype)


def _at(index: Tensor, columns: int) -> Tensor:
    """[N, M], true at (i, index[i]). An index that is no column is none, also where it could not be checked."""
    return index[:, None] == torch.arange(columns, device=index.device)


def _excluded(z: Tensor, exclude: Tensor | None) -> Tensor:
    return z if exclude is None else z.masked_fill(_at(exclude, z.shape[1]), -torch.inf)


def _lse(z: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum-exp, maximum, log of the sum relative to the maximum): the last two add up to the first."""
    if z.shape[dim] == 0:
        low = z.new_full((z.shape[1 - dim],), -torch.inf)
        return low, low, torch.zeros_like(low)
    top = z.amax(dim)
    top = torch.where(top.isinf(), torch.zeros_like(top), top)
    log = (z - top.unsqueeze(dim)).exp().sum(dim).log()
    return top + log, top, log


def _softmax(z: Tensor, lse: Tensor) -> Tensor:
    """e^(z - lse), and 0 where lse is -inf: nothing to share the weight."""
    return torch.where(lse == -torch.inf, torch.zeros_like(z), (z - lse).exp())


def _reference_sim_lse(
    x: Tensor, y: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None, labels: Tensor | None,
    exclude: Tensor | None, *, cols: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    op = "sim_lse"
    rows, columns = _check_features(op, x, y)
    _check_scalars(op, logit_scale=logit_scale, logit_bias=logit_bias)
    _check_index(op, "labels", labels, rows, columns)
    _check_index(op, "exclude", exclude, rows, columns)
    check_device(op, x.device, y=y, logit_scale=logit_scale, logit_bias=logit_bias, labels=labels, exclude=exclude)
    cols = cols and y is not None
    with no_autocast(x.device):
        z = _similarities(x, y)
        z = _scalar(logit_scale, z) * z + _scalar(logit_bias, z)
        all_of = _excluded(z, exclude)
        lse_row, top_row, log_row = _lse(all_of, 1)
        lse_col, top_col, log_col = _lse(all_of, 0) if cols else (z.new_empty(0),) * 3
        nll_row, nll_col = z.new_empty(0), z.new_empty(0)
        if labels is not None:
            zero = z.new_zeros(())
            chosen = (labels >= 0) & (labels < columns)
            column = labels.clamp(0, max(columns - 1, 0))
            target = z.gather(1, column[:, None])[:, 0] if columns else z.new_zeros(rows)
            # the maximum first: near a loss of 0 its difference is exact, and the logarithm small
            nll_row = torch.where(chosen, (top_row - target) + log_row, zero)
            if cols:
                nll_col = z.new_zeros(rows)
                if columns:
                    nll_col = torch.where(chosen, (top_col[column] - target) + log_col[column], zero)
    return lse_row, lse_col, nll_row, nll_col


def _reference_sim_lse_backward(
    x: Tensor, y: Tensor | None, logit_scale: Tensor, logit_bias: Tensor | None, labels: Tensor | None,
    exclude: Tensor | None, lse_row: Tensor, lse_col: Tensor | None, grad_row: Tensor, grad_col: Tensor | None,
    grad_pair: Tensor | None, *, need_x: bool = True, need_y: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "sim_lse_backward"
    rows, columns = _check_features(op, x, y)
    _check_scalars(op, logit_scale=logit_scale, logit_bias=logit_bias)
    _check_index(op, "labels", labels, rows, columns)
    _check_index(op, "exclude", exclude, rows, columns)
    acc = _acc(x.dtype)
    _check_vector(op, "lse_row", lse_row, rows, acc)
    _check_vector(op, "grad_row", grad_row, rows, acc)
    if y is None and (lse_col is not None or grad_col is not None):
        raise ValueError(f"{op}: lse_col and grad_col are given without y; expected None, the matrix is symmetric")
    if (lse_col is None) != (grad_col is None):
        raise ValueError(f"{op}: one of lse_col and grad_col is None; expected both or neither")
    _check_vector(op, "lse_col", lse_col, columns, acc)
    _check_vector(op, "grad_col", grad_col, columns, acc)
    if (labels is None) != (grad_pair is None):
        raise ValueError(f"{op}: one of labels and grad_pair is None; expected both or neither")
    _check_vector(op, "grad_pair", grad_pair, rows, acc)
    check_device(
        op, x.device, y=y, logit_scale=logit_scale, logit_bias=logit_bias, labels=labels, exclude=exclude,
        lse_row=lse_row, lse_col=lse_col, grad_row=grad_row, grad_col=grad_col, grad_pair=grad_pair,
    )  # fmt: skip
    with no_autocast(x.device):
        dots = _similarities(x, y)
        scale = _scalar(logit_scale, dots)
        z = _excluded(scale * dots + _scalar(logit_bias, dots), exclude)
        g = grad_row[:, None] * _softmax(z, lse_row[:, None])
        if lse_col is not None and grad_col is not None:
            g = g + grad_col * _softmax(z, lse_col)
        if exclude is not None:  # of weight 0, also beside a NaN
            g = g.masked_fill(_at(exclude, columns), 0.0)
        if labels is not None and grad_pair is not None:
            g = g + torch.where(_at(labels, columns), grad_pair[:, None], torch.zeros_like(g))
        grad_scale = (g * dots).sum()
        if y is None:
            grad_x, grad_y = scale * ((g + g.T) @ x.to(acc)), x.new_empty(0)
        else:
            grad_x = scale * (g @ y.to(acc)) if need_x else x.new_empty(0)
            grad_y = scale * (g.T @ x.to(acc)) if need_y else x.new_empty(0)
        return grad_x.to(x.dtype), grad_y.to(x.dtype), grad_scale


def _sigmoid_logits(
    op: str, x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(similarities, logits, signs): the sign is +1 at a row's label and -1 elsewhere."""
    rows, columns = _check_features(op, x, y)
    _check_scalars(op, logit_scale=logit_scale, logit_bias=logit_bias)
    _check_index(op, "labels", labels, rows, columns)
    check_device(op, x.device, y=y, logit_scale=logit_scale, logit_bias=logit_bias, labels=labels)
    with no_autocast(x.device):
        dots = _similarities(x, y)
        sign = torch.full_like(dots, -1.0)
        if labels is not None:
            sign = sign.masked_fill(_at(labels, columns), 1.0)
        return dots, _scalar(logit_scale, dots) * dots + _scalar(logit_bias, dots), sign


def _reference_sigmoid_contrastive(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, labels: Tensor | None
) -> Tensor:  # fmt: skip
    _, z, sign = _sigmoid_logits("sigmoid_contrastive", x, y, logit_scale, logit_bias, labels)
    return -torch.nn.functional.logsigmoid(sign * z).sum(1)


def _sigmoid_gradients(
    op: str, x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, labels: Tensor | None, weights: Tensor,
    need_x: bool = True, need_y: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of sum_i weights_i loss_i."""
    dots, z, sign = _sigmoid_logits(op, x, y, logit_scale, logit_bias, labels)
    with no_autocast(x.device):
        g = -sign * torch.sigmoid(-sign * z) * weights[:, None]
        scale = _scalar(logit_scale, dots)
        grad_x = (scale * (g @ y.to(g.dtype))).to(x.dtype) if need_x else x.new_empty(0)
        grad_y = (scale * (g.T @ x.to(g.dtype))).to(x.dtype) if need_y else x.new_empty(0)
        return grad_x, grad_y, (g * dots).sum(), g.sum()


def _reference_sigmoid_contrastive_backward(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, labels: Tensor | None, grad_loss: Tensor, *,
    need_x: bool = True, need_y: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    op = "sigmoid_contrastive_backward"
    rows, _ = _check_features(op, x, y)
    _check_vector(op, "grad_loss", grad_loss, rows, _acc(x.dtype))
    check_device(op, x.device, grad_loss=grad_loss)
    return _sigmoid_gradients(op, x, y, logit_scale, logit_bias, labels, grad_loss, need_x, need_y)


def _reference_sigmoid_contrastive_sum(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, labels: Tensor | None, *,
    need_x: bool = True, need_y: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    op = "sigmoid_contrastive_sum"
    _, z, sign = _sigmoid_logits(op, x, y, logit_scale, logit_bias, labels)
    loss = -torch.nn.functional.logsigmoid(sign * z).sum()
    ones = torch.ones(x.shape[0], dtype=z.dtype, device=x.device)
    return loss, *_sigmoid_gradients(op, x, y, logit_scale, logit_bias, labels, ones, need_x, need_y)


# ---- schemas and gradients ------------------------------------------------------------------------------------------

_LOGITS = "Tensor x, Tensor? y, Tensor logit_scale, Tensor? logit_bias, Tensor? labels, Tensor? exclude"
_SIGMOID = "Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, Tensor? labels"
_NEEDS = "bool need_x=True, bool need_y=True"


def _like(grad: Tensor, parameter: Tensor) -> Tensor:
    return grad.to(parameter.dtype).reshape(parameter.shape)


def _setup_sim_lse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, logit_scale, logit_bias, labels, exclude, cols = inputs
    ctx.save_for_backward(x, y, logit_scale, logit_bias, labels, exclude, *output[:2])
    ctx.cols = cols and y is not None


def _logit_gradients(
    labels: Tensor | None, columns: int, of_row: Tensor, of_col: Tensor | None, of_nll_row: Tensor,
    of_nll_col: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of rows' and columns' log-sum-exps and of the pairs' logits, from those of what `sim_lse` returns.

    nll_row is the row's log-sum-exp less the pair's logit, nll_col that of the label's column less the same.
    """
    grad_row, grad_col, grad_pair = of_row, of_col, None
    if labels is not None:
        # rows without a label, whose nll is the constant 0, and labels that are no column
        chosen = (labels >= 0) & (labels < columns)
        of_nll_row = torch.where(chosen, of_nll_row, torch.zeros_like(of_nll_row))
        grad_row, grad_pair = grad_row + of_nll_row, -of_nll_row
        if grad_col is not None and of_nll_col is not None and columns:
            of_nll_col = torch.where(chosen, of_nll_col, torch.zeros_like(of_nll_col))
            grad_pair = grad_pair - of_nll_col
            grad_col = grad_col.index_add(0, labels.clamp(0, columns - 1), of_nll_col)
    return grad_row.contiguous(), grad_col, grad_pair


def _bias_gradient(
    lse_row: Tensor, lse_col: Tensor, grad_row: Tensor, grad_col: Tensor | None, grad_pair: Tensor | None
) -> Tensor:  # fmt: skip
    """Each softmax sums to 1, so no tile is needed; a sum over nothing has no weight to give."""
    grad_bias = torch.where(lse_row == -torch.inf, torch.zeros_like(grad_row), grad_row).sum()
    if grad_col is not None:
        grad_bias = grad_bias + torch.where(lse_col == -torch.inf, torch.zeros_like(grad_col), grad_col).sum()
    return grad_bias if grad_pair is None else grad_bias + grad_pair.sum()


def _backward_sim_lse(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    x, y, logit_scale, logit_bias, labels, exclude, lse_row, lse_col = ctx.saved_tensors
    zeros = torch.zeros_like(lse_row)
    of_row, of_nll_row = (zeros if g is None else g for g in (grads[0], grads[2]))
    of_col = (torch.zeros_like(lse_col) if grads[1] is None else grads[1]) if ctx.cols else None
    columns = (x if y is None else y).shape[0]
    grad_row, grad_col, grad_pair = _logit_gradients(labels, columns, of_row, of_col, of_nll_row, grads[3])
    grad_x, grad_y, grad_scale = call(
        "sim_lse_backward", x, y, logit_scale, logit_bias, labels, exclude, lse_row, lse_col if ctx.cols else None,
        grad_row, grad_col, grad_pair, need_x=ctx.needs_input_grad[0], need_y=ctx.needs_input_grad[1],
    )  # fmt: skip
    grad_bias = None
    if logit_bias is not None and ctx.needs_input_grad[3]:
        grad_bias = _like(_bias_gradient(lse_row, lse_col, grad_row, grad_col, grad_pair), logit_bias)
    return (
        grad_x if ctx.needs_input_grad[0] else None,
        grad_y if y is not None and ctx.needs_input_grad[1] else None,
        _like(grad_scale, logit_scale) if ctx.needs_input_grad[2] else None,
        grad_bias, None, None, None,
    )  # fmt: skip


_setup_once, _backward_once = not_differentiable(
    "sim_lse_backward", "it is the gradient of sim_lse, which may be differentiated once"
)
define(
    f"sim_lse({_LOGITS}, *, bool cols=True) -> (Tensor lse_row, Tensor lse_col, Tensor nll_row, Tensor nll_col)",
    _reference_sim_lse, setup_context=_setup_sim_lse, backward=_backward_sim_lse,
    vmap=batch_of_rows("sim_lse", ()), triton="contrastive:sim_lse", gradient="yes",
)  # fmt: skip
define(
    f"sim_lse_backward({_LOGITS}, Tensor lse_row, Tensor? lse_col, Tensor grad_row, Tensor? grad_col, "
    f"Tensor? grad_pair, *, {_NEEDS}) -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    _reference_sim_lse_backward, setup_context=_setup_once, backward=_backward_once,
    vmap=batch_of_rows("sim_lse_backward", ()), triton="contrastive:sim_lse_backward",
)  # fmt: skip


def _setup_sigmoid(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])


def _sigmoid_backward(ctx: Any, inputs: tuple[Any, ...], grad_loss: Tensor) -> tuple[Any, ...]:
    x, y, logit_scale, logit_bias, labels = inputs
    needs = ctx.needs_input_grad
    grad_x, grad_y, grad_scale, grad_bias = call(
        "sigmoid_contrastive_backward", x, y, logit_scale, logit_bias, labels, grad_loss.contiguous(),
        need_x=needs[0], need_y=needs[1],
    )  # fmt: skip
    return (
        grad_x if needs[0] else None, grad_y if needs[1] else None, _like(grad_scale, logit_scale),
        _like(grad_bias, logit_bias), None,
    )  # fmt: skip


def _backward_sigmoid(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
    return _sigmoid_backward(ctx, ctx.saved_tensors, grad_loss)


def _setup_sigmoid_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.made = inputs[5:]


def _backward_sigmoid_sum(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    inputs, grads = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    needs = ctx.needs_input_grad
    made = all(have or not want for have, want in zip(ctx.made, needs, strict=False))
    # A second derivative must not take the gradients for constants: then they are made again, by an op that refuses.
    if not made or torch.is_grad_enabled():
        return (*_sigmoid_backward(ctx, inputs, grad_loss.expand(inputs[0].shape[0])), None, None)
    grad_x, grad_y, grad_scale, grad_bias = grads
    return (
        (grad_x * grad_loss).to(grad_x.dtype) if needs[0] else None,
        (grad_y * grad_loss).to(grad_y.dtype) if needs[1] else None,
        _like(grad_scale * grad_loss, inputs[2]), _like(grad_bias * grad_loss, inputs[3]), None, None, None,
    )  # fmt: skip


_setup_sigmoid_once, _backward_sigmoid_once = not_differentiable(
    "sigmoid_contrastive_backward", "it is the gradient of sigmoid_contrastive, which may be differentiated once"
)
define(
    f"sigmoid_contrastive({_SIGMOID}) -> Tensor",
    _reference_sigmoid_contrastive, setup_context=_setup_sigmoid, backward=_backward_sigmoid,
    vmap=batch_of_rows("sigmoid_contrastive", ()), triton="contrastive:sigmoid_contrastive", gradient="yes",
)  # fmt: skip
define(
    f"sigmoid_contrastive_backward({_SIGMOID}, Tensor grad_loss, *, {_NEEDS}) "
    "-> (Tensor grad_x, Tensor grad_y, Tensor grad_scale, Tensor grad_bias)",
    _reference_sigmoid_contrastive_backward, setup_context=_setup_sigmoid_once, backward=_backward_sigmoid_once,
    vmap=batch_of_rows("sigmoid_contrastive_backward", ()), triton="contrastive:sigmoid_contrastive_backward",
)  # fmt: skip
define(
    f"sigmoid_contrastive_sum({_SIGMOID}, *, {_NEEDS}) "
    "-> (Tensor loss, Tensor grad_x, Tensor grad_y, Tensor grad_scale, Tensor grad_bias)",
    _reference_sigmoid_contrastive_sum, setup_context=_setup_sigmoid_sum, backward=_backward_sigmoid_sum,
    vmap=batch_of_rows("sigmoid_contrastive_sum", ()), triton="contrastive:sigmoid_contrastive_sum", gradient="yes",
)  # fmt: skip


# ---- public functions -----------------------------------------------------------------------------------------------


class SimLSE(NamedTuple):
    """What `sim_lse` returns; float32, or float64 for float64 features."""

    #: [N], log-sum-exp of each row of logits
    row: Tensor
    #: [M], of each column; empty without `cols`
    col: Tensor
    #: [N], ``row[i]`` less the logit of row i's label, 0 where it has none; empty without `labels`
    nll_row: Tensor
    #: [N], ``col[labels[i]]`` less the same logit; empty without `labels` or `cols`
    nll_col: Tensor


def _as_scalar(op: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        _check_scalars(op, **{name: value})
        return value
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} is {type(value).__name__}; expected a number or a tensor of one element")
    return torch.full(
        (), float(value), dtype=_acc(like.dtype) if like.is_floating_point() else None, device=like.device
    )


def _check_reduction(op: str, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")


def _check_smoothing(op: str, label_smoothing: float) -> None:
    if not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"{op}: label_smoothing is {type(label_smoothing).__name__}; expected a number")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}; expected 0 <= label_smoothing <= 1")


def _reduce(loss: Tensor, reduction: str, count: Tensor | int) -> Tensor:
    """`count` is how many terms the mean is over; of none, the mean is 0."""
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def sim_lse(
    x: Tensor, y: Tensor | None = None, logit_scale: float | Tensor = 1.0, logit_bias: float | Tensor | None = None, *,
    labels: Tensor | None = None, exclude: Tensor | None = None, cols: bool = True,
) -> SimLSE:  # fmt: skip
    r"""Log-sum-exp of every row and every column of ``logit_scale * x @ y.T + logit_bias``, which is never stored.

    The block that all softmax losses of this module are made of, also across processes: the log-sum-exps of
    blocks of columns are merged with `lse_merge`.

    Parameters
    ----------
    x : Tensor [N, D], float32, bfloat16, float16 or float64
    y : Tensor [M, D] of x's dtype, optional
        Without it y is x: the matrix is symmetric, half of it is computed, and `cols` means nothing.
    logit_scale : float or Tensor of one element
    logit_bias : float or Tensor of one element, optional
    labels : int64 Tensor [N], optional
        A column for each row, the positive; a negative entry means none.
    exclude : int64 Tensor [N], optional
        A column for each row that its sum leaves out, the row itself in NT-Xent; a negative entry means none. The
        column's sum leaves the pair out as well.
    cols : bool
        Whether the columns' sums are wanted too. They come from the same tiles.

    Returns
    -------
    SimLSE
        (row, col, nll_row, nll_col), all differentiable with respect to x, y, logit_scale and logit_bias. A sum over
        nothing is -inf. As long as its pair is not excluded, no nll is below 0.

    Raises
    ------
    TypeError, ValueError, IndexError, RuntimeError
        Naming the argument. Differentiating twice raises.

    Notes
    -----
    .. math:: r_i = \log \sum_{j \ne e_i} e^{z_{ij}}, \quad c_j = \log \sum_{i : e_i \ne j} e^{z_{ij}}, \quad
        \mathrm{nll}^r_i = r_i - z_{i \ell_i}, \quad \mathrm{nll}^c_i = c_{\ell_i} - z_{i \ell_i}
    """
    op = "sim_lse"
    _check_features(op, x, y)
    _check_given(op, x.device, y=y, labels=labels, exclude=exclude)
    scale = _as_scalar(op, "logit_scale", logit_scale, x)
    bias = None if logit_bias is None else _as_scalar(op, "logit_bias", logit_bias, x)
    return SimLSE(*call(op, x, y, scale, bias, labels, exclude, cols=cols))


def lse_merge(*lse: Tensor) -> Tensor:
    """The log-sum-exp over the union of blocks from that of each: ``log(sum(exp(lse_k)))``, differentiable.

    Parameters
    ----------
    *lse : Tensor, all of one shape
        At least one.

    Returns
    -------
    Tensor of that shape
    """
    if not lse:
        raise ValueError("lse_merge: got no tensors; expected at least one")
    for k, t in enumerate(lse):
        if not isinstance(t, Tensor):
            raise TypeError(f"lse_merge: argument {k} is {type(t).__name__}; expected a tensor")
        if t.shape != lse[0].shape:
            got, want = tuple(t.shape), tuple(lse[0].shape)
            raise ValueError(f"lse_merge: tensor {k} has shape {got}; expected {want}, like the first")
    merged = lse[0]
    for t in lse[1:]:
        merged = _merged(merged, t)
    return merged


def _merged(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b); where both are -inf the gradient is 0, for which logaddexp has NaN."""
    nothing = (a == -torch.inf) & (b == -torch.inf)
    zero = torch.zeros((), dtype=a.dtype, device=a.device)
    both = torch.logaddexp(torch.where(nothing, zero, a), torch.where(nothing, zero, b))
    return torch.where(nothing, zero - torch.inf, both)


def _labels_of(
    op: str, rows: int, columns: int, labels: Tensor | None, label_offset: int, ignore_index: int, device: torch.device
) -> Tensor:  # fmt: skip
    if labels is None:
        if rows > columns:
            raise ValueError(f"{op}: y has {columns} rows; expected {rows} or more, like x, or labels")
        if label_offset < 0 or rows + label_offset > columns:
            raise ValueError(
                f"{op}: label_offset is {label_offset} for {rows} rows of x and {columns} of y; "
                f"expected 0 <= label_offset <= {columns - rows}"
            )
        return torch.arange(label_offset, label_offset + rows, device=device)
    if label_offset != 0:
        raise ValueError(f"{op}: label_offset is {label_offset} and labels are given; expected one of them")
    _check_given(op, device, labels=labels)
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not integer or tuple(labels.shape) != (rows,):
        raise ValueError(
            f"{op}: labels has dtype {name_of(labels.dtype)} and shape {tuple(labels.shape)}; expected int64 ({rows},)"
        )
    labels = labels.to(torch.int64)
    ignored = labels == ignore_index
    if _readable(labels) and bool(((labels < 0) & ~ignored).any()):
        bad = int(labels[(labels < 0) & ~ignored][0])
        raise IndexError(f"{op}: labels has an entry {bad}; expected 0 <= label < {columns}, or {ignore_index}")
    return labels.masked_fill(ignored, -1)


def _check_negatives(op: str, x: Tensor, **negatives: Tensor | None) -> None:
    _check_given(op, x.device, **negatives)
    for name, t in negatives.items():
        if t is not None and (t.dim() != 2 or t.shape[1] != x.shape[1] or t.dtype != x.dtype):
            raise ValueError(
                f"{op}: {name} has dtype {name_of(t.dtype)} and shape {tuple(t.shape)}; "
                f"expected {name_of(x.dtype)} (K, {x.shape[1]})"
            )


def _with_negatives(
    nll: Tensor, lse: Tensor, target: Tensor, anchors: Tensor, negatives: Tensor, scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(nll, lse) when the anchors' sums go on over `negatives`."""
    more = sim_lse(anchors, negatives, scale, bias, cols=False).row
    return _merged(nll, more - target), _merged(lse, more)


def info_nce(
    x: Tensor, y: Tensor, logit_scale: float | Tensor = 1.0, logit_bias: float | Tensor | None = None,
    labels: Tensor | None = None, *, x_negatives: Tensor | None = None, y_negatives: Tensor | None = None,
    symmetric: bool = True, decoupled: bool = False, label_smoothing: float = 0.0, label_offset: int = 0,
    ignore_index: int = -100, reduction: str = "mean", return_lse: bool = False,
) -> Any:  # fmt: skip
    r"""InfoNCE, and CLIP's loss where `symmetric`: cross-entropy of each pair among all, without storing the logits.

    Parameters
    ----------
    x : Tensor [N, D], float32, bfloat16, float16 or float64
        The anchors. Features are used as they are: normalize them for cosine similarity.
    y : Tensor [M, D] of x's dtype
        The candidates; rows that no label names are negatives of all rows of x.
    logit_scale : float or Tensor of one element
        What similarities are multiplied with: 1 / temperature, CLIP's ``logit_scale.exp()``. Differentiable.
    logit_bias : float or Tensor of one element, optional
        Added to every logit. It cancels, but for the log-sum-exps; its gradient is 0.
    labels : integer Tensor [N], optional
        The row of y that belongs to each row of x; default ``label_offset + arange(N)``. Rows with `ignore_index`
        stay among the negatives of others, and count in no mean.
    x_negatives, y_negatives : Tensor [K, D] of x's dtype, optional
        More candidates that belong to nobody, a queue: `y_negatives` for the rows of x, `x_negatives` for the rows of
        y (needs `symmetric`). They get gradients if they require them.
    symmetric : bool
        Also the other direction, each y of a pair among all x, and the mean of both.
    decoupled : bool
        Leave the positive out of the sums (DCL). Such a loss may be negative.
    label_smoothing : float in [0, 1]
        The weight that is spread evenly over all candidates, as in `torch.nn.functional.cross_entropy`.
    label_offset : int
        Where the rows of x begin among those of y, for default labels.
    ignore_index : int
        Negative, or a label that does not occur.
    reduction : "mean", "sum" or "none"
        "mean" is over pairs that are not ignored; of none it is 0.
    return_lse : bool
        Also return the log-sum-exps over rows [N] and columns [M] (without `symmetric` empty), which are
        differentiable.

    Returns
    -------
    Tensor, or (loss, lse_row, lse_col)
        float32 (float64 for float64): 0-d, or [N] with "none", 0 where ignored.

    Raises
    ------
    TypeError, ValueError, IndexError, RuntimeError
        Naming the argument. Differentiating twice raises.

    Notes
    -----
    .. math:: \ell_i = \frac12 \left( \log \sum_j e^{z_{ij} - z_{i \ell_i}}
        + \log \sum_k e^{z_{k \ell_i} - z_{i \ell_i}} \right)

    Where several rows share a label, each pair counts; each is a negative of the other in the second direction.
    Memory beyond the gradients is O(N + M): a batch is bounded by its features, not by its square.

    References
    ----------
    van den Oord 2018 (InfoNCE); Radford 2021 (CLIP); He 2020 (MoCo: `y_negatives`); Yeh 2022 (DCL: `decoupled`).
    """
    op = "info_nce"
    _check_reduction(op, reduction)
    _check_tensors(op, x=x, y=y)
    rows, columns = _check_features(op, x, y)
    _check_smoothing(op, label_smoothing)
    if x_negatives is not None and not symmetric:
        raise ValueError(f"{op}: x_negatives are given without symmetric; expected None, the rows of y are no anchors")
    _check_given(op, x.device, y=y)
    _check_negatives(op, x, y_negatives=y_negatives, x_negatives=x_negatives)
    target_of = _labels_of(op, rows, columns, labels, label_offset, ignore_index, x.device)
    scale = _as_scalar(op, "logit_scale", logit_scale, x)
    bias = None if logit_bias is None else _as_scalar(op, "logit_bias", logit_bias, x)
    lse_row, lse_col, nll_row, nll_col = sim_lse(
        x, y, scale, bias, labels=target_of, exclude=target_of if decoupled else None, cols=symmetric
    )
    chosen = target_of >= 0
    column = target_of.clamp(min=0)
    zero = nll_row.new_zeros(())
    # the targets' logits; where a sum without the positive is empty they cannot be had from their difference
    alone = decoupled and rows > 0 and columns > 0 and (x_negatives is not None or y_negatives is not None)
    target = _targets(x, y, column, scale, bias) if alone else lse_row - nll_row
    if y_negatives is not None:
        nll_row, lse_row = _with_negatives(nll_row, lse_row, target, x, y_negatives, scale, bias)
        nll_row = torch.where(chosen, nll_row, zero)
    if x_negatives is not None:
        more = sim_lse(y, x_negatives, scale, bias, cols=False).row
        if rows and columns:
            nll_col = torch.where(chosen, _merged(nll_col, more[column] - target), zero)
        lse_col = _merged(lse_col, more)
    loss = nll_row
    if label_smoothing > 0.0 and rows and columns:
        of_row = _smoothing(x, y, y_negatives, scale, bias)
        loss = torch.where(chosen, (1.0 - label_smoothing) * nll_row + label_smoothing * (lse_row - of_row), zero)
        if symmetric:
            of_col = _smoothing(y, x, x_negatives, scale, bias)
            smooth = (lse_col - of_col)[column]
            nll_col = torch.where(chosen, (1.0 - label_smoothing) * nll_col + label_smoothing * smooth, zero)
    if symmetric:
        loss = 0.5 * (loss + nll_col)
    loss = _reduce(loss, reduction, rows if labels is None else chosen.sum())
    return (loss, lse_row, lse_col) if return_lse else loss


def _targets(x: Tensor, y: Tensor, column: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    acc = _acc(x.dtype)
    with no_autocast(x.device):
        target = _scalar(scale, x.to(acc)) * (x.to(acc) * y[column].to(acc)).sum(1)
        return target if bias is None else target + _scalar(bias, target)


def _smoothing(
    anchors: Tensor, candidates: Tensor, negatives: Tensor | None, scale: Tensor, bias: Tensor | None
) -> Tensor:  # fmt: skip
    """The mean logit of each anchor: with the mean candidate, without a matrix."""
    acc = _acc(anchors.dtype)
    with no_autocast(anchors.device):
        total, count = candidates.sum(0, dtype=acc), candidates.shape[0]
        if negatives is not None:
            total, count = total + negatives.sum(0, dtype=acc), count + negatives.shape[0]
        mean = _scalar(scale, total) * (anchors.to(acc) @ (total / count))
        return mean if bias is None else mean + _scalar(bias, mean)


def nt_xent(
    z: Tensor, z_other: Tensor | None = None, *, temperature: float | Tensor = 0.5, reduction: str = "mean"
) -> Tensor:  # fmt: skip
    r"""NT-Xent, the loss of SimCLR: each view finds the other among all 2 N - 1 others.

    Parameters
    ----------
    z : Tensor [N, D], or [2 N, D] without `z_other`
        One view of each sample, or both views: row i and row i + N belong together. Normalize for cosine similarity.
    z_other : Tensor [N, D] of z's dtype, optional
        The other view.
    temperature : float > 0, or Tensor of one element
    reduction : "mean", "sum" or "none"

    Returns
    -------
    Tensor
        float32 (float64 for float64): 0-d, or [2 N] with "none". Of N = 0 it is 0.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument. Differentiating twice raises.

    Notes
    -----
    .. math:: \ell_i = -\log \frac{e^{z_i \cdot z_{p(i)} / \tau}}{\sum_{k \ne i} e^{z_i \cdot z_k / \tau}}

    The matrix is symmetric: the forward pass computes half of it.

    References
    ----------
    Chen 2020 (SimCLR).
    """
    op = "nt_xent"
    _check_reduction(op, reduction)
    _check_tensors(op, z=z)
    check_float(op, z=z)
    if z.dim() != 2:
        raise ValueError(f"{op}: z has shape {tuple(z.shape)}; expected (N, D)")
    if z_other is not None:
        _check_given(op, z.device, z_other=z_other)
        if z_other.shape != z.shape or z_other.dtype != z.dtype:
            raise ValueError(
                f"{op}: z_other has dtype {name_of(z_other.dtype)} and shape {tuple(z_other.shape)}; "
                f"expected {name_of(z.dtype)} {tuple(z.shape)}, like z"
            )
        z = torch.cat([z, z_other])
    if z.shape[0] % 2:
        raise ValueError(f"{op}: z has {z.shape[0]} rows; expected an even number, two views of each sample")
    itself = torch.arange(z.shape[0], device=z.device)
    half = z.shape[0] // 2
    partner = torch.cat([itself[half:], itself[:half]])
    nll = sim_lse(z, None, _inverse(op, temperature, z), labels=partner, exclude=itself).nll_row
    return _reduce(nll, reduction, z.shape[0])


def _inverse(op: str, temperature: float | Tensor, like: Tensor) -> Tensor:
    scalar = _as_scalar(op, "temperature", temperature, like)
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"{op}: temperature is {temperature}; expected > 0")
    return 1.0 / scalar.to(_acc(like.dtype))  # in the precision of the logits, whatever the parameter's is


def sup_con(
    z: Tensor, labels: Tensor, z_ref: Tensor | None = None, ref_labels: Tensor | None = None, *,
    temperature: float | Tensor = 0.1, ref_offset: int | None = None, no_positive: str = "skip",
    reduction: str = "mean", return_lse: bool = False,
) -> Any:  # fmt: skip
    r"""Supervised contrastive loss: all samples of an anchor's class are its positives.

    Parameters
    ----------
    z : Tensor [N, D], float32, bfloat16, float16 or float64
        The anchors. Normalize for cosine similarity.
    labels : integer Tensor [N]
        The class of each.
    z_ref : Tensor [M, D] of z's dtype, optional
        What anchors are compared with, default z without the anchor itself.
    ref_labels : integer Tensor [M]
        The classes of `z_ref`.
    temperature : float > 0, or Tensor of one element
    ref_offset : int, optional
        Row i of z is row ``ref_offset + i`` of `z_ref`, and not compared with itself. Default: z_ref holds others.
    no_positive : "skip", "zero" or "error"
        An anchor without a positive: left out of the mean, counted with loss 0, or a ValueError.
    reduction : "mean", "sum" or "none"
    return_lse : bool
        Also return the log-sum-exps [N] and the numbers of positives [N], int64.

    Returns
    -------
    Tensor, or (loss, lse, positives)
        float32 (float64 for float64): 0-d, or [N] with "none", 0 where there is no positive.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument. Differentiating twice raises.

    Notes
    -----
    .. math:: \ell_i = \log \sum_{a \in A(i)} e^{z_i \cdot z_a / \tau}
        - \frac{1}{|P(i)|} \sum_{p \in P(i)} z_i \cdot z_p / \tau

    with A(i) all but i, and P(i) those of A(i) in i's class. The mean positive logit is a product with the class sum:
    O(N D), no matrix. It is summed in another order than the tiles, so a loss may be below 0 by a rounding. The
    gradient is the sum of two, from the tiles and from the class sums, each rounded to z's dtype.

    References
    ----------
    Khosla 2020, the form L_out.
    """
    op = "sup_con"
    _check_reduction(op, reduction)
    if no_positive not in ("skip", "zero", "error"):
        raise ValueError(f"{op}: no_positive is {no_positive!r}; expected 'skip', 'zero' or 'error'")
    _check_tensors(op, z=z, labels=labels)
    check_float(op, z=z)
    if z.dim() != 2:
        raise ValueError(f"{op}: z has shape {tuple(z.shape)}; expected (N, D)")
    if (z_ref is None) != (ref_labels is None):
        raise ValueError(f"{op}: one of z_ref and ref_labels is None; expected both or neither")
    rows = z.shape[0]
    _check_given(op, z.device, labels=labels, z_ref=z_ref, ref_labels=ref_labels)
    _check_classes(op, "labels", labels, rows)
    if z_ref is not None and ref_labels is not None:
        if z_ref.dtype != z.dtype or z_ref.dim() != 2 or z_ref.shape[1] != z.shape[1]:
            raise ValueError(
                f"{op}: z_ref has dtype {name_of(z_ref.dtype)} and shape {tuple(z_ref.shape)}; "
                f"expected {name_of(z.dtype)} (M, {z.shape[1]}), like z"
            )
        _check_classes(op, "ref_labels", ref_labels, z_ref.shape[0])
        if ref_offset is not None and not 0 <= ref_offset <= z_ref.shape[0] - rows:
            raise ValueError(
                f"{op}: ref_offset is {ref_offset} for {rows} rows of z and {z_ref.shape[0]} of z_ref; "
                f"expected 0 <= ref_offset <= {z_ref.shape[0] - rows}"
            )
    elif ref_offset is not None:
        raise ValueError(f"{op}: ref_offset is {ref_offset} without z_ref; expected None, z is compared with itself")
    scale = _inverse(op, temperature, z)
    with_self = z_ref is None or ref_offset is not None
    exclude = torch.arange(rows, device=z.device) + (ref_offset or 0) if with_self else None
    lse = sim_lse(z, z_ref, scale, exclude=exclude, cols=False).row

    reference, classes = (z, labels) if z_ref is None or ref_labels is None else (z_ref, ref_labels)
    with no_autocast(z.device):
        wide, acc = z.to(_acc(z.dtype)), _acc(z.dtype)
        # labels to 0 .. C - 1, the same in both
        values, index = torch.unique(torch.cat([labels, classes]), return_inverse=True)
        mine, theirs, number = index[:rows], index[rows:], values.shape[0]
        sums = wide.new_zeros(number, z.shape[1]).scatter_add(
            0, theirs[:, None].expand(-1, z.shape[1]), reference.to(acc)
        )
        count = torch.zeros(number, dtype=torch.int64, device=z.device).index_add(0, theirs, torch.ones_like(theirs))
        positives = count[mine]
        mean = torch.linalg.vecdot(wide, torch.nn.functional.embedding(mine, sums))
        if with_self:
            itself = reference[ref_offset or 0 :][:rows]  # not z's own row: z_ref may be a constant
            positives, mean = positives - 1, mean - torch.linalg.vecdot(wide, itself.to(acc))
        mean = _scalar(scale, wide) * mean / positives.clamp(min=1)
        has = positives > 0
        loss = torch.where(has, lse - mean, torch.zeros_like(lse))
    if no_positive == "error" and type(has) is Tensor and not bool(has.all()):
        bad = int((~has).nonzero()[0])
        raise ValueError(f"{op}: anchor {bad} of class {int(labels[bad])} has no positive; expected one for each")
    loss = _reduce(loss, reduction, rows if no_positive == "zero" else has.sum())
    return (loss, lse, positives) if return_lse else loss


def _check_classes(op: str, name: str, labels: Tensor, rows: int) -> None:
    if labels.is_floating_point() or labels.is_complex() or tuple(labels.shape) != (rows,):
        raise ValueError(
            f"{op}: {name} has dtype {name_of(labels.dtype)} and shape {tuple(labels.shape)}; expected int64 ({rows},)"
        )


def sigmoid_contrastive(
    x: Tensor, y: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor, *, labels: Tensor | None = None,
    label_offset: int = 0, negative_only: bool = False, ignore_index: int = -100, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    r"""The pairwise sigmoid loss of SigLIP: every pair is one binary decision, no sum over the batch is needed.

    Parameters
    ----------
    x : Tensor [N, D], float32, bfloat16, float16 or float64
    y : Tensor [M, D] of x's dtype
    logit_scale, logit_bias : float or Tensor of one element
        SigLIP starts from 10 and -10.
    labels : integer Tensor [N], optional
        The row of y that belongs to each row of x; default ``label_offset + arange(N)``. With `ignore_index` a row has
        negatives only.
    label_offset : int
        Where the rows of x begin among those of y, for default labels.
    negative_only : bool
        No pair belongs together: a chunk of another process.
    ignore_index : int
    reduction : "mean", "sum" or "none"
        "mean" divides the sum over all pairs by N, as SigLIP does.

    Returns
    -------
    Tensor
        float32 (float64 for float64): 0-d, or [N] with "none", the sum over each row.

    Raises
    ------
    TypeError, ValueError, IndexError, RuntimeError
        Naming the argument. Differentiating twice raises.

    Notes
    -----
    .. math:: \ell = \frac1N \sum_{ij} \log(1 + e^{-\sigma_{ij} (s \, x_i \cdot y_j + b)}), \qquad
        \sigma_{ij} = 2 [j = \ell_i] - 1

    With "mean" and "sum", where a gradient will be wanted, the forward pass makes it from the same tiles (6 N M D flops
    in all); the backward pass only scales it. With "none" the tiles are made twice, and for float16: the gradient of
    the sum may leave its range where that of the mean, or of a loss that is divided by something else, does not.

    References
    ----------
    Zhai 2023 (SigLIP).
    """
    op = "sigmoid_contrastive"
    _check_reduction(op, reduction)
    _check_tensors(op, x=x, y=y)
    rows, columns = _check_features(op, x, y)
    scale = _as_scalar(op, "logit_scale", logit_scale, x)
    bias = _as_scalar(op, "logit_bias", logit_bias, x)
    if negative_only:
        if labels is not None:
            raise ValueError(f"{op}: labels are given with negative_only; expected None, no pair belongs together")
        target_of = None
    else:
        target_of = _labels_of(op, rows, columns, labels, label_offset, ignore_index, x.device)
    tensors = (x, y, scale, bias)
    wanted = torch.is_grad_enabled() and (
        torch._C._are_functorch_transforms_active() or any(t.requires_grad for t in tensors)
    )
    if reduction == "none" or not wanted or x.dtype == torch.float16:
        return _reduce(call(op, *tensors, target_of), reduction, rows)
    under_transform = torch._C._are_functorch_transforms_active()
    loss = call(
        "sigmoid_contrastive_sum", *tensors, target_of,
        need_x=under_transform or x.requires_grad, need_y=under_transform or y.requires_grad,
    )[0]  # fmt: skip
    return loss if reduction == "sum" else loss / max(rows, 1)
