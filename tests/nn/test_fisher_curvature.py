"""Products with the Gauss-Newton matrix and its spectrum, against dense matrices and curvlinops."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tlkernels.nn.fisher.curvature
from tlkernels.nn.fisher import FisherDiagonal, GaussNewton, fisher_spectrum


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(seed))


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


DATA = [(draw(5, 2, 4), labels(5, 2)), (draw(2, 2, 4, seed=1), labels(2, 2, seed=1))]
REGRESSION = [(draw(5, 4), draw(5, 3, seed=4)), (draw(2, 4, seed=1), draw(2, 3, seed=5))]


def gradients(model: nn.Module, data: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Per-sample gradients [N, P]."""
    rows = []
    for x, y in data:
        for i in range(len(y)):
            grads = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def token_sum(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="sum")


def ggn(model: nn.Module, data: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """J' H J, dense."""
    total, count = 0.0, 0
    for x, y in data:
        for i in range(len(y)):
            out = model(x[i : i + 1])
            rows = [
                torch.cat([g.flatten() for g in torch.autograd.grad(o, list(model.parameters()), retain_graph=True)])
                for o in out.flatten()
            ]
            jacobian = torch.stack(rows)
            at, target = out.detach().flatten(), y[i : i + 1]
            hessian = torch.autograd.functional.hessian(lambda o, s=out.shape, t=target: loss(o.view(s), t), at)
            total, count = total + jacobian.T @ hessian @ jacobian, count + 1
    return total / count


def dense(operator: GaussNewton) -> Tensor:
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def test_empirical() -> None:
    model = mlp()
    g = gradients(model, DATA, token_sum)
    operator = GaussNewton(model, "cross_entropy", DATA, "empirical")
    assert operator.count == 7 and operator.shape == (53, 53)
    assert float((dense(operator) - g.T @ g / 7).abs().max()) < 1e-12
    diagonal = FisherDiagonal(model, progress=False).accumulate(DATA).diagonal()
    assert float((dense(operator).diagonal() - operator.to_vector(diagonal)).abs().max()) < 1e-12


def test_ggn() -> None:
    model = mlp()
    expected = ggn(model, DATA, token_sum)
    operator = GaussNewton(model, "cross_entropy", DATA)
    assert float((dense(operator) - expected).abs().max()) < 1e-12
    exact = FisherDiagonal(model, kind="exact", progress=False).accumulate(DATA).diagonal()
    assert float((expected.diagonal() - operator.to_vector(exact)).abs().max()) < 1e-12
    without = GaussNewton(model, "cross_entropy", [(x,) for x, _ in DATA])  # the Hessian needs no labels
    assert float((dense(without) - expected).abs().max()) < 1e-12

    def half(out: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (out - y).square().sum()

    expected = ggn(model, REGRESSION, half)
    assert float((dense(GaussNewton(model, "mse", REGRESSION)) - expected).abs().max()) < 1e-12

    def huber(out: Tensor, y: Tensor) -> Tensor:
        return functional.huber_loss(out, y, reduction="none", delta=0.7).pow(1.5).sum(1)

    expected = ggn(model, REGRESSION, lambda out, y: huber(out, y).sum())
    assert float((dense(GaussNewton(model, huber, REGRESSION)) - expected).abs().max()) < 1e-12
    mean = GaussNewton(model, lambda out, y: huber(out, y).mean(), REGRESSION, reduction="mean")
    assert float((dense(mean) - expected).abs().max()) < 1e-12


def test_equals_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, data = mlp(), [(x[:, 0], y[:, 0]) for x, y in DATA]
    v = draw(53)
    for kind, other in (("ggn", curvlinops.GGNLinearOperator), ("empirical", curvlinops.EFLinearOperator)):
        theirs = other(model, nn.CrossEntropyLoss(), list(model.parameters()), data, check_deterministic=False)
        assert float((GaussNewton(model, "cross_entropy", data, kind) @ v - theirs @ v).abs().max()) < 1e-13


def test_sampled_is_one_fixed_matrix() -> None:
    """Labels are drawn once: the same product every time, a symmetric matrix, and of the drawn labels."""
    model = mlp()
    operator = GaussNewton(model, "cross_entropy", DATA, "sampled", generator=torch.Generator().manual_seed(3))
    v, w = draw(53), draw(53, seed=1)
    assert torch.equal(operator @ v, operator @ v)
    assert abs(float(w @ (operator @ v) - v @ (operator @ w))) < 1e-12
    drawn = [(batch[0], target) for batch, target, _ in operator._batches]
    assert not all(torch.equal(y, mine) for (_, y), (_, mine) in zip(DATA, drawn, strict=True))
    g = gradients(model, drawn, token_sum)
    assert float((dense(operator) - g.T @ g / 7).abs().max()) < 1e-12
    again = GaussNewton(model, "cross_entropy", DATA, "sampled", generator=torch.Generator().manual_seed(3))
    assert torch.equal(again @ v, operator @ v)
    many = [(DATA[0][0].repeat(600, 1, 1),)]
    near = GaussNewton(model, "cross_entropy", many, "sampled") @ v
    expected = GaussNewton(model, "cross_entropy", DATA[:1]) @ v
    assert float((near - expected).norm() / expected.norm()) < 0.1


def test_attention_and_frozen_parameters_and_the_model_unchanged() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(4, 3)).double().train()
    layer.norm1.requires_grad_(False)
    layer.linear1.weight.grad = torch.ones_like(layer.linear1.weight)
    operator = GaussNewton(model, "cross_entropy", DATA)
    v = draw(operator.shape[0])
    trainable = [p for p in model.parameters() if p.requires_grad]
    out = operator @ v
    model.eval()
    rows = []
    for x, y in DATA:
        for i in range(len(y)):
            logits = model(x[i : i + 1])
            p = logits.detach().softmax(-1)
            for t in range(2):
                for c in range(3):
                    root = p[0, t, c].sqrt() * (functional.one_hot(torch.tensor(c), 3) - p[0, t])
                    grads = torch.autograd.grad((logits[0, t] * root).sum(), trainable, retain_graph=True)
                    rows.append(torch.cat([g.flatten() for g in grads]))
    g = torch.stack(rows)
    assert float((out - g.T @ (g @ v) / 7).abs().max()) < 1e-11
    model.train()
    operator @ v
    assert model.training and layer.linear1.weight.requires_grad and not layer.norm1.weight.requires_grad
    assert bool((layer.linear1.weight.grad == 1).all()) and layer.linear2.weight.grad is None


def test_vectors_and_scipy() -> None:
    model = mlp()
    operator = GaussNewton(model, "cross_entropy", DATA)
    v = draw(53)
    parts = operator.to_dict(v)
    assert list(parts) == [name for name, _ in model.named_parameters()]
    assert torch.equal(operator.to_vector(parts), v)
    linalg = pytest.importorskip("scipy.sparse.linalg")
    values = linalg.eigsh(operator.to_scipy(), k=3, which="LA", return_eigenvectors=False)[::-1]
    found = fisher_spectrum(operator, 3).eigenvalues
    assert float((found - torch.tensor(values.copy())).abs().max()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_spectrum_of_a_model(dtype: torch.dtype) -> None:
    model = mlp(dtype)
    data = [(x.to(dtype), y) for x, y in DATA]
    operator = GaussNewton(model, "cross_entropy", data)
    matrix = dense(operator).double()
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    found = fisher_spectrum(operator, 6, eigenvectors=True)
    limit = 1e-9 if dtype == torch.float64 else 1e-5
    assert float((found.eigenvalues - expected[:6]).abs().max()) < limit * float(expected[0])
    vectors = found.eigenvectors
    assert float((vectors.T @ vectors - torch.eye(6, dtype=torch.float64)).abs().max()) < 1e-10
    difference = matrix @ vectors - vectors * found.eigenvalues
    assert float(difference.norm(dim=0).max()) < 10 * limit * float(expected[0]) + float(found.residuals.max()) * 1.1
    # as the operator has no copies of converged eigenvalues, neither have the Ritz values
    every = fisher_spectrum(operator, 53, eigenvectors=False)
    assert float((every.eigenvalues - expected).abs().max()) < 10 * limit * float(expected[0])


def test_multiplicity_and_invariant_subspaces() -> None:
    """A start vector sees one direction of each eigenspace; a new start finds the others."""
    values = torch.tensor([5.0] * 3 + [2.0] * 4 + [0.0] * 13, dtype=torch.float64)
    basis = torch.linalg.qr(draw(20, 20)).Q
    matrix = basis @ torch.diag(values) @ basis.T
    found = fisher_spectrum(matrix, 20, eigenvectors=True)
    assert float((found.eigenvalues - values).abs().max()) < 1e-12
    assert float((matrix @ found.eigenvectors - found.eigenvectors * found.eigenvalues).abs().max()) < 1e-11
    zero = fisher_spectrum(torch.zeros(4, 4, dtype=torch.float64), 2)
    assert zero.eigenvalues.tolist() == [0.0, 0.0]
    one = fisher_spectrum(torch.full((1, 1), 3.0), 1)
    assert one.eigenvalues.tolist() == [3.0] and one.residuals.tolist() == [0.0]


def test_few_steps_and_residuals() -> None:
    values = torch.linspace(0, 1, 200, dtype=torch.float64) ** 8 * 10
    basis = torch.linalg.qr(draw(200, 200)).Q
    matrix = basis @ torch.diag(values) @ basis.T
    found = fisher_spectrum(matrix, 2, steps=6, eigenvectors=True)
    assert found.nodes.shape == (1, 6)
    exact = (matrix @ found.eigenvectors - found.eigenvectors * found.eigenvalues).norm(dim=0)
    assert float((exact - found.residuals).abs().max()) < 1e-10 and float(exact.min()) > 1e-4
    tight = fisher_spectrum(matrix, 2)
    assert tight.nodes.shape[1] < 120
    assert float((tight.eigenvalues - values.flip(0)[:2]).abs().max()) < 1e-5


def test_density() -> None:
    """Quadrature is exact for moments of low order, and the density close to the smoothed true one."""
    values = torch.cat([torch.linspace(0, 1, 150), torch.linspace(4, 5, 50)]).double()
    matrix = torch.diag(values)
    found = fisher_spectrum(matrix, 1, steps=40, probes=30)
    assert float((found.weights.sum(1) - 1).abs().max()) < 1e-10
    start = torch.Generator().manual_seed(0)
    v = torch.randn(200, generator=start, dtype=torch.float64)
    v /= v.norm()
    for power in (1, 2, 5):
        moment = float(v @ (values**power * v))
        assert abs(float((found.weights[0] * found.nodes[0] ** power).sum()) - moment) < 1e-9 * moment
    points = torch.linspace(-1, 6, 400, dtype=torch.float64)
    density = found.density(points, 0.2)
    normal = torch.distributions.Normal(values, 0.2)
    expected = normal.log_prob(points[:, None]).exp().mean(1)
    assert abs(float(torch.trapezoid(density, points)) - 1) < 1e-3
    assert float(torch.trapezoid((density - expected).abs(), points)) < 0.05


def test_wrong_input() -> None:
    model = mlp()
    operator = GaussNewton(model, "cross_entropy", DATA)
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: GaussNewton(model, "cross_entropy", DATA, "exact"), ValueError, "GaussNewton: kind is 'exact'"),
        (lambda: GaussNewton(model, "cross_entropy", []), ValueError, "GaussNewton: data has no samples"),
        (lambda: GaussNewton(model, "cross_entropy", DATA[0][0]), TypeError, "GaussNewton: data is a Tensor"),
        (lambda: GaussNewton(model, "cross_entropy", [(DATA[0][0], DATA[0][1] + 3)]), ValueError, "labels hold"),
        (lambda: GaussNewton(model, token_sum, DATA, "sampled"), ValueError, "no predictive distribution"),
        (lambda: GaussNewton(mlp().requires_grad_(False), "mse", DATA), ValueError, "no parameter that requires grad"),
        (lambda: operator @ draw(3), ValueError, r"v has shape \(3,\); expected \(53,\)"),
        (lambda: operator.matvec([1.0]), TypeError, "v is a list"),
        (lambda: operator.to_vector({}), ValueError, "tensors lack '0.weight'"),
        (lambda: fisher_spectrum(draw(3)), TypeError, "operator is a Tensor of shape"),
        (lambda: fisher_spectrum(operator, 0), ValueError, "k is 0"),
        (lambda: fisher_spectrum(operator, 54), ValueError, "k is 54; expected an integer from 1 to 53"),
        (lambda: fisher_spectrum(operator, 5, steps=4), ValueError, "steps is 4"),
        (lambda: fisher_spectrum(operator, probes=0), ValueError, "probes is 0"),
        (lambda: fisher_spectrum(operator, tol=0.0), ValueError, "tol is 0.0"),
        (lambda: fisher_spectrum(torch.full((3, 3), float("nan")), 1), ValueError, "is not finite"),
        (lambda: fisher_spectrum(torch.eye(3), 1).density(draw(3), 0.0), ValueError, "sigma is 0.0"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_docstrings() -> None:
    assert doctest.testmod(tlkernels.nn.fisher.curvature).failed == 0
