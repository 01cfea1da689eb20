"""Regularisers of continual learning against closed forms in float64, their state, growing heads, and misuse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from tlkernels.methods.continual._base import ContinualMethod
from tlkernels.methods.continual.regularization import EWC, KFACEWC, MAS, SI, L2Anchor, LwF, RWalk
from tlkernels.nn.fisher import KFAC

DTYPE = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(inputs=3, outputs=2, bias=True, seed=0):
    model = nn.Linear(inputs, outputs, bias=bias, dtype=DTYPE)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(seed), dtype=DTYPE))
    return model


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).to(DTYPE)


def data(n=12, inputs=3, classes=2, seed=1, batch=5):
    g = generator(seed)
    x, y = torch.randn(n, inputs, generator=g, dtype=DTYPE), torch.randint(classes, (n,), generator=g)
    return [(x[i : i + batch], y[i : i + batch]) for i in range(0, n, batch)]


def joined(loader):
    return tuple(torch.cat(parts) for parts in zip(*loader, strict=True))


def moved(model, seed=5, size=0.3):
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += size * torch.randn(p.shape, generator=generator(seed + i), dtype=DTYPE)


def fisher_by_hand(model, loader):
    """The mean of the squared per-sample gradients, sample by sample."""
    x, y = joined(loader)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(x)):
        loss = functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        for (name, _), g in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            total[name] += g.square() / len(x)
    return total


def assert_same(state, other):
    assert state["class"] == other["class"]
    a, b = ({key: t for key, t in s.items() if key != "class"} for s in (state, other))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def gradient_of(model, value):
    return torch.autograd.grad(value, list(model.parameters()), allow_unused=True)


METHODS = {
    "ewc": lambda m: EWC(m, 3.0),
    "online": lambda m: EWC(m, 3.0, mode="online", decay=0.7),
    "kfac": lambda m: KFACEWC(m, 3.0),
    "mas": lambda m: MAS(m, 3.0),
    "mas batch": lambda m: MAS(m, 3.0, mode="batch"),
    "si": lambda m: SI(m, 3.0, xi=0.01),
    "rwalk": lambda m: RWalk(m, 3.0, interval=3),
    "l2": lambda m: L2Anchor(m, 3.0),
    "lwf": lambda m: LwF(m, 3.0),
}
QUADRATIC = [name for name in METHODS if name != "lwf"]


def train(model, method, loader, steps=None, optimizer=None, in_loss=False):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.2)
    for i, (x, y) in enumerate(loader):
        if i == steps:
            break
        optimizer.zero_grad()
        out = model(x)
        loss = functional.cross_entropy(out, y)
        if in_loss or isinstance(method, LwF):
            loss = loss + method.penalty(x, out)
        loss.backward()
        method.after_backward()
        optimizer.step()
        method.after_step()


def learn(model, method, tasks=2, **options):
    for t in range(tasks):
        loader = data(seed=10 + t, classes=3)
        method.before_task(loader)
        train(model, method, loader, **options)
        method.after_task(loader)


# ---- what all of them promise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUADRATIC)
def test_after_backward_adds_the_gradient_of_the_penalty(name):
    model = mlp()
    method = METHODS[name](model)
    learn(model, method)
    method.before_task()
    moved(model)
    before = [torch.randn(p.shape, dtype=DTYPE, generator=generator(3)) for p in model.parameters()]
    for p, b in zip(model.parameters(), before, strict=True):
        p.grad = b.clone()
    method.after_backward()
    expected = gradient_of(model, method.penalty())
    assert any(bool(g.abs().max() > 1e-6) for g in expected)
    for p, b, g in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p.grad, b + g, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", QUADRATIC)
def test_gradients_that_are_none_are_made(name):
    model = mlp()
    method = METHODS[name](model)
    learn(model, method)
    method.before_task()
    moved(model)
    model.zero_grad()
    method.after_backward()
    expected = gradient_of(model, method.penalty())
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", QUADRATIC)
def test_either_way_is_the_same_training_and_both_do_not_count_twice(name):
    results = []
    for in_loss in (False, True):
        model = mlp()
        learn(model, METHODS[name](model), tasks=3, in_loss=in_loss)
        results.append(model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", QUADRATIC)
def test_a_penalty_that_was_only_looked_at_is_still_added(name):
    model = mlp()
    method = METHODS[name](model)
    learn(model, method, tasks=1)
    method.before_task()
    moved(model)
    value = method.penalty()
    assert value.item() > 0
    method.after_backward()
    assert all(bool(p.grad.abs().max() > 0) for p in model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_no_penalty_before_the_first_task_ends(name):
    model = mlp()
    method = METHODS[name](model)
    method.before_task()
    x = torch.randn(2, 3, dtype=DTYPE)
    value = method.penalty(x, model(x))
    assert value.shape == () and value.item() == 0 and value.dtype == DTYPE
    method.after_backward()
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(method, ContinualMethod) and method.tasks == 0


@pytest.mark.parametrize("name", METHODS)
def test_resumes_exactly_in_the_middle_of_a_task(name, tmp_path):
    whole, first = mlp(), mlp()
    loader = data(n=30, seed=20, classes=3)
    a, b = METHODS[name](whole), METHODS[name](first)
    for model, method in ((whole, a), (first, b)):
        learn(model, method)
        method.before_task(loader)
    train(whole, a, loader)
    train(first, b, loader, steps=2)
    torch.save({"model": first.state_dict(), "method": b.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = mlp(seed=9)
    second.load_state_dict(saved["model"])
    c = METHODS[name](second)
    c.load_state_dict(saved["method"])
    train(second, c, loader[2:])
    a.after_task(loader)
    c.after_task(loader)
    assert c.tasks == a.tasks == 3
    moved(whole), moved(second)
    x = loader[0][0]
    assert torch.equal(a.penalty(x), c.penalty(x)) and a.penalty(x).item() > 0
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", QUADRATIC)
def test_state_is_a_copy(name):
    model = mlp()
    method = METHODS[name](model)
    learn(model, method, tasks=1)
    state = method.state_dict()
    kept = copy.deepcopy(state)
    moved(model)
    value = method.penalty().item()
    method.before_task()
    train(model, method, data(classes=3))
    method.after_task(data(classes=3))
    assert_same(state, kept)
    assert method.penalty().item() != value


@pytest.mark.parametrize("name", METHODS)
def test_a_state_of_something_else_is_refused_and_changes_nothing(name):
    model = mlp()
    method = METHODS[name](model)
    learn(model, method, tasks=1)
    before = method.state_dict()
    with pytest.raises(ValueError, match="has class 'Other'"):
        method.load_state_dict({**before, "class": "Other"})
    with pytest.raises(ValueError, match="lacks"):
        method.load_state_dict({"class": type(method).__name__, "tasks": 1})
    with pytest.raises(TypeError, match="state_dict is a int; expected a mapping"):
        method.load_state_dict(3)
    other = METHODS[name](nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).to(DTYPE))
    with pytest.raises(ValueError, match=r"state_dict|parameter '0.weight' has shape \(5, 2\)"):
        other.load_state_dict(before)
    assert other.tasks == 0
    assert_same(method.state_dict(), before)


def grow(model, rows=2):
    """Two more outputs; the old ones stay."""
    old, new = model[2], nn.Linear(5, 3 + rows, dtype=DTYPE)
    with torch.no_grad():
        new.weight[:3], new.bias[:3] = old.weight, old.bias
    model[2] = new


@pytest.mark.parametrize("name", METHODS)
def test_a_head_that_grows(name):
    torch.manual_seed(0)
    model, still = mlp(), mlp()
    method, fixed = METHODS[name](model), METHODS[name](still)
    learn(model, method, tasks=1)
    learn(still, fixed, tasks=1)
    grow(model)
    x = torch.randn(4, 3, dtype=DTYPE)
    with torch.no_grad():  # the same move of everything old, and any of the new rows
        for p, q in zip(model.parameters(), still.parameters(), strict=True):
            step = 0.1 * torch.randn(q.shape, dtype=DTYPE)
            q += step
            p[tuple(slice(n) for n in q.shape)] += step
        model[2].weight[3:] += 7
    torch.testing.assert_close(method.penalty(x), fixed.penalty(x), rtol=1e-12, atol=0)
    learn(model, method, tasks=1)  # trains, and consolidates the larger head
    moved(model)
    assert method.tasks == 2 and method.penalty(x).item() > 0
    if hasattr(method, "importance"):
        assert method.importance["2.weight"].shape == (5, 5)
    grads = gradient_of(model, method.penalty(x))
    assert bool(grads[2][3:].abs().max() > 0)


@pytest.mark.parametrize("name", ["ewc", "online", "mas", "si", "rwalk", "l2"])
def test_an_input_layer_that_grows_in_columns(name):
    model = mlp()
    method = METHODS[name](model)
    learn(model, method, tasks=1)
    old, new = model[0], nn.Linear(6, 5, dtype=DTYPE)
    with torch.no_grad():
        new.weight[:, :3], new.bias[:] = old.weight, old.bias
    model[0] = new
    moved(model)
    if name in ("si", "rwalk"):
        method.before_task()
    model.zero_grad()
    method.after_backward()
    expected = gradient_of(model, method.penalty())
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-14)
    assert not model[0].weight.grad[:, 3:].any()


@pytest.mark.parametrize("name", QUADRATIC)
def test_a_smaller_parameter_or_one_that_is_gone_is_an_error(name):
    model = mlp()
    method = METHODS[name](model)
    learn(model, method, tasks=1)
    model[2] = nn.Linear(5, 2, dtype=DTYPE)
    with pytest.raises(ValueError, match=r"parameter '2.weight' has shape \(2, 5\); expected \(3, 5\) as it was"):
        method.penalty()
    model[2] = nn.Identity()
    with pytest.raises(RuntimeError, match=r"no parameter '2\.weight' any more"):
        method.penalty()


@pytest.mark.parametrize("name", QUADRATIC)
def test_frozen_parameters_are_left_alone(name):
    model = mlp()
    model[0].requires_grad_(False)
    method = METHODS[name](model)
    learn(model, method)
    assert all("0." not in key for term in method.state_dict()["terms"] for key in term.get("anchors", term))
    model[2].bias.requires_grad_(False)  # later
    moved(model)
    method.before_task()
    model.zero_grad()
    method.after_backward()
    assert model[0].weight.grad is None and model[2].bias.grad is None and model[2].weight.grad is not None


@pytest.mark.parametrize("kind", [EWC, MAS, SI, RWalk, L2Anchor])
def test_misuse_of_what_they_share(kind):
    with pytest.raises(TypeError, match=f"{kind.__name__}: model is a int; expected a torch.nn.Module"):
        kind(3)
    with pytest.raises(ValueError, match="model has no parameter that requires grad"):
        kind(mlp().requires_grad_(False))
    with pytest.raises(ValueError, match="lambda_ is -1; expected >= 0"):
        kind(mlp(), -1)
    with pytest.raises(ValueError, match="lambda_ is nan"):
        kind(mlp(), float("nan"))
    with pytest.raises(TypeError, match="lambda_ is a str"):
        kind(mlp(), "1")
    with pytest.raises(TypeError, match="exclude is 'head'; expected a sequence"):
        kind(mlp(), exclude="head")
    with pytest.raises(ValueError, match="leaves no parameter"):
        kind(mlp(), exclude=["*"])
    method = kind(mlp(), exclude=["2"])
    learn(method.model, method, tasks=1)
    assert set(method.importance) == {"0.weight", "0.bias"}


# ---- EWC -------------------------------------------------------------------------------------------------------------


def test_ewc_is_half_lambda_fisher_times_the_square():
    model, loader = linear(), data()
    f = fisher_by_hand(model, loader)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    ewc = EWC(model, 3.0)
    ewc.after_task(loader)
    for name, value in ewc.importance.items():
        torch.testing.assert_close(value, f[name], rtol=1e-12, atol=0)
    moved(model)
    expected = sum(1.5 * (f[n] * (p - start[n]).square()).sum() for n, p in model.named_parameters())
    torch.testing.assert_close(ewc.penalty(), expected, rtol=1e-12, atol=0)


def test_ewc_of_a_bernoulli_is_the_known_information():
    """One weight and one input x: information p (1 - p) x^2 for a sigmoid, here two logits (0, w x)."""
    model = nn.Linear(1, 2, bias=False, dtype=DTYPE)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [0.8]], dtype=DTYPE))
    x = torch.tensor([[1.0], [-2.0], [0.5]], dtype=DTYPE)
    ewc = EWC(model, kind="exact")
    ewc.after_task([(x, torch.zeros(3, dtype=torch.long))])
    p = torch.sigmoid(0.8 * x)
    expected = (p * (1 - p) * x.square()).mean()
    torch.testing.assert_close(ewc.importance["weight"], expected.expand(2, 1), rtol=1e-12, atol=0)


def test_ewc_does_not_depend_on_the_batch_size():
    found = []
    for batch in (1, 4, 12):
        ewc = EWC(linear())
        ewc.after_task(data(batch=batch))
        found.append(ewc.importance["weight"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=0)


def test_separate_ewc_has_a_term_and_an_anchor_for_each_task():
    model = linear()
    ewc, expected = EWC(model, 2.0), []
    for seed in (1, 2, 3):
        moved(model, seed)
        at, f = [p.detach().clone() for p in model.parameters()], fisher_by_hand(model, data(seed=seed))
        expected.append((at, list(f.values())))
        ewc.after_task(data(seed=seed))
    moved(model, 9)
    value = sum(
        (f * (p - a).square()).sum() for at, fs in expected for p, a, f in zip(model.parameters(), at, fs, strict=True)
    )
    torch.testing.assert_close(ewc.penalty(), value, rtol=1e-12, atol=0)
    assert len(ewc.state_dict()["terms"]) == 3


def test_online_ewc_decays_and_anchors_at_the_last_task():
    model = linear()
    ewc = EWC(model, 2.0, mode="online", decay=0.5)
    f1 = fisher_by_hand(model, data(seed=1))
    ewc.after_task(data(seed=1))
    moved(model, 4)
    f2, at = fisher_by_hand(model, data(seed=2)), [p.detach().clone() for p in model.parameters()]
    ewc.after_task(data(seed=2))
    moved(model, 6)
    expected = sum(
        ((0.5 * f1[n] + f2[n]) * (p - a).square()).sum() for (n, p), a in zip(model.named_parameters(), at, strict=True)
    )
    torch.testing.assert_close(ewc.penalty(), expected, rtol=1e-12, atol=0)
    assert len(ewc.state_dict()["terms"]) == 1


def test_ewc_takes_known_importances():
    model = linear(bias=False)
    ewc = EWC(model, 2.0)
    ewc.after_task(importances={"weight": torch.full((2, 3), 4.0)})
    with torch.no_grad():
        model.weight += 0.5
    assert ewc.penalty().item() == 0.5 * 2 * 6 * 4 * 0.25
    assert ewc.importance["weight"].dtype == DTYPE


def test_quadratic_losses_meet_at_the_weighted_mean():
    """Two tasks 1/2 h_t (w - m_t)^2: with F = h_1 and lambda 1 EWC finds the minimum of their sum."""
    model = nn.Linear(1, 1, bias=False, dtype=DTYPE)
    h, m = (2.0, 0.5), (1.0, -3.0)
    with torch.no_grad():
        model.weight.fill_(m[0])
    ewc = EWC(model, 1.0)
    ewc.after_task(importances={"weight": torch.tensor([[h[0]]], dtype=DTYPE)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        (0.5 * h[1] * (model.weight - m[1]).square().sum()).backward()
        ewc.after_backward()
        optimizer.step()
    expected = (h[0] * m[0] + h[1] * m[1]) / sum(h)
    assert model.weight.item() == pytest.approx(expected, rel=1e-12)


def test_ewc_misuse():
    model = linear()
    with pytest.raises(ValueError, match="mode is 'both'; expected 'separate' or 'online'"):
        EWC(model, mode="both")
    with pytest.raises(ValueError, match=r"decay is 0.5 with mode 'separate'"):
        EWC(model, decay=0.5)
    with pytest.raises(ValueError, match=r"decay is 1.5; expected in \[0, 1\]"):
        EWC(model, mode="online", decay=1.5)
    with pytest.raises(ValueError, match="kind"):
        EWC(model, kind="wrong")
    ewc = EWC(model)
    with pytest.raises(TypeError, match="loader is a NoneType; expected an iterable of batches"):
        ewc.after_task()
    with pytest.raises(RuntimeError, match="nothing was accumulated"):
        ewc.after_task([])
    for bad, match in (
        ({"weigth": torch.ones(2, 3)}, "has 'weigth'; expected names of parameters"),
        ({"weight": torch.ones(3, 2)}, r"importances\['weight'\] is \(3, 2\); expected a tensor \(2, 3\)"),
        ({"weight": -torch.ones(2, 3)}, "negative number, NaN or infinity"),
        ({"weight": torch.full((2, 3), float("nan"))}, "negative number, NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=match):
            ewc.after_task(importances=bad)
    with pytest.raises(TypeError, match="importances is a list"):
        ewc.after_task(importances=[1])
    assert ewc.tasks == 0 and not ewc.state_dict()["terms"]
    x, y = joined(data())
    x[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        ewc.after_task([(x, y)])
    assert ewc.tasks == 0


# ---- K-FAC -----------------------------------------------------------------------------------------------------------


def test_kfac_ewc_is_the_quadratic_form_of_kfac():
    model, loader = mlp(), data(classes=3)
    kfac = KFAC(model, progress=False).accumulate(loader)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = KFACEWC(model, 3.0)
    method.after_task(loader)
    moved(model)
    delta = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    torch.testing.assert_close(method.penalty(), 1.5 * kfac.quadratic(delta), rtol=1e-12, atol=0)


def test_kfac_ewc_is_the_exact_fisher_of_one_linear_layer_and_one_sample():
    """With a single sample the factors are rank one, and their product is the outer product of its gradient."""
    model = linear()
    x, y = torch.randn(1, 3, dtype=DTYPE, generator=generator(4)), torch.tensor([1])
    g = torch.cat([t.flatten() for t in gradient_of(model, functional.cross_entropy(model(x), y))])
    method = KFACEWC(model, 2.0)
    method.after_task([(x, y)])
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    moved(model)
    delta = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    torch.testing.assert_close(method.penalty(), (g @ delta).square(), rtol=1e-12, atol=0)


def test_kfac_ewc_misuse():
    with pytest.raises(ValueError, match="no linear layer or convolution"):
        KFACEWC(nn.LayerNorm(3))
    with pytest.raises(TypeError, match="loader is a Tensor"):
        KFACEWC(linear()).after_task(torch.ones(3))
    with pytest.raises(ValueError, match="lambda_ is -2"):
        KFACEWC(linear(), -2)


# ---- MAS -------------------------------------------------------------------------------------------------------------


def test_mas_of_a_linear_model_is_known():
    """d(1/2 |W x|^2)/dW = (W x) x', so the mean of |W x| |x|'."""
    model, (x, y) = linear(bias=False), joined(data())
    out = x @ model.weight.detach().T
    exact, batch = MAS(model), MAS(model, mode="batch")
    exact.after_task(data())
    batch.after_task([(x, y)])
    torch.testing.assert_close(exact.importance["weight"], (out.abs().T @ x.abs()) / len(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(batch.importance["weight"], (out.T @ x).abs() / len(x), rtol=1e-12, atol=1e-15)
    assert bool((batch.importance["weight"] < exact.importance["weight"]).all())


@pytest.mark.parametrize("chunk_size", [1, 2, 32])
def test_mas_in_chunks_and_by_a_loop_is_the_same(chunk_size):
    model, loader = mlp(), data()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    x, _ = joined(loader)
    for row in x:
        grads = gradient_of(model, 0.5 * model(row[None]).square().sum())
        for (name, total), g in zip(expected.items(), grads, strict=True):
            expected[name] = total + g.abs() / len(x)
    mas = MAS(model, chunk_size=chunk_size)
    mas.after_task([batch[:1] for batch in loader])  # no labels
    for name, value in expected.items():
        torch.testing.assert_close(mas.importance[name], value, rtol=1e-12, atol=1e-15)


def test_mas_batches_of_one_are_exact():
    model = mlp()
    exact, batch = MAS(model), MAS(model, mode="batch")
    exact.after_task(data())
    batch.after_task(data(batch=1))
    for name, value in exact.importance.items():
        torch.testing.assert_close(batch.importance[name], value, rtol=1e-12, atol=1e-15)


def test_mas_adds_up_with_decay_and_keeps_modes_and_gradients():
    model = nn.Sequential(linear(), nn.Dropout(0.5))
    model[0].eval()
    mas = MAS(model, decay=0.25)
    mas.after_task(data())
    once = mas.importance["0.weight"]
    mas.after_task(data())
    torch.testing.assert_close(mas.importance["0.weight"], 1.25 * once, rtol=1e-12, atol=0)
    assert model.training and not model[0].training and model[1].training
    assert all(p.grad is None for p in model.parameters())


def test_mas_misuse():
    with pytest.raises(ValueError, match="mode is 'fast'"):
        MAS(linear(), mode="fast")
    with pytest.raises(ValueError, match="chunk_size is 0; expected >= 1"):
        MAS(linear(), chunk_size=0)
    mas = MAS(linear())
    with pytest.raises(ValueError, match="loader gives no samples"):
        mas.after_task([])
    with pytest.raises(TypeError, match="loader is a NoneType"):
        mas.after_task()
    assert mas.tasks == 0 and not mas.importance


# ---- SI and RWalk ----------------------------------------------------------------------------------------------------


def test_si_of_a_quadratic_loss_is_known():
    """Gradient descent on 1/2 sum h (w - m)^2: w_k - m = (1 - rate h)^k (w_0 - m), and the path is a geometric sum."""
    model = nn.Linear(3, 1, bias=False, dtype=DTYPE)
    h, m = torch.tensor([0.5, 1.0, 3.0], dtype=DTYPE), torch.tensor([1.0, -1.0, 2.0], dtype=DTYPE)
    start, rate, steps, xi = model.weight.detach().clone(), 0.1, 25, 0.01
    si = SI(model, 2.0, xi=xi)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    si.before_task()
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * h * (model.weight - m).square()).sum().backward()
        si.after_backward()
        optimizer.step()
        si.after_step()
    si.after_task()
    q = (1 - rate * h).square()
    path = rate * h.square() * (start - m).square() * (1 - q**steps) / (1 - q)
    expected = path / ((model.weight.detach() - start).square() + xi)
    torch.testing.assert_close(si.importance["weight"], expected, rtol=1e-10, atol=0)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 0.5
    torch.testing.assert_close(si.penalty(), (expected * 0.25).sum(), rtol=1e-10, atol=0)
    # small steps: the path is what the loss lost, 1/2 h for a step all the way, whatever xi adds
    assert not torch.equal(before, model.weight)


def test_si_uses_the_gradient_without_the_penalty():
    """In a second task with a strong penalty, omega is -g of the task times the step."""
    for in_loss in (False, True):
        model = linear(bias=False)
        si = SI(model, 50.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        si.before_task()
        train(model, si, data(), optimizer=optimizer)
        si.after_task()
        si.before_task()
        expected = torch.zeros_like(model.weight)
        for x, y in data(seed=8):
            optimizer.zero_grad()
            before = model.weight.detach().clone()
            loss = functional.cross_entropy(model(x), y)
            (g,) = torch.autograd.grad(loss, [model.weight], retain_graph=True)
            total = loss + si.penalty() if in_loss else loss
            total.backward()
            si.after_backward()
            optimizer.step()
            si.after_step()
            expected -= g * (model.weight.detach() - before)
        torch.testing.assert_close(si.state_dict()["omega"]["weight"], expected, rtol=1e-9, atol=1e-13)


def test_si_importance_is_clamped_at_zero():
    """Climbing the loss is no merit."""
    model = linear(bias=False)
    si = SI(model)
    si.before_task()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    train(model, si, data(), optimizer=optimizer)
    assert bool((si.state_dict()["omega"]["weight"] <= 0).all())
    si.after_task()
    assert not si.importance["weight"].any()


def test_path_methods_leave_out_what_a_task_does_not_use():
    model = nn.ModuleDict({"a": linear(), "b": linear(seed=1)})
    for kind in (SI, RWalk):
        method = kind(model)
        method.before_task()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = joined(data())
        model.zero_grad()
        functional.cross_entropy(model["a"](x), y).backward()
        method.after_backward()
        optimizer.step()
        method.after_step()
        method.after_task()
        assert method.importance["a.weight"].any() and not method.importance["b.weight"].any()


@pytest.mark.parametrize("kind", [SI, RWalk])
def test_path_methods_need_an_open_task(kind):
    model = linear()
    method = kind(model)
    for call in (method.after_backward, method.after_step, method.after_task):
        with pytest.raises(RuntimeError, match="no task is open; call before_task first"):
            call()
    method.before_task()
    model.weight = nn.Parameter(torch.zeros(4, 3, dtype=DTYPE))
    with pytest.raises(RuntimeError, match="parameter 'weight' changed its shape within a task"):
        method.after_backward()
    model = linear()
    method = kind(model)
    method.before_task()
    model.weight.grad = torch.full_like(model.weight, float("nan"))
    method.after_backward()
    method.after_step()
    with pytest.raises(ValueError, match="NaN"):
        method.after_task()
    assert method.tasks == 0
    with pytest.raises(ValueError, match=r"(xi|eps) is 0; expected > 0"):
        kind(model, **{"xi" if kind is SI else "eps": 0})


def test_rwalk_by_hand():
    model = linear(bias=False)
    alpha, interval, eps = 0.3, 2, 1e-3
    method = RWalk(model, 2.0, alpha=alpha, interval=interval, eps=eps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fisher, old = torch.zeros(2, 3, dtype=DTYPE), None
    for task in range(2):
        method.before_task()
        loader = data(n=25, seed=30 + task)  # five steps: two intervals and a half
        score, gain, since = torch.zeros(2, 3, dtype=DTYPE), 0.0, model.weight.detach().clone()
        for step, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            (g,) = torch.autograd.grad(loss, [model.weight], retain_graph=True)
            loss.backward()
            before = model.weight.detach().clone()
            method.after_backward()
            optimizer.step()
            method.after_step()
            fisher = alpha * g.square() + (1 - alpha) * fisher
            gain = gain - g * (model.weight.detach() - before)
            if (step + 1) % interval == 0 or step == len(loader) - 1:
                now = model.weight.detach()
                score += gain.clamp(min=0) / (0.5 * fisher * (now - since).square() + eps)
                gain, since = 0.0, now.clone()
        method.after_task()
        score = score if old is None else 0.5 * (score + old)
        old = score
        expected = fisher / fisher.max() + score / score.max()
        torch.testing.assert_close(method.importance["weight"], expected, rtol=1e-9, atol=0)
    assert len(method.state_dict()["terms"]) == 1


def test_rwalk_misuse():
    for name, value in (("interval", 0), ("interval", 1.5), ("alpha", 0.0), ("alpha", 1.5)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            RWalk(linear(), **{name: value})


# ---- L2 and LwF ------------------------------------------------------------------------------------------------------


def test_l2_anchor():
    model = linear()
    method = L2Anchor(model, 3.0)
    method.after_task()
    with torch.no_grad():
        for p in model.parameters():
            p += 2
    assert method.penalty().item() == pytest.approx(1.5 * 8 * 4, rel=1e-12)
    method.after_task()  # the last task alone
    assert method.penalty().item() == 0


def test_lwf_is_the_kl_at_a_temperature():
    model = linear(outputs=4)
    method = LwF(model, 0.7, temperature=3.0)
    x, _ = joined(data())
    old = model(x).detach()
    method.after_task()
    moved(model)
    new = model(x)
    p, q = (old / 3).softmax(-1), (new / 3).softmax(-1)
    expected = 0.7 * 9 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(method.penalty(x, new), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(method.penalty(x), expected, rtol=1e-12, atol=0)
    # its gradient by the logits: alpha T (q - p) / N
    (g,) = torch.autograd.grad(method.penalty(x, new), [new])
    torch.testing.assert_close(g, 0.7 * 3 * (q - p) / len(x), rtol=1e-10, atol=1e-14)
    assert method.teacher is not model and not any(t.requires_grad for t in method.teacher.parameters())


def test_lwf_gradient_is_right():
    model = linear(outputs=4)
    method = LwF(model)
    x, _ = joined(data())
    method.after_task(classes=[0, 1])
    logits = torch.randn(len(x), 4, dtype=DTYPE, generator=generator(2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: method.penalty(x, z) * 1.7, [logits])


def test_lwf_with_a_softmax_for_each_tasks_classes():
    model = linear(outputs=6)
    method = LwF(model, temperature=2.0)
    x, _ = joined(data())
    method.after_task(classes=[0, 1])
    method.after_task(classes=[3, 2])
    old = model(x).detach()
    moved(model)
    new = model(x)
    expected = 0.0
    for group in ([0, 1], [2, 3]):
        p, q = (old[:, group] / 2).softmax(-1), (new[:, group] / 2).softmax(-1)
        expected = expected + 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(method.penalty(x, new), expected, rtol=1e-12, atol=0)
    assert not torch.autograd.grad(method.penalty(x, new), [new])[0][:, 4:].any()


def test_lwf_old_outputs_come_from_eval_mode():
    model = nn.Sequential(nn.Dropout(0.5), linear()).train()
    method = LwF(model)
    method.after_task()
    x, _ = joined(data())
    model.eval()
    assert method.penalty(x).item() == pytest.approx(0, abs=1e-14)


def test_lwf_misuse():
    model = linear(outputs=4)
    with pytest.raises(ValueError, match="temperature is 0; expected > 0"):
        LwF(model, temperature=0)
    with pytest.raises(ValueError, match="alpha is -1"):
        LwF(model, -1)
    method = LwF(model)
    for classes in ([], [1, 1], [-1]):
        with pytest.raises(ValueError, match=r"classes is .*; expected different indices"):
            method.after_task(classes=classes)
    assert method.teacher is None
    x, _ = joined(data())
    method.after_task()
    with pytest.raises(ValueError, match="inputs is None"):
        method.penalty()
    with pytest.raises(ValueError, match=r"outputs has shape \(12, 3\); expected \(12, 4\)"):
        method.penalty(x, torch.zeros(12, 3, dtype=DTYPE))
    method.after_task(classes=[4])
    with pytest.raises(ValueError, match="classes has 4; expected indices < 4"):
        method.penalty(x)


def test_lwf_loads_a_teacher_of_an_older_head():
    model = mlp()
    method = LwF(model)
    learn(model, method, tasks=1)
    state, old = method.state_dict(), copy.deepcopy(model)
    grow(model)
    again = LwF(model)
    with pytest.raises(ValueError, match="another model's teacher"):
        again.load_state_dict(state)
    assert again.teacher is None
    again.load_state_dict(state, teacher=old)
    x = torch.randn(4, 3, dtype=DTYPE)
    assert torch.equal(again.penalty(x), method.penalty(x))
