"""PackNet, SupSup, HAT and Progressive Networks: what they promise of earlier tasks, and the papers' equations."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from tlkernels.methods.continual.architecture import HAT, PackNet, ProgressiveNetwork, SupSup

DTYPE = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=DTYPE)


def mlp(seed=0, norm=False):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.ReLU(), nn.Linear(6, 3)).to(DTYPE)


def train(model, method, seed, steps=4, parameters=None):
    # momentum and weight decay move weights whose gradient is zero
    parameters = list(model.parameters()) if parameters is None else parameters
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.3)
    for i in range(steps):
        optimizer.zero_grad()
        out = model(randn(8, 4, seed=seed + i))
        (functional.cross_entropy(out, torch.arange(8) % 3) + method.penalty()).backward()
        method.after_backward()
        optimizer.step()
        method.after_step()
    return optimizer


class TestPackNet:
    def learn(self, model, packnet, seed):
        packnet.before_task()
        train(model, packnet, seed)
        packnet.prune()
        train(model, packnet, seed + 10)
        packnet.after_task()

    @pytest.mark.parametrize("norm", [False, True])
    def test_outputs_of_earlier_tasks_stay_bit_for_bit(self, norm):
        model, x = mlp(norm=norm), randn(5, 4, seed=99)
        packnet = PackNet(model, 0.5)
        known = []
        for t in range(3):
            model.train()
            self.learn(model, packnet, 100 * t)
            model.eval()
            with packnet.apply_task(t):
                known.append(model(x).detach().clone())
        for t in range(3):
            with packnet.apply_task(t):
                assert torch.equal(model(x), known[t])
        assert not torch.equal(known[0], known[1])

    def test_one_optimizer_for_all_tasks_moves_nothing_frozen(self):
        model = mlp()
        packnet = PackNet(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        frozen = bias = None
        for t in range(2):
            packnet.before_task()
            for i in range(4):
                optimizer.zero_grad()
                model(randn(8, 4, seed=t + i)).square().sum().backward()
                packnet.after_backward()
                optimizer.step()
                packnet.after_step()
                if i == 1:
                    packnet.prune()
                if frozen is not None:
                    held = packnet.owners["0.weight"] == 1
                    assert torch.equal(model[0].weight[held], frozen[held])
                    assert torch.equal(model[0].bias, bias)
            packnet.after_task()
            frozen, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()

    def test_prunes_the_smallest_of_each_layer_and_masks_gradients(self):
        model = nn.Linear(4, 1, bias=False).to(DTYPE)
        packnet = PackNet(model, 0.5)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[3.0, -1.0, 0.5, -2.0]]))
        packnet.before_task()
        packnet.prune()
        assert model.weight.tolist() == [[3, 0, 0, -2]]
        model(torch.ones(1, 4, dtype=DTYPE)).sum().backward()
        packnet.after_backward()
        assert model.weight.grad.tolist() == [[1, 0, 0, 1]]
        packnet.after_task()
        packnet.before_task()
        assert packnet.owners["weight"].tolist() == [[1, 2, 2, 1]]
        model.weight.grad = None
        model(torch.ones(1, 4, dtype=DTYPE)).sum().backward()
        packnet.after_backward()
        assert model.weight.grad.tolist() == [[0, 1, 1, 0]]

    def test_capacity(self):
        packnet = PackNet(mlp(), 0.0)
        packnet.before_task()
        packnet.prune()
        packnet.after_task()
        assert packnet.free == 0
        with pytest.raises(RuntimeError, match="no weight is free for task 1"):
            packnet.before_task()

    def test_heads_are_left_alone(self):
        model = mlp()
        packnet = PackNet(model, heads=["2"])
        assert set(packnet.owners) == {"0.weight"}
        self.learn(model, packnet, 0)
        before = model[2].weight.detach().clone()
        packnet.before_task()
        train(model, packnet, 5)
        assert not torch.equal(model[2].weight, before)

    def test_apply_task_gives_the_weights_back_on_an_error(self):
        model = mlp()
        packnet = PackNet(model)
        self.learn(model, packnet, 0)
        self.learn(model, packnet, 50)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(KeyError), packnet.apply_task(0):
            raise KeyError
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_state_resumes_exactly(self):
        model = mlp()
        packnet = PackNet(model)
        self.learn(model, packnet, 0)
        packnet.before_task()
        train(model, packnet, 20)
        packnet.prune()
        other_model = mlp(5)
        other = PackNet(other_model)
        other.load_state_dict(packnet.state_dict())
        other_model.load_state_dict(model.state_dict())
        for m, p in ((model, packnet), (other_model, other)):
            train(m, p, 30)
            p.after_task()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))
        with pytest.raises(ValueError, match="other layers or shapes"):
            PackNet(nn.Linear(2, 2)).load_state_dict(packnet.state_dict())

    def test_shared_weights_are_refused(self):
        model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 3))
        model[1].weight = model[0].weight
        for method in (PackNet, SupSup):
            with pytest.raises(ValueError, match="the weight of '1' is shared"):
                method(model)

    def test_misuse(self):
        with pytest.raises(ValueError, match="no linear layer or convolution"):
            PackNet(nn.ReLU())
        with pytest.raises(TypeError, match="model is a int"):
            PackNet(3)
        with pytest.raises(ValueError, match=r"fraction is 1\.0; expected less than 1"):
            PackNet(mlp(), 1.0)
        with pytest.raises(ValueError, match="heads has '7'"):
            PackNet(mlp(), heads=["7"])
        packnet = PackNet(mlp())
        with pytest.raises(RuntimeError, match="no task runs"):
            packnet.after_backward()
        with pytest.raises(ValueError, match="task is 0"), packnet.apply_task(0):
            pass
        packnet.before_task()
        with torch.no_grad():
            packnet.model[2].weight[0, 0] = math.nan
        before = packnet.model[0].weight.detach().clone()
        with pytest.raises(ValueError, match="not finite"):
            packnet.prune()
        assert torch.equal(packnet.model[0].weight, before)


class TestSupSup:
    def learned(self, tasks=3, model=None):
        model = mlp() if model is None else model
        supsup = SupSup(model, 0.4, generator=generator(3))
        for t in range(tasks):
            supsup.before_task()
            optimizer = torch.optim.SGD(supsup.scores(), lr=5.0)
            for _ in range(25):
                optimizer.zero_grad()
                self.loss(model, t).backward()
                optimizer.step()
            supsup.after_task()
        return model, supsup

    def loss(self, model, t):
        return functional.cross_entropy(model(self.inputs(t)), torch.arange(12) % 3)

    def inputs(self, t):
        centers = 3 * randn(3, 4, seed=70 + t)
        return centers[torch.arange(12) % 3] + 0.1 * randn(12, 4, seed=t)

    def test_mask_and_straight_through_gradient(self):
        model = nn.Linear(3, 2, bias=False).to(DTYPE)
        supsup = SupSup(model, 0.5, init=None)
        weight = model.parametrizations.weight.original.detach().clone()
        supsup.before_task()
        (scores,) = supsup.scores()
        with torch.no_grad():
            scores.copy_(torch.tensor([[0.3, -5.0, 0.1], [0.2, 0.9, -0.4]]))
        mask = torch.tensor([[1.0, 0, 0], [1, 1, 0]], dtype=DTYPE)
        x, g = randn(4, 3), randn(4, 2, seed=1)
        out = model(x)
        torch.testing.assert_close(out, x @ (weight * mask).T)
        out.backward(g)
        torch.testing.assert_close(scores.grad, weight * (g.T @ x))
        assert model.parametrizations.weight.original.grad is None

    def test_signed_constant(self):
        model = mlp()
        SupSup(model)
        weight = model[0].parametrizations.weight.original
        assert torch.equal(weight.abs(), torch.full_like(weight, math.sqrt(2 / 4)))
        assert 0 < (weight > 0).sum() < weight.numel()

    def test_earlier_tasks_stay_bit_for_bit_in_one_bit_a_weight(self):
        model, supsup = self.learned(1)
        x = randn(5, 4, seed=9)
        known = model(x).detach().clone()
        supsup.before_task()
        optimizer = torch.optim.AdamW(supsup.scores(), lr=0.5)
        self.loss(model, 1).backward()
        optimizer.step()
        supsup.after_task()
        assert not torch.equal(model(x), known)
        supsup.apply_task(0)
        assert torch.equal(model(x), known)
        sizes = [b.numel() for masks in supsup.state_dict()["masks"] for b in masks]
        assert sizes == [3, 3, 3, 3]  # 24 and 18 weights, two tasks
        assert supsup.state_dict()["masks"][0][0].dtype == torch.uint8

    def test_entropy_gradient_is_that_of_the_superposition(self):
        model, supsup = self.learned(2)
        x, alpha = self.inputs(0), torch.tensor([0.3, 0.7], dtype=DTYPE)
        layers = [m.parametrizations.weight for m in (model[0], model[2])]

        def entropy(a):
            w = [p.original * (a[0] * p[0].mask(0) + a[1] * p[0].mask(1)) for p in layers]
            h = functional.relu(x @ w[0].T + model[0].bias)
            p = (h @ w[1].T + model[2].bias).softmax(1)
            return -(p * p.log()).sum()

        step = 1e-6
        for i in range(2):
            e = torch.zeros(2, dtype=DTYPE)
            e[i] = step
            want = (entropy(alpha + e) - entropy(alpha - e)) / (2 * step)
            torch.testing.assert_close(supsup.entropy_gradient(x, alpha)[i], want, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("method", ["one_shot", "binary"])
    def test_infers_the_task_by_the_papers_rule(self, method):
        _, supsup = self.learned(3)
        for t in range(3):
            x = self.inputs(t)
            left = [0, 1, 2]
            while len(left) > 1:
                alpha = torch.tensor([1 / len(left) if i in left else 0.0 for i in range(3)], dtype=DTYPE)
                grad = supsup.entropy_gradient(x, alpha)
                keep = 1 if method == "one_shot" else (len(left) + 1) // 2
                left = sorted(left, key=lambda i: float(grad[i]))[:keep]
            assert supsup.infer_task(x, method=method) == left[0]

    def test_finds_the_task_of_separate_inputs(self):
        # each mask opens other inputs, and is sure only of those
        model = nn.Linear(4, 2, bias=False).to(DTYPE)
        supsup = SupSup(model, 0.5, init=None)
        with torch.no_grad():
            model.parametrizations.weight.original.copy_(torch.tensor([[2.0, 2, 2, 2], [-2, -2, -2, -2]]))
        for columns in ([0, 1], [2, 3]):
            supsup.before_task()
            with torch.no_grad():
                supsup.scores()[0].zero_()[:, columns] = 1
            supsup.after_task()
        assert supsup.infer_task(torch.tensor([[1.0, 1, 0, 0]], dtype=DTYPE)) == 0
        assert supsup.infer_task(torch.tensor([[0.0, 0, 1, 1]], dtype=DTYPE), method="binary") == 1

    def test_reproducible_and_resumes(self):
        (a, first), (b, second) = self.learned(2), self.learned(2)
        x = randn(5, 4)
        assert torch.equal(a(x), b(x))
        c = mlp(8)
        third = SupSup(c, 0.4)
        c.load_state_dict(a.state_dict())
        third.load_state_dict(first.state_dict())
        assert torch.equal(c(x), a(x))
        third.apply_task(0)
        second.apply_task(0)
        assert torch.equal(c(x), b(x))
        with pytest.raises(ValueError, match="of other layers"):
            SupSup(nn.Linear(2, 2)).load_state_dict(first.state_dict())

    def test_misuse(self):
        model = mlp()
        with pytest.raises(ValueError, match="kept is 0"):
            SupSup(model, 0.0)
        with pytest.raises(ValueError, match="init is 'zeros'"):
            SupSup(model, init="zeros")
        supsup = SupSup(model)
        with pytest.raises(ValueError, match="parametrization already"):
            SupSup(model)
        with pytest.raises(RuntimeError, match="no task runs"):
            supsup.after_task()
        with pytest.raises(ValueError, match="alpha has shape"):
            supsup.infer_task(randn(2, 4))
        supsup.before_task()
        with pytest.raises(RuntimeError, match="task 0 runs"):
            supsup.before_task()
        supsup.after_task()
        with pytest.raises(ValueError, match="not finite"):
            supsup.infer_task(torch.full((2, 4), math.nan, dtype=DTYPE))
        with pytest.raises(ValueError, match="method is 'x'"):
            supsup.infer_task(randn(2, 4), method="x")


class TestHAT:
    def made(self, tasks=3):
        model = mlp()
        return model, HAT(model, ["0"], tasks, s_max=50.0, generator=generator(1))

    def test_forward_gates_units(self):
        model, hat = self.made()
        hat.before_task()
        hat.anneal(1, 3)
        s = 1 / 50 + (50 - 1 / 50) * 0.5
        assert hat.s == pytest.approx(s)
        x = randn(5, 4)
        gate = 1 / (1 + torch.exp(-s * hat.embeddings[0][0]))
        want = model[2](functional.relu(functional.linear(x, model[0].weight, model[0].bias)) * gate)
        torch.testing.assert_close(model(x), want)

    def test_penalty_is_weighted_by_free_capacity(self):
        _, hat = self.made()
        hat.before_task()
        torch.testing.assert_close(hat.penalty(), 0.75 * hat.gates()[0].mean())
        hat.after_task()
        hat.before_task()
        used, now = torch.sigmoid(50 * hat.embeddings[0][0]), hat.gates()[0]
        torch.testing.assert_close(hat.penalty(), 0.75 * (now * (1 - used)).sum() / (1 - used).sum())

    def test_gradients(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).to(DTYPE)
        hat = HAT(model, ["0", "3"], 2, s_max=20.0)
        hat.before_task()
        hat.after_task()
        hat.before_task()
        s = hat.anneal(2, 5)
        model(randn(3, 2, 3, 3)).square().sum().backward()
        raw = {n: p.grad.clone() for n, p in model.named_parameters()}
        q = [e.grad.clone() for e in hat.embeddings]
        hat.after_backward()
        one, two = (torch.sigmoid(20.0 * e[0]) for e in hat.embeddings)
        for i in range(3):
            torch.testing.assert_close(model[0].weight.grad[i], (1 - one[i]) * raw["0.weight"][i])
        for i in range(4):
            torch.testing.assert_close(model[3].bias.grad[i], (1 - two[i]) * raw["3.bias"][i])
            for j in range(12):
                want = (1 - min(two[i], one[j // 4])) * raw["3.weight"][i, j]
                torch.testing.assert_close(model[3].weight.grad[i, j], want)
        for e, grad in zip(hat.embeddings, q, strict=True):
            top = torch.cosh((s * e[1]).clamp(-50, 50)) + 1
            torch.testing.assert_close(e.grad[1], 20.0 / s * top / (torch.cosh(e[1]) + 1) * grad[1])
            assert not e.grad[0].any()

    def test_units_that_a_task_holds_do_not_move(self):
        model, hat = self.made()
        with torch.no_grad():
            hat.embeddings[0][0] = torch.tensor([6.0, 6, 6, -6, -6, -6])
        hat.before_task()
        hat.after_task()
        x = randn(5, 4)
        hat.apply_task(0)
        head, known = copy.deepcopy(model[2]), model[1](model[0](x)).detach().clone()
        hat.before_task()
        optimizer = torch.optim.SGD([*model.parameters(), *hat.embeddings], lr=0.5)
        for i in range(5):
            hat.anneal(i, 5)
            optimizer.zero_grad()
            (functional.cross_entropy(model(x), torch.arange(5) % 3) + hat.penalty()).backward()
            hat.after_backward()
            optimizer.step()
            hat.after_step()
        hat.after_task()
        assert hat.embeddings[0][1].abs().max() <= 6
        hat.apply_task(0)
        after = model[1](model[0](x))
        # gates of 6 are 1 in float64 at this slope, closed ones below 1e-130
        assert torch.equal(after[:, :3], known[:, :3])
        assert after[:, 3:].abs().max() < 1e-100
        assert not torch.equal(head.weight, model[2].weight)

    def test_state(self):
        _, hat = self.made()
        hat.before_task()
        hat.after_task()
        hat.before_task()
        hat.anneal(0, 3)
        model = mlp()
        other = HAT(model, ["0"], 3, s_max=50.0, generator=generator(7))
        other.load_state_dict(hat.state_dict())
        x = randn(3, 4)
        assert torch.equal(other.model(x), hat.model(x))
        assert torch.equal(other.penalty(), hat.penalty())
        assert torch.equal(self.made()[1].embeddings[0], hat.embeddings[0])
        with pytest.raises(ValueError, match="embeddings of state_dict"):
            HAT(mlp(), ["0"], 2).load_state_dict(hat.state_dict())

    def test_misuse(self):
        with pytest.raises(ValueError, match="layers has '1'"):
            HAT(mlp(), ["1"], 2)
        with pytest.raises(ValueError, match="expected a multiple of the 3 before"):
            HAT(mlp(), ["2", "0"], 2)
        with pytest.raises(ValueError, match="tasks is 0"):
            HAT(mlp(), ["0"], 0)
        with pytest.raises(ValueError, match=r"s_max is 0\.5"):
            HAT(mlp(), ["0"], 1, s_max=0.5)
        _, hat = self.made(1)
        with pytest.raises(ValueError, match="batch is 3"):
            hat.anneal(3, 3)
        hat.before_task()
        hat.after_task()
        with pytest.raises(RuntimeError, match="all of the 1 tasks"):
            hat.before_task()
        with pytest.raises(RuntimeError, match="no task runs"):
            hat.after_task()


class TestProgressiveNetwork:
    def factory(self, widths=(4, 5, 6, 3)):
        return lambda: [nn.Linear(a, b).to(DTYPE) for a, b in itertools.pairwise(widths)]

    def made(self, columns=3):
        torch.manual_seed(0)
        network = ProgressiveNetwork()
        for _ in range(columns):
            network.add_column(self.factory(), randn(2, 4))
        return network

    def test_forward_is_the_papers_equation(self):
        network, x = self.made(), randn(5, 4, seed=2)
        with torch.no_grad():
            for p in network.scales[2]:
                p.copy_(torch.tensor([0.5, -1.5]))
        hidden = []
        for k in range(3):
            h, outs = x, []
            for i, block in enumerate(network.columns[k]):
                z = h @ block.weight.T + block.bias
                if i and k:
                    scaled = [network.scales[k][i - 1][j] * hidden[j][i - 1] for j in range(k)]
                    read = torch.relu(torch.cat(scaled, 1) @ network.reductions[k][i - 1].weight.T)
                    u = network.laterals[k][i - 1]
                    z = z + read @ u.weight.T + u.bias
                h = torch.relu(z) if i < 2 else z
                outs.append(h)
            hidden.append(outs)
            torch.testing.assert_close(network(x, k), h)

    def test_earlier_columns_stay_bit_for_bit(self):
        torch.manual_seed(0)
        network, x = ProgressiveNetwork(), randn(6, 4)
        factory = lambda: [nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).to(DTYPE),  # noqa: E731
                           nn.Linear(5, 3).to(DTYPE)]  # fmt: skip
        network.add_column(factory, x)
        network.eval()
        known = network(x, 0).detach().clone()
        network.train()
        new = network.add_column(factory, x)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            assert all(p.grad is not None for p in new)
            optimizer.step()
        assert torch.equal(network(x, 0), known)
        assert {id(p) for p in network.parameters() if p.requires_grad} == {id(p) for p in new}

    def test_convolutions_and_other_widths(self):
        torch.manual_seed(0)
        network, x = ProgressiveNetwork(torch.tanh), randn(2, 1, 6, 6)

        def factory(width):
            return lambda: [nn.Conv2d(1, width, 3), nn.Conv2d(width, 4, 3, stride=2), nn.Sequential(nn.Flatten(),
                            nn.Linear(4, 2))]  # fmt: skip

        for width in (2, 5):
            network.add_column(lambda w=width: [b.to(DTYPE) for b in factory(w)()], x)
        c = network.columns
        h = torch.tanh(c[0][0](x)), torch.tanh(c[1][0](x))
        g0 = torch.tanh(c[0][1](h[0]))
        v, u = network.reductions[1], network.laterals[1]
        g1 = torch.tanh(c[1][1](h[1]) + u[0](torch.tanh(v[0](h[0]))))
        torch.testing.assert_close(network(x), c[1][2](g1) + u[1](torch.tanh(v[1](g0))))

    def test_state(self):
        network, other = self.made(), ProgressiveNetwork()
        for _ in range(3):
            other.add_column(self.factory(), randn(2, 4))
        other.load_state_dict(network.state_dict())
        assert torch.equal(other(randn(5, 4)), network(randn(5, 4)))

    def test_misuse(self):
        network = self.made(1)
        with pytest.raises(ValueError, match="factory gives 2 blocks; expected 3"):
            network.add_column(self.factory((4, 5, 3)), randn(2, 4))
        with pytest.raises(TypeError, match="factory gives what is no module"):
            network.add_column(lambda: [1, 2, 3], randn(2, 4))
        with pytest.raises(ValueError, match="expected 2"):
            ProgressiveNetwork().add_column(self.factory((4, 3)), randn(2, 4))
        with pytest.raises(ValueError, match="task is 1"):
            network(randn(2, 4), 1)
        with pytest.raises(TypeError, match="activation is a int"):
            ProgressiveNetwork(3)
        assert len(network.columns) == 1
