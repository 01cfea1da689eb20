r"""Gradients of several tasks: their Gram matrix in one read, and their weighted sums in another.

Methods that resolve conflicts between tasks (PCGrad, CAGrad, MGDA, Nash-MTL, UPGrad, ...) look at the tasks'
gradients only through inner products and answer with a weighted sum of them. So they need two passes over memory:
the T x T matrix of inner products, and a combination. What stands between, T x T arithmetic in float64, is in
`tlkernels.ops._gram_solvers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tlkernels.ops._common import changed, check_device, check_float, name_of
from tlkernels.ops._registry import call, define, not_differentiable
from tlkernels.ops.fisher import check_written

__all__ = ["task_combine", "task_combine_", "task_gram"]

WEIGHTS = (torch.float32, torch.float64)


# ---- references: gradients as one list, the tasks' one after another, without elements where a task has none --------


def _check_tasks(op: str, grads: Sequence[Tensor], tasks: int, like: Sequence[Tensor] | None = None) -> int:
    """Returns the number of parameters."""
    if tasks < 1 or len(grads) % tasks:
        raise ValueError(f"{op}: grads has {len(grads)} tensors for {tasks} tasks; expected as many for each task")
    count = len(grads) // tasks
    for p in range(count):
        first = None if like is None else like[p]
        for t in range(tasks):
            g, name = grads[t * count + p], f"grads[{t}][{p}]"
            check_float(op, **{name: g})
            if g.numel() == 0:
                continue
            if first is None:
                first = g
            if g.shape != first.shape or g.dtype != first.dtype:
                raise ValueError(
                    f"{op}: {name} has dtype {name_of(g.dtype)} and shape {tuple(g.shape)}; "
                    f"expected {name_of(first.dtype)} {tuple(first.shape)}, like the other tasks' of this parameter"
                )
            check_device(op, grads[0].device, **{name: g})
    return count


def _reference_task_gram(grads: Sequence[Tensor], tasks: int) -> Tensor:
    count = _check_tasks("task_gram", grads, tasks)
    gram = torch.zeros(tasks, tasks, dtype=torch.float64, device=grads[0].device if grads else None)
    for p in range(count):
        rows = [grads[t * count + p] for t in range(tasks)]
        used = [t for t, g in enumerate(rows) if g.numel()]
        if not used:
            continue
        stacked = torch.stack([rows[t].flatten() for t in used]).to(torch.float64)
        index = torch.tensor(used, device=gram.device)
        gram = gram.index_put((index[:, None], index[None]), stacked @ stacked.T, accumulate=True)
    return gram.tril() + gram.tril(-1).T  # symmetric to the last bit


def _reference_task_combine_(
    out: Sequence[Tensor], grads: Sequence[Tensor], weights: Tensor, *, accumulate: bool = False
) -> None:
    op = "task_combine_"
    if weights.dim() != 2 or weights.dtype not in WEIGHTS:
        raise ValueError(
            f"{op}: weights has dtype {name_of(weights.dtype)} and shape {tuple(weights.shape)}; "
            f"expected float32 or float64 (results, tasks)"
        )
    results, tasks = weights.shape
    if results < 1 or len(out) % results:
        raise ValueError(f"{op}: out has {len(out)} tensors for {results} results; expected as many for each result")
    for i, to in enumerate(out):
        check_float(op, **{f"out[{i}]": to})
    count = len(out) // results
    for r in range(1, results):
        _check_tasks(op, out[r * count : (r + 1) * count], 1, out[:count])
    if _check_tasks(op, grads, tasks, out[:count]) != count:
        raise ValueError(f"{op}: grads has {len(grads) // tasks} tensors a task; expected {count}, like out")
    if grads:
        check_device(op, grads[0].device, weights=weights)
    with torch.no_grad():
        for p in range(count):
            acc = torch.promote_types(out[p].dtype, torch.float32)
            w = weights.to(acc)
            for r in range(results):
                to = out[r * count + p]
                total = to.to(acc) if accumulate else torch.zeros_like(to, dtype=acc)
                for t in range(tasks):
                    g = grads[t * count + p]
                    if g.numel():
                        total = total + w[r, t] * g.to(acc)
                to.copy_(total)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The fake kernel of an op that only writes in place."""


_setup, _backward = not_differentiable("task_gram", "it is a statistic of gradients")
define(
    "task_gram(Tensor[] grads, int tasks) -> Tensor",
    _reference_task_gram, setup_context=_setup, backward=_backward, triton="gradgram:task_gram",
)  # fmt: skip
define(
    "task_combine_(Tensor(a!)[] out, Tensor[] grads, Tensor weights, *, bool accumulate=False) -> ()",
    _reference_task_combine_, triton="gradgram:task_combine_", gradient="none", fake=_nothing,
)  # fmt: skip


# ---- public functions -----------------------------------------------------------------------------------------------


def _flat(op: str, grads: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
    if not isinstance(grads, (list, tuple)) or not grads:
        raise TypeError(f"{op}: grads is a {type(grads).__name__}; expected a list of one list of tensors per task")
    for t, row in enumerate(grads):
        if not isinstance(row, (list, tuple)):
            raise TypeError(f"{op}: grads[{t}] is a {type(row).__name__}; expected a list of tensors")
        if len(row) != len(grads[0]):
            raise ValueError(f"{op}: grads[{t}] has {len(row)} tensors; expected {len(grads[0])}, like grads[0]")
        for p, g in enumerate(row):
            if g is not None and not isinstance(g, Tensor):
                raise TypeError(f"{op}: grads[{t}][{p}] is a {type(g).__name__}; expected a tensor or None")
    some = next((g for row in grads for g in row if g is not None), None)
    if some is None:
        raise ValueError(f"{op}: grads holds no tensor; expected the gradient of at least one task")
    empty = some.new_empty(0)
    return [empty if g is None else g.detach() for row in grads for g in row]


def task_gram(grads: Sequence[Sequence[Tensor | None]]) -> Tensor:
    r"""Inner products of the tasks' gradients, over all parameters, in one read.

    Parameters
    ----------
    grads : list of T lists of P tensors
        ``grads[t][p]``, the gradient of task t by parameter p: the same shapes and dtypes for every task; None where
        a task does not use a parameter. float32, bfloat16, float16 or float64.

    Returns
    -------
    float64 Tensor [T, T]
        :math:`G_{tu} = \sum_p \langle g_{tp}, g_{up} \rangle`, on the gradients' device.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument and its place in the lists.

    Notes
    -----
    Products are summed in float32 over runs of fixed length, runs in float64, in a fixed order: no bit depends on the
    number of threads. The floor is one read of the gradients. NaN and inf propagate.

    Examples
    --------
    >>> gram = tlkernels.ops.task_gram([[g0_w, g0_b], [g1_w, None]])
    """
    op = "task_gram"
    return call(op, _flat(op, grads), len(grads))


def task_combine_(
    out: Sequence[Tensor], grads: Sequence[Sequence[Tensor | None]], weights: Tensor, *, accumulate: bool = False
) -> None:
    r"""Write the weighted sum of the tasks' gradients to `out`, or add it, in one pass.

    Parameters
    ----------
    out : list of P tensors
        Shapes and dtypes of the gradients; changed in place. The parameters' ``.grad``.
    grads : list of T lists of P tensors
        As for `task_gram`; an absent gradient counts as zeros.
    weights : Tensor [T]
        Floating point, on the gradients' device.
    accumulate : bool
        Add to `out` instead of writing over it.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument and its place in the lists; `out` may not share memory with `grads`.
    """
    op = "task_combine_"
    flat = _flat(op, grads)
    if not isinstance(out, (list, tuple)):
        raise TypeError(f"{op}: out is a {type(out).__name__}; expected a list of tensors")
    into = []
    for p, t in enumerate(out):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: out[{p}] is a {type(t).__name__}; expected a tensor")
        into.append(t.detach())
        read = {f"grads[{k}][{p}]": row[p] for k, row in enumerate(grads) if p < len(row)}
        check_written(op, {f"out[{p}]": into[-1]}, **read)
    call(op, into, flat, _rows(op, weights, len(grads)), accumulate=bool(accumulate))
    for t in out:
        changed(t)


def _rows(op: str, weights: Tensor, tasks: int) -> Tensor:
    if not isinstance(weights, Tensor):
        raise TypeError(f"{op}: weights is a {type(weights).__name__}; expected a tensor")
    check_float(op, weights=weights)
    if weights.dim() not in (1, 2) or weights.shape[-1] != tasks:
        raise ValueError(f"{op}: weights has shape {tuple(weights.shape)}; expected ({tasks},), one for each task")
    weights = weights.detach()
    if weights.dtype not in WEIGHTS:
        weights = weights.float()
    return weights if weights.dim() == 2 else weights[None]


def task_combine(grads: Sequence[Sequence[Tensor | None]], weights: Tensor) -> list[Tensor] | list[list[Tensor]]:
    r"""The weighted sums :math:`\sum_t w_t g_{tp}` of the tasks' gradients, one tensor per parameter.

    Parameters
    ----------
    grads : list of T lists of P tensors
        As for `task_gram`; a parameter that no task uses is an error.
    weights : Tensor [T] or [R, T]
        Floating point, on the gradients' device.

    Returns
    -------
    list of P tensors, or R such lists for weights [R, T]
        Shapes and dtypes of the gradients; all R in one read of them.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Naming the argument and its place in the lists.
    """
    op = "task_combine"
    flat = _flat(op, grads)
    rows = _rows(op, weights, len(grads))
    like = []
    for p in range(len(grads[0])):
        some = next((row[p] for row in grads if row[p] is not None), None)
        if some is None:
            raise ValueError(f"{op}: grads[..][{p}] is None for every task; expected a gradient of at least one")
        like.append(some)
    out = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(len(rows)) for t in like]
    call("task_combine_", out, flat, rows, accumulate=False)
    count = len(like)
    return out if weights.dim() == 1 else [out[r * count : (r + 1) * count] for r in range(len(rows))]
