r"""Weights of gradient surgery from the T x T Gram matrix of the tasks' gradients, and GEM's and A-GEM's projections.

Each method here answers with a sum :math:`\sum_t w_t g_t` whose weights depend on the gradients through
:math:`G_{tu} = \langle g_t, g_u \rangle` alone, so none of them touches a gradient: `task_gram` before, `task_combine`
after. Inside it is float64 NumPy on the CPU: T is small, and one transfer costs less than many tiny launches.

The quadratic programs (MGDA, CAGrad, UPGrad, DualProj, GEM) are solved by one finite active-set method, to rounding
error and not for a number of steps. Lengths of gradients are divided out first wherever the method allows, so tasks
whose gradients differ by many orders of magnitude do not drown each other.

What all have in common:

- A Gram matrix knows a gradient's distance from the span of others only up to the square root of the rounding error
  of its dtype. A gradient closer than that (a duplicated or an opposite task) counts as dependent on them: it joins no
  active set with them and leaves pseudo-inverses. Nothing else is regularised.
- A task whose gradient is zero takes no part. Each function says what weight it gets.
- One task is no conflict: its weight is 1 (the sum, the mean and the preference of one task), but for those functions
  that say otherwise.
- Nothing is differentiable: the result is cut off from `gram`'s autograd graph. Within `torch.compile` a call is a
  graph break.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlkernels.ops._common import name_of

__all__ = [
    "agem_coefficient",
    "aligned_weights",
    "cagrad_weights",
    "config_weights",
    "dualproj_weights",
    "fairgrad_weights",
    "gem_weights",
    "gradvac_weights",
    "imtl_g_weights",
    "mgda_weights",
    "nash_weights",
    "pcgrad_weights",
    "upgrad_weights",
]

Array = NDArray[np.float64]
P = ParamSpec("P")
R = TypeVar("R")

#: A matrix this far from symmetric or from positive semidefinite, relative to the gradients' lengths, is no Gram
#: matrix: rounding, even of gradients in bfloat16, does less.
ASYMMETRY = 1e-4
NEGATIVE = 1e-3
EPS = float(np.finfo(np.float64).eps)
FAIR = (0.05, 20.0)


def _eager(function: Callable[P, R]) -> Callable[P, R]:
    """Not traced by torch.compile: a graph break. torch.compiler.disable itself would import the compiler, a second."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapped


# ---- arguments ------------------------------------------------------------------------------------------------------


class _Gram(NamedTuple):
    """A checked Gram matrix of T gradients, of which `active` are not zero."""

    tasks: int
    active: NDArray[np.intp]
    length: Array  # [n] of the active gradients; the longest is 1
    cosine: Array  # [n, n]
    scale: float  # the longest gradient's length
    eps: float  # rounding error of the dtype the matrix came in
    device: torch.device

    @property
    def relative(self) -> Array:
        """Inner products of the active gradients, in units of the longest."""
        return self.length[:, None] * self.cosine * self.length

    def every(self, values: Array, other: float = 0.0) -> Array:
        """One value for each task: the active ones', and `other`."""
        out = np.full(self.tasks, other)
        out[self.active] = values
        return out

    def square(self, values: Array) -> Array:
        """The matrix of the active tasks among zeros for the others."""
        out = np.zeros((self.tasks, self.tasks))
        out[np.ix_(self.active, self.active)] = values
        return out

    def out(self, weights: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(weights, np.float64)).to(self.device)


def _read(op: str, gram: Tensor, name: str = "gram") -> _Gram:
    if not isinstance(gram, Tensor):
        raise TypeError(f"{op}: {name} is a {type(gram).__name__}; expected a tensor")
    if gram.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} has dtype {name_of(gram.dtype)}; expected float32 or float64")
    shape = tuple(gram.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"{op}: {name} has shape {shape}; expected (T, T) with T >= 1")
    g: Array = gram.detach().cpu().numpy().astype(np.float64)
    if not np.isfinite(g).all():
        raise ValueError(f"{op}: {name} has a NaN or an infinity; expected finite inner products")
    diagonal = g.diagonal()
    if diagonal.min() < 0:
        t = int(diagonal.argmin())
        raise ValueError(f"{op}: {name}[{t}, {t}] is {diagonal[t]:.6g}; expected a squared length, >= 0")
    info = torch.finfo(gram.dtype)
    norms = np.sqrt(diagonal)
    scale = float(norms.max())
    # below this, inner products lose digits to the end of the dtype's range
    shortest = max(math.sqrt(info.tiny / info.eps), 1e-150 * scale)
    active = np.flatnonzero(norms >= shortest)
    if active.size < shape[0]:
        others = np.abs(g[norms < shortest])
        if others.max() > 1.001 * shortest * scale:
            t, u = (int(i) for i in np.unravel_index(int(others.argmax()), others.shape))
            t = int(np.flatnonzero(norms < shortest)[t])
            raise ValueError(
                f"{op}: {name}[{t}, {t}] is {diagonal[t]:.6g} and {name}[{t}, {u}] is {g[t, u]:.6g}; "
                "expected a matrix of inner products"
            )
        g, norms = g[np.ix_(active, active)], norms[active]
    length = norms / scale if scale > 0 else norms
    cosine = g / norms[:, None] / norms
    n = active.size
    if n:
        skew = np.abs(cosine - cosine.T)
        if skew.max() > ASYMMETRY:
            i, j = (int(active[k]) for k in np.unravel_index(int(skew.argmax()), skew.shape))
            raise ValueError(f"{op}: {name} is not symmetric at [{i}, {j}]; expected a matrix of inner products")
        cosine = (cosine + cosine.T) / 2
        try:
            np.linalg.cholesky(cosine + NEGATIVE * np.eye(n))
        except np.linalg.LinAlgError:
            lowest = float(np.linalg.eigvalsh(cosine)[0])
            raise ValueError(
                f"{op}: {name} has a negative eigenvalue ({lowest:.3g} times the squared lengths); "
                "expected a matrix of inner products, positive semidefinite"
            ) from None
        np.clip(cosine, -1.0, 1.0, out=cosine)
        np.fill_diagonal(cosine, 1.0)
    return _Gram(shape[0], active, length, cosine, scale, float(info.eps), gram.device)


def _preference(op: str, preference: Tensor | Sequence[float] | None, tasks: int, default: float) -> Array:
    if preference is None:
        return np.full(tasks, default)
    values = preference.detach().cpu().tolist() if isinstance(preference, Tensor) else preference
    out = np.array(values, np.float64)
    if out.shape != (tasks,):
        raise ValueError(f"{op}: preference has shape {out.shape}; expected ({tasks},), one for each task")
    if not (np.isfinite(out).all() and out.min() >= 0):
        raise ValueError(f"{op}: preference is {out.tolist()}; expected finite numbers >= 0")
    return out


def _number(op: str, name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}; expected a number")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{op}: {name} is {value}; expected >= 0, finite")
    return float(value)


def _choice(op: str, name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices[:-1])
        raise ValueError(f"{op}: {name} is {value!r}; expected {listed} or {choices[-1]!r}")


def _orders(
    op: str, orders: Tensor | Sequence[Sequence[int]] | None, generator: torch.Generator | None, tasks: int
) -> NDArray[np.intp]:
    if orders is None:
        device = "cpu" if generator is None else generator.device
        drawn = [torch.randperm(tasks, generator=generator, device=device) for _ in range(tasks)]
        return torch.stack(drawn).cpu().numpy().astype(np.intp)
    if generator is not None:
        raise ValueError(f"{op}: got orders and generator; expected one of them")
    rows = orders.cpu().tolist() if isinstance(orders, Tensor) else orders
    try:
        order = np.array(rows)
        right = order.dtype.kind == "i" and bool((np.sort(order, 1) == np.arange(tasks)).all())
        right = right and order.shape == (tasks, tasks)
    except ValueError:  # ragged, of one dimension, or of other sizes
        right = False
    if not right:
        raise ValueError(f"{op}: orders is {rows}; expected {tasks} permutations of 0 to {tasks - 1}")
    return order.astype(np.intp)


# ---- quadratic programs ---------------------------------------------------------------------------------------------


def _sweep(tableau: Array, k: int, sign: float) -> None:
    """Exchange variable k with its residual: into the active set with sign 1, out of it with -1."""
    pivot = tableau[k, k]
    row = tableau[k] / pivot
    tableau -= np.multiply.outer(tableau[:, k], row)
    row *= sign
    row[k] = -1.0 / pivot
    tableau[k] = row
    tableau[:, k] = row


def _nonnegative(h: Array, q: Array, eps: float) -> tuple[Array, NDArray[np.bool_]]:
    """The x >= 0 that minimises x'Hx / 2 - q'x, and where it is positive. H: positive semidefinite, diagonal 1.

    Lawson & Hanson's active-set method for non-negative least squares, in terms of A'A = H and A'b = q, with a tableau
    in place of a factorisation: after sweeps of the active set S it holds x_S = H_SS^-1 q_S, the residuals
    q - H x of the others, their Schur complements on the diagonal, and -H_SS^-1. Every exchange is a rank-one update.
    """
    n = q.shape[0]
    tableau = np.empty((n + 1, n + 1))
    tableau[:n, :n] = h
    tableau[n, :n] = tableau[:n, n] = q
    tableau[n, n] = 0.0
    last = tableau[:n, n]  # a view
    diagonal = np.einsum("ii->i", tableau)[:n]
    x = np.zeros(n)
    inside = np.zeros(n, np.bool_)
    dependent = 4 * n * eps
    largest = float(np.abs(q).max())
    rounding = 2 * n * EPS
    for _ in range(10 * n + 50):  # the objective falls at every turn, so no active set recurs; this is for rounding
        entering = np.where(inside | (diagonal <= dependent), -np.inf, last)
        j = int(entering.argmax())
        if not entering[j] > rounding * (largest + float(x.sum())):
            break
        _sweep(tableau, j, 1.0)
        inside[j] = True
        while True:
            below = np.flatnonzero(inside & (last <= 0))
            if below.size == 0:
                break
            # as far towards the unconstrained minimum as all stay >= 0; who then is 0 leaves
            steps = x[below] / (x[below] - last[below] + 1e-300)
            first = int(below[steps.argmin()])
            x += np.where(inside, float(steps.min()) * (last - x), 0.0)
            x[first] = 0.0
            inside[first] = False
            _sweep(tableau, first, -1.0)
        x = np.where(inside, last, 0.0)
    # what the sweeps have rounded away
    members = np.flatnonzero(inside)
    if members.size:
        rest = q[members] - h[members] @ x
        x[members] -= tableau[np.ix_(members, members)] @ rest
        np.maximum(x, 0.0, out=x)
    return x, inside


def _raise_to_dual_cone(cosine: Array, u: Array, eps: float) -> Array:
    """The v >= u that minimises v'Cv: A'u, projected on the directions that conflict with no row of A."""
    q = -(cosine @ u)
    if q.max() <= 0:
        return u
    return u + _nonnegative(cosine, q, eps)[0]


def _hull(gram: Array, eps: float) -> tuple[Array, NDArray[np.bool_]]:
    """Weights of the shortest vector in the convex hull of vectors with Gram matrix `gram`, and who has one.

    min w'Gw on the simplex is, up to its length, the x >= 0 that minimises x'Gx + s^2 (1'x - 1)^2, for any s.
    """
    diagonal = gram.diagonal()
    lowest = float(diagonal.min())
    if lowest <= 0:
        zero = diagonal <= 0
        return zero / zero.sum(), zero
    # the shortest vector's square: no larger one, or the last digits of the short vectors would be lost in the sum
    h = gram + lowest
    d = np.sqrt(diagonal + lowest)
    x, inside = _nonnegative(h / d[:, None] / d, lowest / d, eps)
    x /= d
    return x / x.sum(), inside


# ---- functions of the Gram matrix -----------------------------------------------------------------------------------


@_eager
def mgda_weights(gram: Tensor) -> Tensor:
    r"""MGDA's weights: the shortest vector in the convex hull of the gradients.

    Parameters
    ----------
    gram : Tensor [T, T], float32 or float64
        Inner products of the tasks' gradients, on any device.

    Returns
    -------
    float64 Tensor [T]
        Non-negative, of sum 1, on `gram`'s device. If gradients are zero, so is the shortest vector: those tasks share
        the weight equally.

    Raises
    ------
    TypeError
        If `gram` is no float32 or float64 tensor.
    ValueError
        If `gram` is not square, not finite, or no matrix of inner products.

    Notes
    -----
    .. math:: \min_w \; w^T G w \quad \text{with} \quad w \ge 0, \; \textstyle\sum_t w_t = 1 ,

    exact, by an active-set method. The direction d has :math:`\langle g_t, d \rangle \ge \lVert d \rVert^2` for every
    t, with equality where w is positive. With dependent gradients several w give the one d; this is one of them.

    References
    ----------
    Jean-Antoine Désidéri. *Multiple-gradient descent algorithm (MGDA) for multiobjective optimization.* Comptes Rendus
    Mathematique 350, 2012. Ozan Sener, Vladlen Koltun. *Multi-Task Learning as Multi-Objective Optimization.* NeurIPS
    2018.
    """
    g = _read("mgda_weights", gram)
    if g.active.size < g.tasks:
        weights = np.ones(g.tasks)
        weights[g.active] = 0.0
        return g.out(weights / weights.sum())
    return g.out(_hull(g.relative, g.eps)[0])


@_eager
def dualproj_weights(gram: Tensor, preference: Tensor | Sequence[float] | None = None) -> Tensor:
    r"""DualProj's weights: the preferred sum, projected on the directions that conflict with no task.

    Parameters
    ----------
    gram : Tensor [T, T], float32 or float64
        Inner products of the tasks' gradients, on any device.
    preference : Tensor or sequence of T numbers >= 0, optional
        Weights u of the sum that is projected. Default 1 / T each.

    Returns
    -------
    float64 Tensor [T]
        On `gram`'s device; none is less than the preference. A task with a zero gradient keeps its preference.

    Raises
    ------
    TypeError
        If `gram` is no float32 or float64 tensor.
    ValueError
        If `gram` is not square, not finite, or no matrix of inner products; if `preference` is not T numbers >= 0.

    Notes
    -----
    .. math:: \min_v \; v^T G v \quad \text{with} \quad v \ge u ,

    exact and not regularised, by an active-set method. The direction :math:`d = \sum_t v_t g_t` has
    :math:`\langle g_t, d \rangle \ge 0` for every t. It is GEM's projection with the tasks themselves as memory.

    References
    ----------
    David Lopez-Paz, Marc'Aurelio Ranzato. *Gradient Episodic Memory for Continual Learning.* NeurIPS 2017. Pierre
    Quinton, Valérian Rey. *Jacobian Descent for Multi-Objective Optimization.* 2024, arXiv:2406.16232.
    """
    op = "dualproj_weights"
    g = _read(op, gram)
    u = _preference(op, preference, g.tasks, 1.0 / g.tasks)
    a = g.active
    if a.size:
        u[a] = _raise_to_dual_cone(g.cosine, u[a] * g.length, g.eps) / g.length
    return g.out(u)


@_eager
def upgrad_weights(gram: Tensor, preference: Tensor | Sequence[float] | None = None) -> Tensor:
    r"""UPGrad's weights: each gradient, projected on the directions that conflict with no task; their mean.

    Parameters
    ----------
    gram : Tensor [T, T], float32 or float64
        Inner products of the tasks' gradients, on any device.
    preference : Tensor or sequence of T numbers >= 0, optional
        Weights u of the sum of the projected gradients. Default 1 / T each, their mean.

    Returns
    -------
    float64 Tensor [T]
        On `gram`'s device; none is less than the preference. A task with a zero gradient keeps its preference.

    Raises
    ------
    TypeError
        If `gram` is no float32 or float64 tensor.
    ValueError
        If `gram` is not square, not finite, or no matrix of inner products; if `preference` is not T numbers >= 0.

    Notes
    -----
    .. math:: w = \sum_t u_t v^{(t)} , \quad
              v^{(t)} = \arg\min_v \; v^T G v \quad \text{with} \quad v \ge e_t ,

    each exact and not regularised, by an active-set method. The direction d has
    :math:`\langle g_t, d \rangle \ge 0` for every t, and where no two tasks conflict it is the preferred sum.

    References
    ----------
    Pierre Quinton, Valérian Rey. *Jacobian Descent for Multi-Objective Optimization.* 2024, arXiv:2406.16232.
    """
    op = "upgrad_weights"
    g = _read(op, gram)
    u = _preference(op, preference, g.tasks, 1.0 / g.tasks)
    a = g.active
    total = np.zeros(a.size)
    for k in range(a.size):
        # e_t in units of its own gradient: the cone does not know lengths
        unit = np.zeros(a.size)
        unit[k] = 1.0
        total += u[a[k]] * g.length[k] * _raise_to_dual_cone(g.cosine, unit, g.eps)
    if a.size:
        u[a] = total / g.length
    return g.out(u)


@_eager
def cagrad_weights(gram: Tensor, c: float = 0.4, *, rescale: Literal[0, 1, 2] = 0) -> Tensor:
    r"""CAGrad's weights: the direction near the mean gradient that serves the worst-served task best.

    Parameters
    ----------
    gram : Tensor [T, T], float32 or float64
        Inner products of the tasks' gradients, on any device.
    c : float >= 0
        Radius of the ball around the mean gradient, in units of its length. 0 is the mean itself; for c >= 1 the
        ball holds the directions of MGDA.
    rescale : {0, 1, 2}
        What the weights are divided by: nothing, as in the paper's problem; :math:`1 + c^2`; or :math:`1 + c`.

    Returns
    -------
    float64 Tensor [T]
        On `gram`'s device, each at least 1 / T before `rescale`. For one task 1 + c, by the equation.

    Raises
    ------
    TypeError
        If `gram` is no float32 or float64 tensor, or `c` no number.
    ValueError
        If `gram` is not square, not finite, or no matrix of inner products; if `c` is negative or `rescale` none of
        the three.

    Notes
    -----
    With the mean :math:`g_0` and :math:`\phi = c^2 \lVert g_0 \rVert^2`,

    .. math:: \max_d \min_t \; \langle g_t, d \rangle \quad \text{with} \quad
              \lVert d - g_0 \rVert^2 \le \phi ,

    through its dual, :math:`\min_w \langle g_w, g_0 \rangle + \sqrt{\phi} \lVert g_w \rVert` over the simplex, with
    :math:`g_w = \sum_t w_t g_t`. Then :math:`d = g_0 + g_w / \lambda` with
    :math:`\lambda = \lVert g_w \rVert / \sqrt\phi`. For a fixed :math:`\lambda` the w is that of the shortest vector in
    the hull of :math:`g_t + \lambda g_0`, a quadratic program, and on its active set the :math:`\lambda` that fits is
    known in closed form: a few such steps find both exactly.

    Where the hull of the gradients holds zero (a Pareto-stationary point) and no direction of the ball is better than
    0 for every task, several are optimal; this takes the projection of :math:`g_0` on the directions that conflict
    with no task, as `dualproj_weights`.

    A zero gradient counts: it is part of the mean, and no direction is better than 0 for it.

    References
    ----------
    Bo Liu et al. *Conflict-Averse Gradient Descent for Multi-task Learning.* NeurIPS 2021, arXiv:2110.14048.
    """
    op = "cagrad_weights"
    g = _read(op, gram)
    c = _number(op, "c", c)
    _choice(op, "rescale", rescale, (0, 1, 2))
    weights = np.full(g.tasks, 1.0 / g.tasks)
    if c > 0 and g.active.size:
        weights += _cagrad_step(g, c)
    return g.out(weights / (1.0, 1.0 + c * c, 1.0 + c)[rescale])


def _cagrad_step(g: _Gram, c: float) -> Array:
    """Weights of d - g_0. Zero gradients are tasks as any here: rows of zeros."""
    n = g.tasks
    products = g.square(g.relative)
    towards = products.sum(1) / n  # <g_t, g_0>
    mean = float(towards.sum()) / n
    tiny = 16 * n * g.eps
    if mean <= tiny * float(np.abs(products).sum()) / n**2:
        return np.zeros(n)  # the mean is zero, and so is the ball
    radius = c * c * mean
    w, inside = _hull(products, g.eps)
    shortest = float(w @ products @ w)
    # relative to the terms that cancel in it
    stationary = shortest <= tiny * float(w[g.active] @ g.length) ** 2
    if stationary:
        u = g.length / n
        step = g.every((_raise_to_dual_cone(g.cosine, u, g.eps) - u) / g.length)
        terms = float(np.abs(step[g.active]) @ g.length)
        if float(step @ products @ step) <= radius + tiny * terms**2:
            return step
    # The root l of |g_w(l)| = l sqrt(radius) lies between these; the left-hand side grows slower than l
    low = 0.0 if stationary else math.sqrt(shortest / radius)
    high = float(g.length.max()) / math.sqrt(radius)
    at = low if low > 0 else high
    for _ in range(200):
        w, inside = _hull(products + at * (towards[:, None] + towards) + at * at * mean, g.eps)
        if float(w @ products @ w) > at * at * radius:
            low = max(low, at)
        else:
            high = min(high, at)
        # on this active set w = start + l slope, with start and slope orthogonal in G
        members = np.flatnonzero(inside)
        block = products[np.ix_(members, members)]
        sides = np.stack([np.ones(members.size), towards[members]], 1)
        fits = math.inf
        with contextlib.suppress(np.linalg.LinAlgError):  # dependent after all: halve the interval
            solved = np.linalg.solve(block + max(float(block.diagonal().min()), 1e-3 * mean), sides)
            start = solved[:, 0] / solved[:, 0].sum()
            slope = start * solved[:, 1].sum() - solved[:, 1]
            left = radius - float(slope @ block @ slope)
            if left > 0:
                fits = math.sqrt(max(float(start @ block @ start), 0.0) / left)
        if abs(fits - at) <= 1e-13 * at or high - low <= 1e-14 * high:
            break
        at = fits if low < fits < high else math.sqrt(max(low, 1e-9 * high) * high)
    square = float(w @ products @ w)
    if square <= tiny * float(w[g.active] @ g.length) ** 2:  # no digit left in it
        return w / at
    return w * math.sqrt(radius / square)


# ---- equations ------------------------------------------------------------------------------------------------------


def _fair(g: _Gram, alpha: float, op: str) -> Array:
    """The w > 0 with Gw = w^(-1/alpha) over the active tasks."""
    n = g.active.size
    if n == 0:
        return np.zeros(g.tasks)
    w, _ = _hull(g.cosine, g.eps)
    if float(w @ g.cosine @ w) <= 16 * n * g.eps:  # some weighted sum of the gradients is zero: no w fits
        w /= g.length
        return g.every(w / w.sum())
    # w = y |g|^(-2 alpha / (1 + alpha)) makes the diagonal of both sides alike: y is 1 for orthogonal gradients
    power = 1.0 / alpha
    k = g.length ** (2 * (1 - alpha) / (1 + alpha))
    root = np.sqrt(k)
    m = root[:, None] * g.cosine * root
    y = np.full(n, (k.sum() / max(float(m.sum()), 1e-12 * float(k.sum()))) ** (1 / (1 + power)))
    absolute = np.abs(m)
    best, found, stalled, settled = math.inf, y, 0, False
    # Newton's method for the minimum of y'My / 2 - sum k psi(y), psi' = y^-power: strictly convex
    for _ in range(1000):
        left, right = m @ y, k * y**-power
        error = float(np.abs(left / right - 1.0).max())
        if error < best:
            best, found, stalled = error, y, 0
        else:
            stalled += 1
        if error <= 1e-14:
            settled = True
            break
        gradient = left - right
        step = -np.linalg.solve(m + np.diag(power * right / y), gradient)
        descent = float(step @ gradient)
        # twice what is left to gain, and what of it rounding of the products makes: near a stationary point, where
        # large terms cancel in them, few digits are left
        noise = float(((EPS * (absolute @ y)) ** 2 * y / right).sum()) / power
        settled = -descent <= 1e-24 * float(right @ y) + 64 * n * noise
        if descent >= 0 or (settled and stalled > 3):
            break
        shrinking = step < 0
        size = min(1.0, 0.95 * float((y[shrinking] / -step[shrinking]).min())) if shrinking.any() else 1.0
        # not past the minimum along the step by more than half the slope it started with, unless that is rounding
        trial = y + size * step
        while not settled and size > 1e-12 and float(step @ (m @ trial - k * trial**-power)) > -0.5 * descent:
            size /= 2
            trial = y + size * step
        y = trial
    if not settled:
        raise RuntimeError(f"{op}: found no weights (relative error {best:.3g}); gram is nearly singular")
    return g.every(found * (g.length * g.scale) ** (-2 * alpha / (1 + alpha)))


@_eager
def nash_weights(gram: Tensor) -> Tensor:
    r"""Nash-MTL's weights: the bargaining solution.

    Parameters
    ----------
    gram : Tensor [T, T], float32 or float64
        Inner products of the tasks' gradients, on any device.

    Returns
    -------
    float64 Tensor [T]
        Positive, on `gram`'s device; 0 for a task with a zero gradient, :math:`1 / \lVert g \rVert` for one task.

    Raises
    ------
    TypeError
        If `gram` is no float32 or float64 tensor.
    ValueError
        If `gram` is not square, not finite, or no matrix of inner products.
    RuntimeError
        If Newton's method finds no weights, which takes a nearly singular `gram`.

    Notes
    -----
    .. math:: G w = 1 / w , \quad w > 0 ,

    the minimum of the convex :math:`\tfrac12 w^T G w - \sum_t \log w_t`, by Newton's method to rounding error. The
    direction's length is always :math:`\sqrt T`, whatever the gradients' lengths; the paper's code shortens it to 1 by
    default. Every task gains the same share: :math:`w_t \langle g_t, d \rangle = 1`.

    At a Pareto-stationary point, where the hull of the gradients holds zero (two opposite tasks), no w solves it. The
    weights are then those of that zero: non-negative, of sum 1, and the direction is zero to rounding error.

    References
    ----------
    Aviv Navon et al. *Multi-Task Learning as a Bargaining Game.* ICML 2022, arXiv:2202.01017.
    """
    op = "nash_weights"
    return _fairest(op, gram, 1.0)


@_eager
def fairgrad_weights(gram: Tensor, alpha: float = 1.0) -> Tensor:
    r"""FairGrad's weights: those of an alpha-fair allocation of the update to the tasks.

    Parameters
    ----------
    gram : Tensor [T, T], float32 or float64
        Inner products of the tasks' gradients, on any device.
    alpha : float in [0.05, 20]
        Kind of fairness: towards 0 the sum of the gradients, 1 proportional (Nash-MTL), 2 minimal potential delay,
        larger ones towards the worst-served task.

    Returns
    -------
    float64 Tensor [T]
        Positive, on `gram`'s device; 0 for a task with a zero gradient,
        :math:`\lVert g \rVert^{-2 \alpha / (1 + \alpha)}` for one task.

    Raises
    ------
    TypeError
        If `gram` is no float32 or float64 tensor, or `alpha` no number.
    ValueError
        If `gram` is not square, not finite, or no matrix of inner products; if `alpha` is not in [0.05, 20].
    RuntimeError
        If Newton's method finds no weights, which takes a nearly singular `gram`.

    Notes
    -----
    .. math:: G w = w^{-1 / \alpha} , \quad w > 0 ,

    the minimum of a convex function, by Newton's method to rounding error. At a Pareto-stationary point no w solves
    it; see `nash_weights` for what is returned there. For an alpha below 1 a gradient that is a millionth as long as
    others has few correct digits in its weight: what the direction is worth to it is the rest of much larger terms.

    References
    ----------
    Hao Ban, Kaiyi Ji. *Fair Resource Allocation in Multi-Task Learning.* ICML 2024, arXiv:2402.15638.
    """
    op = "fairgrad_weights"
    alpha = _number(op, "alpha", alpha)
    if not FAIR[0] <= alpha <= FAIR[1]:  # weights, or what they are powers of, would leave the range of float64
        raise ValueError(f"{op}: alpha is {alpha}; expected a number in [{FAIR[0]}, {FAIR[1]}]")
    return _fairest(op, gram, alpha)


def _fairest(op: str, gram: Tensor, alpha: float) -> Tensor:
    g = _read(op, gram)
    return g.out(_fair(g, alpha, op))


# ---- closed forms ---------------------------------------------------------------------------------------------------


def _eigen(matrix: Array, eps: float) -> tuple[Array, Array]:
    """Eigenvalues, descending, and vectors, without those that rounding makes of zero."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > matrix.shape[0] * eps * float(values[-1])
    return values[kept][::-1], vectors[:, kept][:, ::-1]


@_eager
def imtl_g_weights(gram: Tensor) -> Tensor:
    r"""IMTL-G's weights: the direction with the same projection on every task's gradient.

    Parameters
    ----------
    gram : Tensor [T, T], float32 or float64
        Inner products of the tasks' gradients, on any device.

    Returns
    -------
    float64 Tensor [T]
        Of sum 1, on `gram`'s device; they may be negative. 0 for a task with a zero gradient. All 0 where the weights
        of the direction sum to zero, as for opposite tasks of equal length.

    Raises
    ------
    TypeError
        If `gram` is no float32 or float64 tensor.
    ValueError
        If `gram` is not square, not finite, or no matrix of inner products.

    Notes
    -----
    .. math:: \langle d, g_t \rangle / \lVert g_t \rVert = \text{const}, \quad \textstyle\sum_t w_t = 1 :
              \quad w = v / \textstyle\sum_t v_t , \quad v = G^+ \sqrt{\operatorname{diag} G} .

    With dependent gradients the pseudo-inverse gives the least-squares solution.

    References
    ----------
    Liyang Liu et al. *Towards Impartial Multi-task Learning.* ICLR 2021. Pierre Quinton, Valérian Rey. *Jacobian
    Descent for Multi-Objective Optimization.* 2024, arXiv:2406.16232 (with a pseudo-inverse).
    """
    g = _read("imtl_g_weights", gram)
    if not g.active.size:
        return g.out(np.zeros(g.tasks))
    values, vectors = _eigen(g.cosine, g.eps)
    if values.size == g.active.size:  # lengths divided out: exact however different they are
        v = (vectors @ (vectors.sum(0) / values)) / g.length
    else:
        values, vectors = _eigen(g.relative, g.eps)
        v = vectors @ ((g.length @ vectors) / values)
    total = float(v.sum())
    if abs(total) <= 1e-12 * float(np.abs(v).sum()):
        return g.out(np.zeros(g.tasks))
    return g.out(g.every(v / total))


@_eager
def aligned_weights(
    gram: Tensor,
    preference: Tensor | Sequence[float] | None = None,
    *,
    scale: Literal["min", "median", "rmse"] = "min",
) -> Tensor:
    r"""Aligned-MTL's weights: the preferred sum of gradients whose matrix has equal singular values.

    Parameters
    ----------
    gram : Tensor [T, T], float32 or float64
        Inner products of the tasks' gradients, on any device.
    preference : Tensor or sequence of T numbers >= 0, optional
        Weights u of the aligned gradients. Default 1 / T each.
    scale : {"min", "median", "rmse"}
        The common singular value: the smallest that is not zero, as in the paper; the (lower) median; the root of the
        mean square.

    Returns
    -------
    float64 Tensor [T]
        On `gram`'s device. 0 for a task with a zero gradient; the preference where all are zero.

    Raises
    ------
    TypeError
        If `gram` is no float32 or float64 tensor.
    ValueError
        If `gram` is not square, not finite, or no matrix of inner products; if `preference` is not T numbers >= 0 or
        `scale` none of the three.

    Notes
    -----
    .. math:: w = \sigma V \Lambda^{-1/2} V^T u , \quad G = V \Lambda V^T ,

    over the eigenvalues that are not zero, with :math:`\sigma^2` their least, their median or their mean.

    References
    ----------
    Dmitry Senushkin et al. *Independent Component Alignment for Multi-Task Learning.* CVPR 2023, arXiv:2305.19000.
    """
    op = "aligned_weights"
    g = _read(op, gram)
    u = _preference(op, preference, g.tasks, 1.0 / g.tasks)
    _choice(op, "scale", scale, ("min", "median", "rmse"))
    if not g.active.size:
        return g.out(u)
    values, vectors = _eigen(g.relative, g.eps)
    common = {"min": values[-1], "median": values[values.size // 2], "rmse": values.mean()}[scale]
    return g.out(g.every(vectors @ (np.sqrt(common / values) * (u[g.active] @ vectors))))


@_eager
def config_weights(gram: Tensor, preference: Tensor | Sequence[float] | None = None) -> Tensor:
    r"""ConFIG's weights: the direction at the same angle to every task's gradient, as long as their projections on it.

    Parameters
    ----------
    gram : Tensor [T, T], float32 or float64
        Inner products of the tasks' gradients, on any device.
    preference : Tensor or sequence of T numbers >= 0, optional
        Ratios p of the cosines to the tasks' gradients. Default 1 each.

    Returns
    -------
    float64 Tensor [T]
        On `gram`'s device; they may be negative. 0 for a task with a zero gradient. All 0 where no direction has the
        cosines' sign, as for two opposite tasks.

    Raises
    ------
    TypeError
        If `gram` is no float32 or float64 tensor.
    ValueError
        If `gram` is not square, not finite, or no matrix of inner products; if `preference` is not T numbers >= 0.

    Notes
    -----
    With the unit gradients in the rows of U,

    .. math:: b = U^+ p , \quad d = \Big(\sum_t \langle g_t, \hat b \rangle\Big) \hat b , \quad
              \hat b = b / \lVert b \rVert .

    From the Gram matrix :math:`\hat G = U U^T` of the unit gradients, :math:`b = U^T \hat G^+ p`.

    References
    ----------
    Qiang Liu, Mengyu Chu, Nils Thuerey. *ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks.*
    ICLR 2025, arXiv:2408.11104.
    """
    op = "config_weights"
    g = _read(op, gram)
    p = _preference(op, preference, g.tasks, 1.0)[g.active]
    if not g.active.size:
        return g.out(np.zeros(g.tasks))
    values, vectors = _eigen(g.cosine, g.eps)
    along = p @ vectors
    along[np.abs(along) <= 8 * p.size * g.eps * float(np.linalg.norm(p))] = 0.0
    square = float((along * along / values).sum())  # |b|^2
    if square == 0.0:
        return g.out(np.zeros(g.tasks))
    projections = float(g.length @ (vectors @ along))  # sum_t <g_t, b>
    return g.out(g.every((projections / square) * (vectors @ (along / values)) / g.length))


# ---- one conflict after another -------------------------------------------------------------------------------------


@_eager
def pcgrad_weights(
    gram: Tensor,
    *,
    orders: Tensor | Sequence[Sequence[int]] | None = None,
    generator: torch.Generator | None = None,
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    r"""PCGrad's weights: each gradient, projected in turn on the normal plane of those it conflicts with.

    Parameters
    ----------
    gram : Tensor [T, T], float32 or float64
        Inner products of the tasks' gradients, on any device.
    orders : int Tensor or sequence [T, T], optional
        Row t is the order in which task t meets the others: a permutation of 0 to T - 1, of which t itself is passed
        over. Default: drawn with ``torch.randperm``, one for each task.
    generator : torch.Generator, optional
        What the orders are drawn from. Default torch's global one.
    reduction : {"sum", "mean"}
        Of the projected gradients; the paper's is the sum.

    Returns
    -------
    float64 Tensor [T]
        On `gram`'s device. 1 (or 1 / T) for a task with a zero gradient.

    Raises
    ------
    TypeError
        If `gram` is no float32 or float64 tensor.
    ValueError
        If `gram` is not square, not finite, or no matrix of inner products; if `orders` is not T permutations, or given
        with `generator`; if `reduction` is neither of the two.

    Notes
    -----
    For each task i, with :math:`g_i^{PC} = g_i` at first, for j in its order:

    .. math:: g_i^{PC} \leftarrow g_i^{PC} - \frac{\langle g_i^{PC}, g_j \rangle}{\lVert g_j \rVert^2} g_j
              \quad \text{if} \quad \langle g_i^{PC}, g_j \rangle < 0 .

    References
    ----------
    Tianhe Yu et al. *Gradient Surgery for Multi-Task Learning.* NeurIPS 2020, arXiv:2001.06782.
    """
    op = "pcgrad_weights"
    g = _read(op, gram)
    _choice(op, "reduction", reduction, ("sum", "mean"))
    order = _orders(op, orders, generator, g.tasks)
    cosine = g.square(g.cosine)
    length = g.every(g.length)
    rows = np.arange(g.tasks)
    # in units of the tasks' unit gradients: coefficients of every g_i^PC, and its products with the unit gradients
    coefficients, dots = np.diag(length), length[:, None] * cosine
    for column in order.T:
        dot = dots[rows, column]
        conflict = (dot < 0) & (column != rows)
        if conflict.any():
            step = np.where(conflict, -dot, 0.0)
            coefficients[rows, column] += step
            dots += step[:, None] * cosine[column]
    weights = g.every(coefficients.sum(0)[g.active] / g.length, 1.0)
    return g.out(weights if reduction == "sum" else weights / g.tasks)


@_eager
def gradvac_weights(
    gram: Tensor,
    targets: Tensor | None = None,
    *,
    beta: float = 0.5,
    orders: Tensor | Sequence[Sequence[int]] | None = None,
    generator: torch.Generator | None = None,
    reduction: Literal["sum", "mean"] = "sum",
) -> tuple[Tensor, Tensor]:
    r"""GradVac's weights: each gradient, turned towards those to which its cosine is below the usual one.

    Parameters
    ----------
    gram : Tensor [T, T], float32 or float64
        Inner products of the tasks' gradients, on any device.
    targets : Tensor [T, T], optional
        The usual cosines :math:`\hat\phi`, between -1 and 1: what the previous call returned. Default 0, as at the
        start. The diagonal has no meaning.
    beta : float in [0, 1]
        Weight of the new cosine in the moving average.
    orders, generator, reduction
        As for `pcgrad_weights`.

    Returns
    -------
    weights : float64 Tensor [T]
        On `gram`'s device. 1 (or 1 / T) for a task with a zero gradient.
    targets : float64 Tensor [T, T]
        The moving average, for the next call; what was passed in is left as it is. Pairs with a zero gradient keep
        their target.

    Raises
    ------
    TypeError
        If `gram` or `targets` is no float32 or float64 tensor, or `beta` no number.
    ValueError
        If `gram` is not square, not finite, or no matrix of inner products; if `targets` has another shape or elements
        that are no cosines; if `beta` is not in [0, 1]; as `pcgrad_weights` for the others.

    Notes
    -----
    For each task i, with :math:`g_i' = g_i` at first, for j in its order, with :math:`\phi` the cosine of
    :math:`g_i'` and :math:`g_j`:

    .. math:: g_i' \leftarrow g_i' + \frac{\lVert g_i' \rVert \big(\hat\phi_{ij} \sqrt{1 - \phi^2}
              - \phi \sqrt{1 - \hat\phi_{ij}^2}\big)}{\lVert g_j \rVert \sqrt{1 - \hat\phi_{ij}^2}} g_j
              \quad \text{if} \quad \phi < \hat\phi_{ij} ,

    after which their cosine is the target, and
    :math:`\hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta \phi`. A target of 1, which no finite step
    reaches, counts as one whose sine is 1e-8. Every :math:`g_i'` stays a sum of the gradients, so their Gram matrix is
    enough.

    References
    ----------
    Zirui Wang et al. *Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual
    Models.* ICLR 2021, arXiv:2010.05874.
    """
    op = "gradvac_weights"
    g = _read(op, gram)
    if _number(op, "beta", beta) > 1:
        raise ValueError(f"{op}: beta is {beta}; expected a number in [0, 1]")
    _choice(op, "reduction", reduction, ("sum", "mean"))
    usual = _targets(op, targets, g.tasks)
    order = _orders(op, orders, generator, g.tasks)
    cosine = g.square(g.cosine)
    length = g.every(g.length)
    nonzero = length > 0
    rows = np.arange(g.tasks)
    coefficients, dots = np.diag(length), length[:, None] * cosine
    for column in order.T:
        norm = np.sqrt(np.maximum((coefficients * dots).sum(1), 0.0))
        met = (column != rows) & nonzero[column] & (norm > 1e-12 * length)
        phi = np.clip(np.where(met, dots[rows, column] / np.where(met, norm, 1.0), 0.0), -1.0, 1.0)
        target = usual[rows, column]
        turned = met & (phi < target)
        if turned.any():
            sine = np.sqrt(np.maximum(1.0 - target * target, 0.0))
            step = norm * (target * np.sqrt(1.0 - phi * phi) - phi * sine) / np.maximum(sine, 1e-8)
            step = np.where(turned, step, 0.0)
            coefficients[rows, column] += step
            dots += step[:, None] * cosine[column]
        usual[rows, column] = np.where(met, (1.0 - beta) * target + beta * phi, target)
    weights = g.every(coefficients.sum(0)[g.active] / g.length, 1.0)
    return g.out(weights if reduction == "sum" else weights / g.tasks), g.out(usual)


def _targets(op: str, targets: Tensor | None, tasks: int) -> Array:
    if targets is None:
        return np.zeros((tasks, tasks))
    if not isinstance(targets, Tensor):
        raise TypeError(f"{op}: targets is a {type(targets).__name__}; expected a tensor")
    if targets.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: targets has dtype {name_of(targets.dtype)}; expected float32 or float64")
    if tuple(targets.shape) != (tasks, tasks):
        raise ValueError(f"{op}: targets has shape {tuple(targets.shape)}; expected ({tasks}, {tasks})")
    out: Array = targets.detach().cpu().numpy().astype(np.float64)  # a copy
    if not (np.abs(out) <= 1).all():
        raise ValueError(f"{op}: targets has elements outside [-1, 1] or NaN; expected cosines")
    return out


# ---- projections of continual learning ------------------------------------------------------------------------------


@_eager
def gem_weights(gram_memory: Tensor, products: Tensor, margin: float = 0.0) -> Tensor:
    r"""GEM's weights: how much of each memory's gradient to add, so that the update conflicts with none of them.

    Parameters
    ----------
    gram_memory : Tensor [M, M], float32 or float64
        Inner products of the gradients on the M memories, on any device.
    products : Tensor [M], floating point
        Inner products of the memories' gradients with the gradient g to be corrected.
    margin : float >= 0
        Least weight of every memory, which favours backward transfer; GEM's memory strength.

    Returns
    -------
    float64 Tensor [M]
        The v of :math:`g + \sum_m v_m g_m`, on `gram_memory`'s device. The margin where nothing conflicts and for a
        memory with a zero gradient.

    Raises
    ------
    TypeError
        If `gram_memory` is no float32 or float64 tensor, `products` no floating-point tensor or `margin` no number.
    ValueError
        If `gram_memory` is not square, not finite, or no matrix of inner products; if `products` is not M finite
        numbers; if `margin` is negative.

    Notes
    -----
    .. math:: \min_v \; \tfrac12 v^T G v + p^T v \quad \text{with} \quad v \ge \text{margin} ,

    the dual of :math:`\min_{\tilde g} \lVert \tilde g - g \rVert^2` with
    :math:`\langle \tilde g, g_m \rangle \ge 0` (for a margin of 0), exact and not regularised, by an active-set method.
    GEM solves it only when one of `products` is negative; that is the caller's to ask.

    References
    ----------
    David Lopez-Paz, Marc'Aurelio Ranzato. *Gradient Episodic Memory for Continual Learning.* NeurIPS 2017,
    arXiv:1706.08840.
    """
    op = "gem_weights"
    g = _read(op, gram_memory, "gram_memory")
    if not isinstance(products, Tensor):
        raise TypeError(f"{op}: products is a {type(products).__name__}; expected a tensor")
    if not products.is_floating_point():
        raise TypeError(f"{op}: products has dtype {name_of(products.dtype)}; expected a floating-point one")
    if tuple(products.shape) != (g.tasks,):
        raise ValueError(
            f"{op}: products has shape {tuple(products.shape)}; expected ({g.tasks},), one for each memory"
        )
    p: Array = products.detach().cpu().double().numpy()
    if not np.isfinite(p).all():
        raise ValueError(f"{op}: products has a NaN or an infinity; expected finite inner products")
    margin = _number(op, "margin", margin)
    weights = np.full(g.tasks, margin)
    if g.active.size:
        norms = g.length * g.scale
        q = -(p[g.active] / norms + margin * (g.cosine @ norms))
        if q.max() > 0:
            weights[g.active] += _nonnegative(g.cosine, q, g.eps)[0] / norms
    return g.out(weights)


@_eager
def agem_coefficient(dot: float | Tensor, reference_square: float | Tensor) -> float:
    r"""A-GEM's coefficient: how much of the memory's gradient to add, so that the update does not conflict with it.

    Parameters
    ----------
    dot : float or Tensor of one element
        :math:`\langle g, g_{ref} \rangle`, the gradient with that on the memory.
    reference_square : float or Tensor of one element
        :math:`\langle g_{ref}, g_{ref} \rangle`.

    Returns
    -------
    float
        The c >= 0 of :math:`g + c \, g_{ref}`. 0 where nothing conflicts, and for a reference of zero.

    Raises
    ------
    TypeError
        If one is neither a number nor a tensor.
    ValueError
        If one is not finite or not one element; if `reference_square` is negative.

    Notes
    -----
    .. math:: c = \max\Big(0, -\frac{\langle g, g_{ref} \rangle}{\lVert g_{ref} \rVert^2}\Big) .

    References
    ----------
    Arslan Chaudhry et al. *Efficient Lifelong Learning with A-GEM.* ICLR 2019, arXiv:1812.00420.
    """
    op = "agem_coefficient"
    values = []
    for name, value in (("dot", dot), ("reference_square", reference_square)):
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; expected one element")
            value = float(value.detach())
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} is a {type(value).__name__}; expected a number or a tensor of one element")
        if not math.isfinite(value):
            raise ValueError(f"{op}: {name} is {value}; expected a finite number")
        values.append(value)
    product, square = values
    if square < 0:
        raise ValueError(f"{op}: reference_square is {square}; expected >= 0")
    if product >= 0 or square == 0:
        return 0.0
    return -product / square
