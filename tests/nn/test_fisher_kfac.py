"""K-FAC and EK-FAC against curvlinops, and against the definitions in float64."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tlkernels.nn.fisher.kfac
from tlkernels.nn.fisher import EKFAC, KFAC, FisherDiagonal

Batch = tuple[Tensor, Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(seed))


class Tokens(nn.Module):
    """Linear layers over tokens, one label per sample."""

    def __init__(self, bias: bool = True, norm: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5, bias=bias), nn.Linear(5, 3)
        self.norm = nn.LayerNorm(5) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(torch.tanh(self.a(x))).mean(1))


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def vectors(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    return {name: draw(*p.shape, seed=seed + i) for i, (name, p) in enumerate(model.named_parameters())}


def assert_close(found: dict[str, Tensor], expected: Any, limit: float = 1e-12) -> None:
    for (name, got), want in zip(found.items(), expected, strict=True):
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= limit * max(1.0, float(want.abs().max())), name


MODELS: dict[str, tuple[Callable[[], nn.Module], list[Batch]]] = {
    "tokens": (Tokens, [(draw(5, 6, 4), labels(5)), (draw(3, 6, 4, seed=1), labels(3, seed=1))]),
    "conv": (conv_net, [(draw(5, 2, 6, 6), labels(5)), (draw(2, 2, 6, 6, seed=1), labels(2, seed=1))]),
}
KINDS = {"empirical": "empirical", "exact": "type-2"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_kfac_equals_curvlinops(backend: str, name: str, kind: str, approx: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    make, data = MODELS[name]
    model = build(make)
    other = curvlinops.KFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), data, fisher_type=KINDS[kind], kfac_approx=approx,
        separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    found = KFAC(model, kind=kind, approx=approx, progress=False).accumulate(data)
    v = vectors(model)
    assert_close(found.matvec(v), other @ list(v.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_ekfac_equals_curvlinops(backend: str, name: str, kind: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    make, data = MODELS[name]
    model = build(make)
    other = curvlinops.EKFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), data, fisher_type=KINDS[kind],
        separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    found = EKFAC(model, kind=kind, progress=False).fit(data)
    v = vectors(model)
    assert_close(found.matvec(v), other @ list(v.values()), 1e-10)


def dense(estimate: KFAC, model: nn.Module) -> Tensor:
    """The approximation as a matrix, in the order of the parameters."""
    parameters = dict(model.named_parameters())
    size = sum(p.numel() for p in parameters.values())
    columns = []
    for unit in torch.eye(size, dtype=torch.float64):
        parts = unit.split([p.numel() for p in parameters.values()])
        column = estimate.matvec({n: t.view(p.shape) for (n, p), t in zip(parameters.items(), parts, strict=True)})
        columns.append(torch.cat([t.flatten() for t in column.values()]))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("estimator", [KFAC, EKFAC])
def test_solve_quadratic_and_eigenvalues(estimator: type[KFAC]) -> None:
    make, data = MODELS["tokens"]
    model = build(make)
    found = estimator(model, damping=0.05, progress=False)
    found = found.fit(data) if isinstance(found, EKFAC) else found.accumulate(data)
    matrix, v = dense(found, model), vectors(model)
    flat = torch.cat([t.flatten() for t in v.values()])
    assert float((matrix - matrix.T).abs().max()) < 1e-14
    for damping in (None, 0.7):
        damped = matrix + (0.05 if damping is None else damping) * torch.eye(len(flat), dtype=torch.float64)
        expected = torch.linalg.solve(damped, flat)
        solved = torch.cat([t.flatten() for t in found.solve(v, damping).values()])
        assert float((solved - expected).abs().max()) < 1e-11
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    assert float((found.eigenvalues() - expected).abs().max()) < 1e-12
    leaves = {name: t.clone().requires_grad_() for name, t in v.items()}
    value = found.quadratic(leaves)
    assert abs(float(value.detach()) - float(flat @ matrix @ flat)) < 1e-11
    (2.5 * value).backward()
    gradient = torch.cat([t.grad.flatten() for t in leaves.values()])
    assert float((gradient - 5.0 * matrix @ flat).abs().max()) < 1e-10


def test_ekfac_is_the_nearest_diagonal() -> None:
    """Its diagonal is that of the exact Fisher matrix in its basis; K-FAC's is not."""
    make, data = MODELS["tokens"]
    model = build(make)
    found = EKFAC(model, progress=False).fit(data)
    grads = []
    for x, y in data:
        for i in range(len(y)):
            value = functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            g = torch.autograd.grad(value, [model.a.weight, model.a.bias])
            grads.append(torch.cat([g[0], g[1][:, None]], 1))
    per_sample = torch.stack(grads)
    _, ua, _, ug = found._eigendecomposition(next(iter(found._blocks.values())))
    expected = (ug.T @ per_sample @ ua).square().mean(0)
    assert float((found.corrected()["a"] - expected).abs().max()) < 1e-14
    a, g = found.factors()["a"]
    assert a.shape == (5, 5) and g.shape == (5, 5)
    kfac = (ug.T @ g @ ug).diagonal()[:, None] * (ua.T @ a @ ua).diagonal()
    assert float((kfac - expected).abs().max()) > 1e-3
    # one token per sample and the eigenbasis of the identity: the diagonal Fisher
    exact = FisherDiagonal(model, progress=False).accumulate(data).diagonal()
    trace = sum(float(t.sum()) for t in exact.values())
    assert abs(float(found.eigenvalues().sum()) - trace) < 1e-12


def test_sampled_approaches_exact() -> None:
    make, data = MODELS["tokens"]
    model = build(make)
    exact = KFAC(model, kind="exact", progress=False).accumulate(data).factors()
    found = KFAC(model, kind="sampled", samples=1500, progress=False).accumulate(data).factors()
    for name, (a, g) in exact.items():
        assert torch.equal(found[name][0], a) or float((found[name][0] - a).abs().max()) < 1e-14
        assert float((found[name][1] - g).norm() / g.norm()) < 0.12


class PerToken(nn.Module):
    """One label per token; a shared layer, and one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_shared_layers_and_token_masks(backend: str, approx: str) -> None:
    model = build(PerToken)
    x, y = draw(4, 5, 4), labels(4, 5)
    keep = torch.ones(4, 5, dtype=torch.bool)
    keep[0, 3:] = keep[2, 1:] = False
    y[~keep] = -100
    batch = {"x": x, "labels": y, "mask": keep}
    found = KFAC(
        model, approx=approx, token_mask="mask", progress=False,
        forward=lambda model, batch: (model(batch["x"]), batch["labels"]),
    ).accumulate([batch])  # fmt: skip
    first = model.a(x)
    second = model.a(torch.tanh(first))
    out = model.b(torch.tanh(second))
    loss = functional.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, [first, second, out])
    one, w = torch.ones(4, 5, 1, dtype=torch.float64), keep.double()

    def factors(inputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        a, g, weight = torch.cat(inputs, 1), torch.cat(grads, 1), w.repeat(1, len(inputs))
        if approx == "reduce":
            a = (weight[..., None] * a).sum(1) / weight.sum(1, keepdim=True)
            g = (weight[..., None] * g).sum(1)
            return a.T @ a / 4, g.T @ g / 4
        both = torch.einsum("nt,nti,ntj->ij", weight, a, a) / weight.sum()
        return both, torch.einsum("nt,nti,ntj->ij", weight, g, g) / 4

    first, second = first.detach(), second.detach()
    inputs = [torch.cat([t, one], 2) for t in (x, torch.tanh(first))]
    expected = {
        "a": factors(inputs, list(gradients[:2])), "b.weight": factors([torch.tanh(second)], [gradients[2]])
    }  # fmt: skip
    assert list(found.factors()) == list(expected)
    for name, (a, g) in expected.items():
        assert float((found.factors()[name][0] - a).abs().max()) < 1e-14
        assert float((found.factors()[name][1] - g).abs().max()) < 1e-14
    function = KFAC(
        model, approx=approx, token_mask=lambda batch: batch[1] != -100, progress=False
    ).accumulate([(x, y)])  # fmt: skip
    for name, (a, _) in expected.items():
        assert float((function.factors()[name][0] - a).abs().max()) < 1e-14


def test_parameters_without_factors() -> None:
    model = build(lambda: Tokens(norm=True))
    data = MODELS["tokens"][1]
    found = KFAC(model, damping=0.5, progress=False).accumulate(data)
    v = vectors(model)
    assert not found.matvec(v)["norm.weight"].any()
    assert torch.equal(found.solve(v)["norm.weight"], v["norm.weight"] * 2)
    assert {r.name: r.route for r in found.report()}["norm.weight"] == "skipped"
    plain = {name: t for name, t in v.items() if "norm" not in name}
    assert float(found.quadratic(v)) == float(found.quadratic(plain))
    with pytest.raises(ValueError, match="damping is 0"):
        found.solve(v, 0.0)
    with pytest.raises(ValueError, match=r"KFAC: norm.weight has no Kronecker factors"):
        KFAC(model, others="error")
    groups = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match="a convolution of several groups"):
        KFAC(groups, others="error")
    assert list(KFAC(groups, progress=False).accumulate([(draw(3, 2, 3, 3), labels(3))]).factors()) == ["2"]


def test_frozen_parts_and_biases_alone() -> None:
    model = build(Tokens)
    model.a.weight.requires_grad_(False)
    model.b.bias.requires_grad_(False)
    data = MODELS["tokens"][1]
    for found in (KFAC(model, progress=False).accumulate(data), EKFAC(model, progress=False).fit(data)):
        factors = found.factors()
        assert {name: (tuple(a.shape), tuple(g.shape)) for name, (a, g) in factors.items()} == {
            "a.bias": ((1, 1), (5, 5)), "b.weight": ((5, 5), (3, 3)),
        }  # fmt: skip
        assert float(factors["a.bias"][0]) == 1.0
        v = {"a.bias": draw(5), "b.weight": draw(3, 5)}
        out = found.matvec(v)
        expected = factors["a.bias"][1] @ v["a.bias"]
        if type(found) is KFAC:
            assert float((out["a.bias"] - expected).abs().max()) < 1e-14
            assert (
                float((out["b.weight"] - factors["b.weight"][1] @ v["b.weight"] @ factors["b.weight"][0]).abs().max())
                < 1e-14
            )
    # EK-FAC of a bias alone is exact in trace
    exact = FisherDiagonal(model, progress=False).accumulate(data).diagonal()["a.bias"].sum()
    assert abs(float(found.corrected()["a.bias"].sum() - exact)) < 1e-14


@pytest.mark.parametrize("estimator", [KFAC, EKFAC])
def test_resumed_equals_uninterrupted(estimator: type[KFAC], tmp_path: Any) -> None:
    model = build(Tokens).float()
    data = [(draw(3, 4, 4, seed=i).float(), labels(3, seed=i)) for i in range(20)]
    options: dict[str, Any] = {"kind": "sampled", "progress": False}
    whole, first, second = (estimator(model, **options) for _ in range(3))
    whole.accumulate(data)
    first.accumulate(data[:7])
    torch.save(first.state_dict(), tmp_path / "kfac.pt")
    second.load_state_dict(torch.load(tmp_path / "kfac.pt"))
    second.accumulate(data[7:])
    if isinstance(whole, EKFAC):
        assert isinstance(second, EKFAC)
        whole.correct(data)
        second.correct(data[:5])
        torch.save(second.state_dict(), tmp_path / "kfac.pt")
        second = EKFAC(model, **options)
        second.load_state_dict(torch.load(tmp_path / "kfac.pt"))
        second.correct(data[5:])
    v = {name: t.float() for name, t in vectors(model).items()}
    for name, want in whole.matvec(v).items():
        assert torch.equal(second.matvec(v)[name], want)
    with pytest.raises(ValueError, match="state_dict has approx 'expand'; expected 'reduce'"):
        estimator(model, approx="reduce", **options).load_state_dict(whole.state_dict())


def test_all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    from tlkernels.nn.fisher import diagonal

    model, data = build(Tokens), MODELS["tokens"][1]
    whole = EKFAC(model, progress=False).fit(data)
    here, there = (EKFAC(model, progress=False).accumulate([batch]) for batch in data)
    monkeypatch.setattr(diagonal, "processes", lambda op, group: 2)

    def reduce(mine: EKFAC, others: list[Tensor]) -> None:
        queue = [t.clone() for t in others]
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, group: t.add_(queue.pop(0)))
        mine.all_reduce()
        assert not queue

    tokens = torch.tensor(list(there._tokens.values()), dtype=torch.float64)
    sums = [there._sums.sum(name) for name in there._sums.now]
    back = [here._sums.sum(name) for name in here._sums.now]
    of_here = torch.tensor(list(here._tokens.values()), dtype=torch.float64)
    count = (torch.tensor(5.0).double(), torch.tensor(3.0).double())
    reduce(here, [*sums, tokens, count[1]])
    reduce(there, [*back, of_here, count[0]])
    for name, (a, g) in whole.factors().items():
        for mine in (here, there):
            assert float((mine.factors()[name][0] - a).abs().max()) < 1e-14
            assert float((mine.factors()[name][1] - g).abs().max()) < 1e-14
    there._basis = {}
    here.correct(data[:1])
    there._basis, there._corrected = here._basis, type(here._corrected)(here._corrected.now)
    there.correct(data[1:])
    corrected = [there._corrected.sum(name) for name in there._corrected.now]
    reduce(here, [*corrected, torch.tensor(3.0).double(), torch.tensor(0.0).double()])
    assert here.corrected_count == 8 and here.count == 8
    assert float((here.eigenvalues() - whole.eigenvalues()).abs().max()) < 1e-12


def test_wrong_input() -> None:
    model, data = build(Tokens), MODELS["tokens"][1]
    v = vectors(model)
    for options, message in (
        ({"approx": "sum"}, "approx is 'sum'"), ({"others": "drop"}, "others is 'drop'"),
        ({"damping": -1.0}, "damping is -1.0"), ({"damping": float("nan")}, "damping is nan"),
        ({"kind": "mc"}, "kind is 'mc'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            KFAC(model, **options)
    with pytest.raises(ValueError, match="KFAC: model has no linear layer or convolution"):
        KFAC(nn.LayerNorm(4))
    found = KFAC(model, progress=False)
    with pytest.raises(RuntimeError, match="KFAC: nothing was accumulated"):
        found.matvec(v)
    found.accumulate(data)
    with pytest.raises(ValueError, match=r"KFAC: vectors lack 'a.bias'"):
        found.matvec({name: t for name, t in v.items() if name != "a.bias"})
    with pytest.raises(ValueError, match="KFAC: vectors have 'c'"):
        found.matvec({**v, "c": draw(3)})
    with pytest.raises(ValueError, match=r"KFAC: vectors\['a.bias'\] has shape \(4,\); expected \(5,\)"):
        found.quadratic({**v, "a.bias": draw(4)})
    with pytest.raises(ValueError, match=r"KFAC: damping is -0.1"):
        found.solve(v, -0.1)
    with pytest.raises(ValueError, match="singular; expected > 0"):
        KFAC(model, progress=False).accumulate([(draw(2, 1, 4), labels(2))]).solve(v, 0.0)
    with pytest.raises(ValueError, match="token_mask is 'mask', which the batch does not have"):
        KFAC(model, token_mask="mask", progress=False).accumulate(data)
    with pytest.raises(ValueError, match=r"token_mask gives \(5,\); expected a tensor"):
        KFAC(model, token_mask=lambda batch: batch[1], progress=False).accumulate(data)
    x = data[0][0].clone()
    x[0] = float("nan")
    broken = KFAC(model, progress=False).accumulate([(x, data[0][1])])
    assert broken.factors()["a"][0].isnan().any()
    with pytest.raises(ValueError, match="factor A of a is not finite"):
        broken.solve(v)
    both = EKFAC(model, progress=False).accumulate(data)
    with pytest.raises(RuntimeError, match="EKFAC: the diagonal is not there yet"):
        both.matvec(v)
    both.correct(data)
    with pytest.raises(RuntimeError, match="accumulate after correct"):
        both.accumulate(data)
    with pytest.raises(TypeError, match="which can be read once"):
        EKFAC(model, progress=False).fit(iter(data))
    both.reset()
    assert both.fit(data).count == 8


def test_docstrings() -> None:
    assert doctest.testmod(tlkernels.nn.fisher.kfac).failed == 0
