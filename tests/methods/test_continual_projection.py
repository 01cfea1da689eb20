"""GEM, A-GEM, OGD and GPM: what they promise of the projected gradient, in float64, their state, and misuse."""

from __future__ import annotations

import pytest
import torch
from scipy import optimize
from torch import nn
from torch.nn import functional

from tlkernels.methods.continual.projection import AGEM, GEM, GPM, OGD

DTYPE = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mlp(seed=0, inputs=4, outputs=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs)).to(DTYPE)


def task(seed, n=20, inputs=4, classes=3, batch=8):
    g = generator(seed)
    x, y = torch.randn(n, inputs, generator=g, dtype=DTYPE), torch.randint(classes, (n,), generator=g)
    return [(x[i : i + batch], y[i : i + batch]) for i in range(0, n, batch)]


def joined(loader):
    return tuple(torch.cat(parts) for parts in zip(*loader, strict=True))


def flat_gradient(model, x, y):
    loss = functional.cross_entropy(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def flat_grad(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def backward(model, loader):
    model.zero_grad()
    x, y = joined(loader)
    functional.cross_entropy(model(x), y).backward()
    return flat_grad(model).clone()


def opposed(model, loader):
    """Labels that the model should unlearn: the gradient on them conflicts with that on `loader`."""
    x, y = joined(loader)
    return [(x, (y + 1) % 3)]


METHODS = {
    "gem": lambda m: GEM(m, 8),
    "agem": lambda m: AGEM(m, 8, batch_size=5),
    "ogd": lambda m: OGD(m, 6),
    "gpm": lambda m: GPM(m, 0.6),
}


# ---- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_nothing_before_the_first_task_ends(name):
    model = mlp()
    method = METHODS[name](model)
    before = backward(model, task(1))
    method.before_task()
    method.after_backward()
    assert torch.equal(flat_grad(model), before) and method.penalty().item() == 0


def steps(model, method, loader, optimizer):
    for x, y in loader:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        method.after_backward()
        optimizer.step()
        method.after_step()


@pytest.mark.parametrize("name", METHODS)
def test_resumes_exactly_in_the_middle_of_a_task(name, tmp_path):
    whole, first = mlp(), mlp()
    a, b = METHODS[name](whole), METHODS[name](first)
    loader = opposed(whole, task(3)) * 4
    for model, method in ((whole, a), (first, b)):
        for seed in (1, 2):
            steps(model, method, task(seed), torch.optim.SGD(model.parameters(), 0.1))
            method.after_task(task(seed))
    steps(whole, a, loader, torch.optim.SGD(whole.parameters(), 0.1))
    steps(first, b, loader[:2], torch.optim.SGD(first.parameters(), 0.1))
    torch.save({"model": first.state_dict(), "method": b.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = mlp(seed=7)
    second.load_state_dict(saved["model"])
    c = METHODS[name](second)
    c.load_state_dict(saved["method"])
    steps(second, c, loader[2:], torch.optim.SGD(second.parameters(), 0.1))
    for m in (a, c):
        m.after_task(loader)
    assert c.tasks == a.tasks == 3
    for model, method in ((whole, a), (second, c)):
        backward(model, loader)
        method.after_backward()
    assert torch.equal(flat_grad(whole), flat_grad(second))
    with pytest.raises(ValueError, match="has class 'X'"):
        c.load_state_dict({"class": "X"})


@pytest.mark.parametrize("name", METHODS)
def test_what_after_task_refuses_changes_nothing(name):
    method = METHODS[name](mlp())
    with pytest.raises(TypeError, match="loader is a NoneType; expected an iterable of batches"):
        method.after_task()
    with pytest.raises(ValueError, match="loader gives no samples"):
        method.after_task([])
    with pytest.raises(TypeError, match="expected tensors"):
        method.after_task([("x", 1)])
    if name != "gpm":
        with pytest.raises(ValueError, match="loader gives no labels"):
            method.after_task([torch.zeros(2, 4, dtype=DTYPE)])
        with pytest.raises(ValueError, match="2 inputs and 3 labels"):
            method.after_task([(torch.zeros(2, 4, dtype=DTYPE), torch.zeros(3, dtype=torch.long))])
    assert method.tasks == 0
    with pytest.raises(TypeError, match="model is a str"):
        type(method)("model")


@pytest.mark.parametrize("name", METHODS)
def test_frozen_parameters_and_heads_that_grow(name):
    model = mlp()
    model[0].requires_grad_(False)
    method = METHODS[name](model)
    method.after_task(task(1))
    old, new = model[2], nn.Linear(6, 5, dtype=DTYPE)
    with torch.no_grad():
        new.weight[:3], new.bias[:3] = old.weight, old.bias
    model[2] = new
    x, y = joined(task(2, classes=5))
    functional.cross_entropy(model(x), y).backward()
    method.after_backward()
    assert model[0].weight.grad is None and bool(model[2].weight.grad.isfinite().all())
    method.after_task(task(2, classes=5))
    method.after_backward()
    assert model[0].weight.grad is None and model[2].weight.grad.shape == (5, 6)


# ---- GEM and A-GEM ---------------------------------------------------------------------------------------------------


def test_agem_is_the_projection():
    model, loader = mlp(), task(1)
    agem = AGEM(model, 100, batch_size=100)  # all of the memory at each step
    agem.after_task(loader)
    g = backward(model, opposed(model, loader))
    reference = flat_gradient(model, *joined(loader))
    assert g @ reference < 0
    agem.after_backward()
    expected = g - (g @ reference) / (reference @ reference) * reference
    torch.testing.assert_close(flat_grad(model), expected, rtol=1e-10, atol=1e-12)
    assert abs(flat_grad(model) @ reference) < 1e-12
    same = backward(model, loader)  # no conflict with itself
    agem.after_backward()
    assert torch.equal(flat_grad(model), same)


def test_gem_with_one_memory_and_no_margin_is_agem():
    model, loader = mlp(), task(1)
    gem, agem = GEM(model, 100, margin=0.0), AGEM(model, 100, batch_size=100)
    found = []
    for method in (gem, agem):
        method.after_task(loader)
        backward(model, opposed(model, loader))
        method.after_backward()
        found.append(flat_grad(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gem_solves_its_programme(margin):
    model = mlp()
    gem = GEM(model, 100, margin=margin)
    loaders = [task(seed, n=6) for seed in (1, 2, 3)]
    for loader in loaders:
        gem.after_task(loader)
    memory = torch.stack([flat_gradient(model, *joined(loader)) for loader in loaders])
    g = backward(model, [(x, (y + 1) % 3) for loader in loaders for x, y in loader])
    assert bool(((memory @ g) < 0).any())
    gem.after_backward()
    gram, products = (memory @ memory.T).numpy(), (memory @ g).numpy()
    best = optimize.minimize(
        lambda v: 0.5 * v @ gram @ v + products @ v, [1.0] * 3, jac=lambda v: gram @ v + products,
        bounds=[(margin, None)] * 3, method="L-BFGS-B", options={"ftol": 1e-16, "gtol": 1e-12},
    ).x  # fmt: skip
    torch.testing.assert_close(flat_grad(model), g + torch.from_numpy(best) @ memory, rtol=1e-5, atol=1e-6)
    assert bool((memory @ flat_grad(model) > -1e-12).all())


def test_gem_leaves_what_conflicts_with_nothing():
    model, loader = mlp(), task(1)
    gem = GEM(model, 100)
    gem.after_task(loader)
    g = backward(model, loader)
    gem.after_backward()
    assert torch.equal(flat_grad(model), g)


@pytest.mark.parametrize("kind", [GEM, AGEM])
def test_memory_is_a_uniform_draw_and_reproducible(kind):
    model = mlp()
    x = torch.arange(40, dtype=DTYPE)[:, None].expand(40, 4)
    loader = [(x[i : i + 7], torch.zeros(len(x[i : i + 7]), dtype=torch.long)) for i in range(0, 40, 7)]
    counts = torch.zeros(40)
    for seed in range(300):
        method = kind(model, 10, generator=generator(seed))
        method.after_task(loader)
        kept = method.state_dict()["samples"][0][0][:, 0].long()
        assert len(kept.unique()) == 10
        counts[kept] += 1
    # 300 draws with probability 1/4: 75 each, standard deviation 7.5
    assert counts.min() > 45 and counts.max() < 105
    again = kind(model, 10, generator=generator(299))
    again.after_task(loader)
    assert torch.equal(again.state_dict()["samples"][0][0][:, 0].long(), kept)


def test_agem_draws_from_all_tasks_and_tells_their_numbers():
    seen = []

    def forward(model, x, tasks):
        seen.append((x[:, 0].clone(), tasks.clone()))
        return model(x)

    model = mlp()
    method = AGEM(model, 10, batch_size=12, forward=forward)
    for number in range(3):
        method.after_task([(torch.full((10, 4), float(number), dtype=DTYPE), torch.zeros(10, dtype=torch.long))])
    for _ in range(5):
        backward(model, task(1))
        method.after_backward()
    assert all(len(x) == 12 and torch.equal(x.long(), t) for x, t in seen)
    assert set(torch.cat([t for _, t in seen]).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("kind", [GEM, AGEM])
def test_memory_methods_make_gradients_that_are_none_and_refuse_nan(kind):
    model = nn.ModuleDict({"body": mlp(), "other": nn.Linear(4, 3, dtype=DTYPE)})

    def forward(m, x, tasks):
        return m["body"](x) + m["other"](x)

    method = kind(model, 30, forward=forward)
    loader = task(1)
    method.after_task(loader)
    x, y = joined(loader)
    functional.cross_entropy(model["body"](x), (y + 1) % 3).backward()  # does not use the other
    assert model["other"].weight.grad is None
    method.after_backward()
    assert model["other"].weight.grad.any()
    model["body"][0].weight.grad[0, 0] = float("nan")
    before = flat_grad(model).clone()
    with pytest.raises(ValueError, match="a gradient has a NaN or an infinity"):
        method.after_backward()
    assert torch.equal(flat_grad(model).nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: GEM(mlp(), 0), "memory is 0; expected a whole number >= 1"),
        (lambda: GEM(mlp(), margin=-1), "margin is -1; expected >= 0"),
        (lambda: AGEM(mlp(), batch_size=1.5), "batch_size is 1.5"),
        (lambda: AGEM(mlp().requires_grad_(False)), "no parameter that requires grad"),
        (lambda: OGD(mlp(), logits="one"), "logits is 'one'"),
        (lambda: OGD(mlp(), 0), "samples is 0"),
        (lambda: OGD(mlp(), tol=2), r"tol is 2; expected in \[0, 1\]"),
        (lambda: GPM(mlp(), 0.0), r"threshold is 0; expected in \(0, 1\]"),
        (lambda: GPM(mlp(), 1.5), r"threshold is 1.5; expected in \[0, 1\]"),
        (lambda: GPM(mlp(), []), "threshold is empty"),
        (lambda: GPM(mlp(), exclude=["head"]), "exclude has 'head'; expected names of the model's modules"),
        (lambda: GPM(nn.Tanh()), "no linear layer or convolution"),
        (lambda: GPM(nn.Conv2d(4, 4, 3, groups=2)), "layer '' has 2 groups"),
    ],
)
def test_misuse(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# ---- OGD -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("logits", "each"), [("label", 1), ("mean", 1), ("all", 3)])
def test_ogd_is_orthogonal_to_the_logits_gradients(logits, each):
    model = mlp()
    ogd = OGD(model, 5, logits=logits)
    directions = []
    for seed in (1, 2):
        loader = task(seed, n=5)  # as many as are kept
        for x, y in zip(*joined(loader), strict=True):
            out = model(x[None])[0]
            values = {"label": [out[y]], "mean": [out.mean()], "all": list(out)}[logits]
            for v in values:
                grads = torch.autograd.grad(v, list(model.parameters()), retain_graph=True)
                directions.append(torch.cat([g.flatten() for g in grads]))
        ogd.after_task(loader)
    rows = torch.stack(directions)
    assert ogd.rank == 10 * each
    g = backward(model, task(3))
    ogd.after_backward()
    projected = flat_grad(model)
    assert float((rows @ projected).abs().max()) < 1e-12
    # the closest such vector
    expected = g - rows.T @ torch.linalg.lstsq(rows.T, g[:, None]).solution[:, 0]
    torch.testing.assert_close(projected, expected, rtol=1e-8, atol=1e-10)
    basis = torch.cat([t.flatten(1) for t in ogd.state_dict()["basis"].values()], 1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(10 * each, dtype=DTYPE), rtol=0, atol=1e-12)


def test_ogd_keeps_the_outputs_of_a_linear_model():
    """Logits are linear in the parameters: orthogonal steps do not change them at all."""
    model = nn.Linear(6, 2, dtype=DTYPE)
    ogd = OGD(model, 3, logits="all")
    old = task(1, n=3, inputs=6, classes=2)
    ogd.after_task(old)
    x, _ = joined(old)
    before = model(x).detach().clone()
    loader = task(2, inputs=6, classes=2) * 10
    steps(model, ogd, loader, torch.optim.SGD(model.parameters(), 0.5))
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_ogd_of_samples_seen_twice_stores_nothing_new():
    model = mlp()
    ogd = OGD(model, 5)
    ogd.after_task(task(1, n=5))
    ogd.after_task(task(1, n=5))
    assert ogd.rank == 5 and ogd.tasks == 2


def test_ogd_errors():
    model = mlp()
    ogd = OGD(model)
    with pytest.raises(ValueError, match="loader gives a label 3; expected one of 3 logits"):
        ogd.after_task([(torch.zeros(1, 4, dtype=DTYPE), torch.tensor([3]))])
    with pytest.raises(ValueError, match="gradient of a logit has a NaN"):
        ogd.after_task([(torch.full((1, 4), float("nan"), dtype=DTYPE), torch.tensor([0]))])
    assert ogd.tasks == 0 and ogd.rank == 0 and model.training
    ogd.after_task(task(1))
    model[2] = nn.Linear(6, 2, dtype=DTYPE)
    x, _ = joined(task(1))
    model(x).sum().backward()
    with pytest.raises(ValueError, match=r"parameter '2.weight' has shape \(2, 6\); expected \(3, 6\) as it was"):
        ogd.after_backward()
    with pytest.raises(ValueError, match=r"state_dict has '2\.weight' of shape"):
        OGD(model).load_state_dict({**OGD(mlp()).state_dict(), "basis": {"2.weight": torch.zeros(1, 3, 6)}})


# ---- GPM -------------------------------------------------------------------------------------------------------------


def low_rank_task(seed, rank, n=30, inputs=8, classes=3):
    g = generator(seed)
    x = torch.randn(n, rank, generator=g, dtype=DTYPE) @ torch.randn(rank, inputs, generator=g, dtype=DTYPE)
    return [(x, torch.randint(classes, (n,), generator=g))]


def test_gpm_keeps_all_outputs_on_inputs_that_it_holds_wholly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Identity(), nn.Linear(12, 3)).to(DTYPE)
    gpm = GPM(model, 1.0)
    old = low_rank_task(1, rank=2)
    gpm.after_task(old)
    assert gpm.ranks == {"0": 3, "2": 3}  # two directions, and the bias
    x, _ = joined(old)
    before = model(x).detach().clone()
    new = low_rank_task(2, rank=3)
    loss = functional.cross_entropy(model(new[0][0]), new[0][1]).item()
    steps(model, gpm, new * 50, torch.optim.SGD(model.parameters(), 0.1))
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-10)
    assert functional.cross_entropy(model(new[0][0]), new[0][1]).item() < loss - 0.01
    gpm.after_task(new)
    assert gpm.ranks == {"0": 6, "2": 6}


def test_gpm_keeps_the_outputs_of_a_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 3)
    ).to(DTYPE)
    gpm = GPM(model, 1.0)
    g = generator(1)
    x = torch.randn(2, 3, 5, 5, generator=g, dtype=DTYPE)
    gpm.after_task([(x, torch.tensor([0, 1]))])
    assert gpm.ranks == {"0": 18, "3": 2}  # as many as there are patches and samples
    before = model(x).detach().clone()
    new = torch.randn(20, 3, 5, 5, generator=g, dtype=DTYPE), torch.randint(3, (20,), generator=g)
    weights = model[0].weight.detach().clone()
    steps(model, gpm, [new] * 20, torch.optim.SGD(model.parameters(), 0.1))
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-10)
    assert float((model[0].weight.detach() - weights).abs().max()) > 1e-3


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_gpm_sees_a_convolutions_own_patches(padding_mode):
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, (3, 2), padding=(2, 1), dilation=2, padding_mode=padding_mode, bias=False).to(DTYPE)
    gpm = GPM(model, 1.0)
    x = torch.randn(1, 2, 4, 4, dtype=DTYPE)
    gpm.after_task([x])
    model(x).square().sum().backward()
    gpm.after_backward()
    # the gradient is a sum over patches, all of which are held
    torch.testing.assert_close(model.weight.grad, torch.zeros_like(model.weight), rtol=0, atol=1e-10)


def test_gpm_takes_the_least_rank_that_has_the_energy():
    model = nn.Linear(4, 2, bias=False, dtype=DTYPE)
    x = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0], dtype=DTYPE))  # energies 9, 4, 1, 1 of 15
    for threshold, rank in ((0.59, 1), (0.61, 2), (0.86, 2), (0.87, 3), (0.94, 4)):
        gpm = GPM(model, threshold)
        gpm.after_task([x])
        assert gpm.ranks == {"": rank}, threshold
    # the second task's energy counts what is held already: 9 + 4 of 15 there
    gpm = GPM(model, [0.61, 0.94, 0.5])
    gpm.after_task([x])
    gpm.after_task([x.flip(1)])  # its energies 1, 1, 4, 9: 2 of 15 are held, and both others needed
    assert gpm.ranks == {"": 4}
    model.weight.grad = torch.ones_like(model.weight)
    gpm.after_backward()
    assert float(model.weight.grad.abs().max()) < 1e-14


def test_gpm_by_hand():
    model = nn.Linear(3, 2, dtype=DTYPE)
    gpm = GPM(model, 1.0)
    v = torch.tensor([1.0, 2.0, -1.0], dtype=DTYPE)
    gpm.after_task([v[None]])
    a = torch.cat([v, torch.ones(1, dtype=DTYPE)])
    g = torch.randn(2, 4, dtype=DTYPE, generator=generator(3))
    model.weight.grad, model.bias.grad = g[:, :3].clone(), g[:, 3].clone()
    gpm.after_backward()
    expected = g - (g @ a)[:, None] * a / (a @ a)
    torch.testing.assert_close(torch.cat([model.weight.grad, model.bias.grad[:, None]], 1), expected)


def test_gpm_errors_leave_no_hooks():
    model = mlp()
    gpm = GPM(model, exclude=["2"])
    with pytest.raises(ValueError, match="inputs of layer '0' have a NaN"):
        gpm.after_task([torch.full((1, 4), float("nan"), dtype=DTYPE)])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gpm.after_task([torch.zeros(1, 5, dtype=DTYPE)])
    assert not any(m._forward_pre_hooks for m in model.modules()) and model.training
    assert gpm.tasks == 0 and gpm.ranks == {}
    gpm.after_task(task(1))
    assert set(gpm.ranks) == {"0"}
    model[0] = nn.Linear(5, 6, dtype=DTYPE)
    with pytest.raises(ValueError, match="layer '0' has 6 inputs, its bias included; expected 5 as before"):
        gpm.after_backward()
    model[0] = nn.Identity()
    with pytest.raises((RuntimeError, ValueError), match=r"no layer '0' any more|no linear layer"):
        gpm.after_backward()
    with pytest.raises(TypeError, match="exclude is '2'"):
        GPM(mlp(), exclude="2")
