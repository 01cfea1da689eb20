r"""Products with the Gauss-Newton or Fisher matrix, and its spectrum by the Lanczos method.

The operator is fixed: batches are kept, and sampled labels are drawn once. (An operator that draws labels at each
product is a different matrix each time, and Lanczos' recurrence then finds eigenvalues of none.)

Barak Pearlmutter. *Fast exact multiplication by the Hessian.* Neural Computation 1994.
Nicol Schraudolph. *Fast curvature matrix-vector products for second-order gradient descent.* Neural Computation 2002.
Cornelius Lanczos. 1950; G. Golub and C. Van Loan. *Matrix Computations.*
Behrooz Ghorbani et al. *An Investigation into Neural Net Optimization via Hessian Eigenvalue Density.* ICML 2019,
arXiv:1901.10159 (stochastic Lanczos quadrature).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tlkernels.nn.fisher._batches import Forward, count_samples, default_forward, plain
from tlkernels.nn.fisher._engine import borrowed, trainable
from tlkernels.nn.fisher._losses import Loss

__all__ = ["GaussNewton", "Spectrum", "fisher_spectrum"]


class _Call(nn.Module):
    """What a model makes of a batch, as a module that can be called with other parameters."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self._forward = model, forward

    def forward(self, batch: Any) -> Any:
        return self._forward(self.model, batch)


class GaussNewton:
    r"""The generalised Gauss-Newton or Fisher matrix of a model over data, as a fixed symmetric operator.

    Parameters
    ----------
    model : torch.nn.Module
        Unchanged; products use the parameters' values at the time of the product.
    loss : "cross_entropy", "mse" or callable
        As for `FisherDiagonal`.
    data : iterable of batches
        Read once and kept.
    kind : "ggn", "empirical" or "sampled"
        "ggn": the loss's Hessian by the outputs between two Jacobians; for "cross_entropy" and "mse" that is the
        Fisher matrix, with the expectation over labels taken exactly. "empirical": second moment of the per-sample
        gradients. "sampled": the same at labels from the predictive distribution, drawn once, here.
    parameters, forward, reduction, token_reduction, ignore_index, generator, eval_mode
        As for `FisherDiagonal`.

    Attributes
    ----------
    shape : tuple of int
        ``(P, P)``, P the number of entries of the parameters.
    dtype : torch.dtype
    device : torch.device
    count : int
        Samples.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Notes
    -----
    .. math::
        \text{ggn: } \frac1N \sum_n J_n^\top H_n J_n, \qquad
        \text{empirical, sampled: } \frac1N \sum_n g_n g_n^\top .

    :math:`Jv` is taken by differentiating :math:`J^\top u` twice backward, so every op of the model needs double
    backward; attention takes its unfused form. A model with reentrant checkpoints cannot be differentiated so: switch
    them off. With a callable loss the "ggn" has its Hessian by the outputs, which only a convex loss makes positive
    semi-definite.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.nn.fisher import GaussNewton
    >>> model = torch.nn.Linear(4, 3)
    >>> operator = GaussNewton(model, "cross_entropy", [(torch.randn(6, 4), torch.randint(3, (6,)))])
    >>> (operator @ torch.ones(15)).shape
    torch.Size([15])
    """

    def __init__(
        self, model: nn.Module, loss: str | Callable[[Any, Any], Tensor], data: Iterable[Any], kind: str = "ggn", *,
        parameters: Iterable[str] | None = None, forward: Forward | None = None, reduction: str | None = None,
        token_reduction: str = "sum", ignore_index: int = -100, generator: torch.Generator | None = None,
        eval_mode: bool = True,
    ) -> None:  # fmt: skip
        op = self._op = "GaussNewton"
        if kind not in ("ggn", "empirical", "sampled"):
            raise ValueError(f"{op}: kind is {kind!r}; expected 'ggn', 'empirical' or 'sampled'")
        self._parameters = trainable(op, model, parameters)
        self._loss = Loss(
            op, loss, kind="sampled" if kind == "sampled" else "empirical", reduction=reduction,
            ignore_index=ignore_index, token_reduction=token_reduction,
        )  # fmt: skip
        self.model, self.kind, self._eval_mode = model, kind, eval_mode
        self._call = _Call(model, default_forward if forward is None else forward)
        values = list(self._parameters.values())
        self.device, self.dtype = values[0].device, values[0].dtype
        for p in values:
            if p.device != self.device or p.dtype != self.dtype:
                raise ValueError(f"{op}: model has parameters of several devices or dtypes; expected one of each")
        size = sum(p.numel() for p in values)
        self.shape = (size, size)
        if not isinstance(data, Iterable) or isinstance(data, (Tensor, dict, str)):
            raise TypeError(f"{op}: data is a {type(data).__name__}; expected an iterable of batches")
        self._batches: list[tuple[Any, Any, int]] = []  # batch, drawn labels, samples
        if kind == "sampled" and generator is None:
            generator = torch.Generator().manual_seed(0)
        with self._borrowed(), torch.no_grad():
            for item in data:
                batch = plain(item, self.device)
                n = count_samples(op, batch)
                if n == 0:
                    continue
                output, target = self._call(batch)
                if kind == "ggn" and target is None and isinstance(loss, str):  # its Hessian is the same at any labels
                    target = self._loss.draw(output, None, torch.Generator().manual_seed(0))
                self._loss.check(output, target, n)
                drawn = self._loss.draw(output, target, generator) if kind == "sampled" else None
                if kind == "ggn":
                    drawn = target
                self._batches.append((batch, drawn, n))
        self.count = sum(n for _, _, n in self._batches)
        if not self.count:
            raise ValueError(f"{op}: data has no samples; expected one or more")

    def _borrowed(self) -> Any:
        others = [self._loss.loss] if isinstance(self._loss.loss, nn.Module) else []
        return borrowed(self._op, self.model, others, self._eval_mode)

    # ---- vectors

    def to_vector(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the tensors of all parameters as one vector, in the operator's order.

        Raises
        ------
        ValueError
            Naming an entry that is missing or of another shape.
        """
        for name, p in self._parameters.items():
            if name not in tensors:
                raise ValueError(f"{self._op}: tensors lack {name!r}; expected one for each parameter")
            if tensors[name].shape != p.shape:
                raise ValueError(
                    f"{self._op}: tensors[{name!r}] has shape {tuple(tensors[name].shape)}; expected {tuple(p.shape)}"
                )
        return torch.cat([tensors[name].detach().reshape(-1).to(self.device, self.dtype) for name in self._parameters])

    def to_dict(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector's parts by parameter name, as views."""
        self._check_vector(vector)
        sizes = [p.numel() for p in self._parameters.values()]
        parts = vector.split(sizes)
        return {name: t.view(p.shape) for (name, p), t in zip(self._parameters.items(), parts, strict=True)}

    def _check_vector(self, vector: Any) -> None:
        if not isinstance(vector, Tensor):
            raise TypeError(f"{self._op}: v is a {type(vector).__name__}; expected a tensor")
        if vector.shape != self.shape[:1]:
            raise ValueError(f"{self._op}: v has shape {tuple(vector.shape)}; expected {self.shape[:1]}")

    # ---- products

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply a vector ``[P]``; the result has the operator's dtype.

        Raises
        ------
        TypeError, ValueError
            If `v` is no tensor of shape ``[P]``.
        """
        self._check_vector(v)
        direction = list(self.to_dict(v.detach().to(self.device, self.dtype)).values())
        out = torch.zeros(self.shape[0], dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        with self._borrowed(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for batch, target, _ in self._batches:
                out += torch.cat([g.reshape(-1) for g in self._product(batch, target, direction)])
        return (out / self.count).to(self.dtype)

    def _product(self, batch: Any, labels: Any, direction: list[Tensor]) -> list[Tensor]:
        leaves = {name: p.detach().requires_grad_() for name, p in self._parameters.items()}
        output, target = torch.func.functional_call(
            self._call, {f"model.{name}": leaf for name, leaf in leaves.items()}, (batch,)
        )
        target = target if labels is None else labels
        values = list(leaves.values())
        f = output if self.kind == "ggn" else self._loss.per_sample(output, target)
        if not f.requires_grad:
            return [torch.zeros_like(p) for p in values]
        # J'u is linear in u; its derivative by u in the direction v is Jv
        u = torch.zeros_like(f, requires_grad=True)
        ju = torch.autograd.grad(f, values, u, create_graph=True, allow_unused=True)
        pairs = [(g, d) for g, d in zip(ju, direction, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return [torch.zeros_like(p) for p in values]
        (jv,) = torch.autograd.grad([g for g, _ in pairs], u, [d for _, d in pairs], retain_graph=True)
        if self.kind == "ggn":
            at = output.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self._loss.per_sample(at, target).sum(), at, create_graph=True)
            jv = torch.autograd.grad(slope, at, jv)[0] if slope.requires_grad else torch.zeros_like(jv)
        found = torch.autograd.grad(f, values, jv, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, values, strict=True)]

    def __matmul__(self, other: Tensor) -> Tensor:
        """Multiply a vector ``[P]``, or a matrix ``[P, K]`` column by column."""
        if isinstance(other, Tensor) and other.dim() == 2:
            return torch.stack([self.matvec(column) for column in other.unbind(1)], 1)
        return self.matvec(other)

    def to_scipy(self) -> Any:
        """Return a `scipy.sparse.linalg.LinearOperator`, which takes and gives NumPy arrays (float64).

        Raises
        ------
        ImportError
            If scipy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator  # type: ignore[import-untyped]
        except ImportError:
            raise ImportError(f"{self._op}.to_scipy needs scipy; install it with `pip install scipy`") from None

        def product(v: Any) -> Any:
            return self.matvec(torch.as_tensor(v, dtype=torch.float64).reshape(-1)).double().cpu().numpy()

        return LinearOperator(self.shape, matvec=product, rmatvec=product, dtype="float64")


# ---- spectrum -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """What Lanczos found.

    Attributes
    ----------
    eigenvalues : Tensor [k], float64
        The largest, descending.
    residuals : Tensor [k], float64
        Norms of ``F v - value v``: each is within that of an eigenvalue.
    eigenvectors : Tensor [P, k] or None
    nodes, weights : Tensor [probes, steps], float64
        Ritz values and weights of each probe; weights of a probe sum to 1. Missing steps have weight 0.
    """

    eigenvalues: Tensor
    residuals: Tensor
    eigenvectors: Tensor | None
    nodes: Tensor
    weights: Tensor

    def density(self, points: Tensor, sigma: float) -> Tensor:
        r"""Return the spectral density at `points`, each eigenvalue as a normal density of width `sigma`.

        Raises
        ------
        ValueError
            If sigma is not > 0.

        Notes
        -----
        .. math:: \phi(x) = \frac1R \sum_{r} \sum_i w_{ri} \, \mathcal{N}(x; \lambda_{ri}, \sigma^2)
        """
        if not sigma > 0:
            raise ValueError(f"Spectrum: sigma is {sigma}; expected > 0")
        distance = (points.to(self.nodes).reshape(-1, 1, 1) - self.nodes) / sigma
        bumps = (-0.5 * distance.square()).exp() / (sigma * math.sqrt(2 * math.pi))
        return (bumps * self.weights).sum((1, 2)).div(self.nodes.shape[0]).reshape(points.shape)


def fisher_spectrum(
    operator: Any, k: int = 10, *, steps: int | None = None, probes: int = 1, tol: float = 1e-6,
    eigenvectors: bool = False, generator: torch.Generator | None = None,
) -> Spectrum:  # fmt: skip
    r"""Largest eigenvalues and spectral density of a fixed symmetric operator.

    Parameters
    ----------
    operator : GaussNewton, symmetric Tensor [P, P], or anything with ``shape`` and ``@``
        Multiplied with vectors only.
    k : int
        Eigenvalues, 1 to P. Default 10.
    steps : int, optional
        Products for each probe, at least k. By default they go on until the k largest residuals are below
        ``tol * largest eigenvalue``, at most P.
    probes : int
        Random starts; more make a better density. Eigenvalues come from the first. Default 1.
    tol : float
        Relative accuracy for `steps` None. Default 1e-6.
    eigenvectors : bool
        Whether to return them.
    generator : torch.Generator, optional
        Of the starts, on the CPU; seed 0 by default.

    Returns
    -------
    Spectrum

    Raises
    ------
    TypeError, ValueError
        If the operator is not square, or an argument is out of range; if a product is not finite.

    Notes
    -----
    The basis is kept (``steps * P`` numbers in float64) and each new vector made orthogonal to all of it, twice:
    without that, copies of converged eigenvalues appear. Where the recurrence ends early, in an invariant subspace, it
    goes on from a new random vector orthogonal to it, so that eigenvalues of multiplicity above 1 are found as often
    as they occur.

    References
    ----------
    Lanczos, 1950. Ghorbani et al., 2019, arXiv:1901.10159.

    Examples
    --------
    >>> import torch
    >>> from tlkernels.nn.fisher import fisher_spectrum
    >>> fisher_spectrum(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])), k=2).eigenvalues.round(decimals=6)
    tensor([3., 2.], dtype=torch.float64)
    """
    op = "fisher_spectrum"
    shape = tuple(getattr(operator, "shape", ()))
    if len(shape) != 2 or shape[0] != shape[1] or not hasattr(operator, "__matmul__"):
        raise TypeError(
            f"{op}: operator is a {type(operator).__name__} of shape {shape}; expected a square operator with @"
        )
    size = int(shape[0])
    for name, value, most in (("k", k, size), ("probes", probes, None), ("steps", steps, None)):
        if value is None and name == "steps":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
            raise ValueError(
                f"{op}: {name} is {value!r}; expected an integer from 1{'' if most is None else f' to {most}'}"
            )
    if steps is not None and steps < k:
        raise ValueError(f"{op}: steps is {steps}; expected k = {k} or more")
    if not tol > 0:
        raise ValueError(f"{op}: tol is {tol}; expected > 0")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    runs = [_lanczos(op, operator, size, k, steps, tol, generator) for _ in range(probes)]
    diagonal, off, basis, last = runs[0]
    values, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    top = torch.arange(len(values) - 1, len(values) - 1 - k, -1)
    residuals = (last * vectors[-1, top]).abs()
    found = (basis.T @ vectors[:, top].to(basis.device)) if eigenvectors else None
    longest = max(len(run[0]) for run in runs)
    nodes, weights = torch.zeros(2, probes, longest, dtype=torch.float64)
    for r, (alpha, beta, _, _) in enumerate(runs):
        ritz, rotation = torch.linalg.eigh(torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1))
        nodes[r, : len(ritz)], weights[r, : len(ritz)] = ritz, rotation[0].square()
    return Spectrum(values[top], residuals, found, nodes, weights)


def _lanczos(
    op: str, operator: Any, size: int, k: int, steps: int | None, tol: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, float]:
    """(diagonal, off-diagonal, basis [m, P], norm of the last remainder) of one start."""
    device = getattr(operator, "device", torch.device("cpu"))
    dtype = getattr(operator, "dtype", torch.float64)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float64
    most = min(size, steps or size)
    basis = torch.empty((min(most, 64), size), dtype=torch.float64, device=device)

    def start(found: Tensor) -> Tensor:
        v = torch.randn(size, generator=generator, dtype=torch.float64).to(device)
        for _ in range(2):
            v = v - found.T @ (found @ v)
        return v / v.norm()

    alphas: list[float] = []
    betas: list[float] = []
    v, largest = start(basis[:0]), 0.0
    while True:
        m = len(alphas)
        if m == basis.shape[0]:
            basis = torch.cat([basis, torch.empty((min(most - m, m), size), dtype=torch.float64, device=device)])
        basis[m] = v
        w = (operator @ v.to(dtype)).to(torch.float64)
        if not bool(w.isfinite().all()):
            raise ValueError(f"{op}: a product with operator is not finite")
        alphas.append(float(v @ w))
        found = basis[: m + 1]
        for _ in range(2):
            w = w - found.T @ (found @ w)
        beta = float(w.norm())
        largest = max(largest, abs(alphas[-1]), beta)
        done = len(alphas)
        # what is left of a product after 53 (24) bits of cancellation is no direction
        ended = beta <= 100 * torch.finfo(dtype).eps * largest or done == size
        if done >= most:
            return (
                torch.tensor(alphas, dtype=torch.float64),
                torch.tensor(betas, dtype=torch.float64),
                found,
                0.0 if ended else beta,
            )
        if steps is None and done >= min(size, k + 2) and done % 5 == 0 and not ended:
            matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64))
            side = torch.tensor(betas, dtype=torch.float64)
            values, vectors = torch.linalg.eigh(matrix + torch.diag(side, 1) + torch.diag(side, -1))
            if float((beta * vectors[-1, -k:]).abs().max()) <= tol * float(values.abs().max()):
                return torch.tensor(alphas, dtype=torch.float64), side, found, beta
        betas.append(0.0 if ended else beta)
        v = start(found) if ended else w / beta
