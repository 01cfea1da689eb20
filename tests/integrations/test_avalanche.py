"""The plugins under a strategy that calls them in Avalanche's order, and Avalanche's own EWC and MAS as oracles."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tlkernels.integrations.avalanche import ContinualPlugin, EWCPlugin, MASPlugin, SIPlugin
from tlkernels.methods.continual.projection import AGEM
from tlkernels.methods.continual.regularization import EWC, MAS, SI, LwF

DTYPE = torch.float64


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).to(DTYPE)


def experience(seed, n=12):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, generator=g, dtype=DTYPE), torch.randint(3, (n,), generator=g)
    return SimpleNamespace(dataset=TensorDataset(x, y, torch.zeros(n, dtype=torch.long)))


class Strategy:
    """Avalanche's training loop: the callbacks of its SGD template in the order of its `training_epoch`."""

    def __init__(self, model, plugins, batch_size=4, lr=0.1):
        self.model, self.plugins, self.train_mb_size, self.device = model, plugins, batch_size, "cpu"
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        self._criterion = functional.cross_entropy
        self.clock = SimpleNamespace(train_exp_counter=0)
        self.experience = None

    def call(self, event):
        for plugin in self.plugins:
            if hasattr(plugin, event):
                getattr(plugin, event)(self)

    def train(self, exp, epochs=2):
        self.experience = exp
        self.model.train()
        self.call("before_training_exp")
        for _ in range(epochs):
            data = exp.dataset.tensors
            for i in range(0, len(data[0]), self.train_mb_size):
                self.mb_x, self.mb_y, self.mb_task_id = (t[i : i + self.train_mb_size] for t in data)
                self.call("before_training_iteration")
                self.optimizer.zero_grad()
                self.call("before_forward")
                self.mb_output = self.model(self.mb_x)
                self.call("after_forward")
                self.loss = self._criterion(self.mb_output, self.mb_y)
                self.call("before_backward")
                self.loss.backward()
                self.call("after_backward")
                self.call("before_update")
                self.optimizer.step()
                self.call("after_update")
                self.call("after_training_iteration")
        self.call("after_training_exp")
        self.clock.train_exp_counter += 1


def by_hand(model, method, exps, epochs=2, batch_size=4, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for exp in exps:
        x, y, _ = exp.dataset.tensors
        loader = [(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(x), batch_size)]
        method.before_task(loader)
        for a, b in loader * epochs:
            optimizer.zero_grad()
            out = model(a)
            (functional.cross_entropy(out, b) + method.penalty(a, out)).backward()
            method.after_backward()
            optimizer.step()
            method.after_step()
        method.after_task(loader)


@pytest.mark.parametrize(
    ("plugin", "method"),
    [
        (lambda m: EWCPlugin(m, 5.0), lambda m: EWC(m, 5.0)),
        (lambda m: EWCPlugin(m, 5.0, mode="online", decay=0.5), lambda m: EWC(m, 5.0, mode="online", decay=0.5)),
        (lambda m: MASPlugin(m, 2.0, batch_size=3), lambda m: MAS(m, 2.0)),
        (lambda m: SIPlugin(m, 4.0, xi=0.01), lambda m: SI(m, 4.0, xi=0.01)),
        (lambda m: ContinualPlugin(LwF(m, 2.0)), lambda m: LwF(m, 2.0)),
        (lambda m: ContinualPlugin(AGEM(m, 6, batch_size=4)), lambda m: AGEM(m, 6, batch_size=4)),
    ],
)
def test_trains_as_the_method_does_in_a_loop_of_ones_own(plugin, method):
    exps = [experience(seed) for seed in (1, 2, 3)]
    model, own, plain = mlp(), mlp(), mlp()
    strategy = Strategy(model, [plugin(model)])
    bare = Strategy(plain, [])
    for exp in exps:
        strategy.train(exp)
        bare.train(exp)
    by_hand(own, method(own), exps)
    for p, q, r in zip(model.parameters(), own.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(p, r, rtol=1e-4)
    assert strategy.plugins[0].method.tasks == 3


def test_a_model_that_takes_task_labels():
    class MultiTaskModule(nn.Module):
        pass

    class Heads(MultiTaskModule):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(3, 2, dtype=DTYPE) for _ in range(2))

        def forward(self, x, task):
            return torch.stack([h(x) for h in self.heads])[task, torch.arange(len(x))]

    model = Heads()
    plugin = EWCPlugin(model)
    exp = experience(1)
    exp.dataset.tensors[1].remainder_(2)
    plugin.after_training_exp(SimpleNamespace(model=model, experience=exp, device="cpu", train_mb_size=5))
    importance = plugin.method.importance
    assert importance["heads.0.weight"].any() and not importance["heads.1.weight"].any()


def test_misuse():
    with pytest.raises(TypeError, match=r"method is a int; expected one of methods\.continual"):
        ContinualPlugin(3)
    with pytest.raises(ValueError, match="batch_size is 0"):
        EWCPlugin(mlp(), batch_size=0)
    with pytest.raises(ValueError, match="EWCPlugin: strategy has another model"):
        Strategy(mlp(), [EWCPlugin(mlp())]).train(experience(1))
    model = mlp()
    with pytest.raises(ValueError, match="strategy has no experience"):
        EWCPlugin(model).after_training_exp(SimpleNamespace(model=model, device="cpu", train_mb_size=2))


# ---- Avalanche's own -------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(monkeypatch):
    """Avalanche's modules of single plugins, with stand-ins for what they import and do not use here."""
    spec = importlib.util.find_spec("avalanche")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("avalanche-lib is not installed")
    root = Path(next(iter(spec.submodule_search_locations)))
    for name in [n for n in sys.modules if n.partition(".")[0] == "avalanche"]:
        monkeypatch.delitem(sys.modules, name)
    folders = ("avalanche", "avalanche.training", "avalanche.training.plugins", "avalanche.models")
    for name in folders:
        module = ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, module)
    contents = {
        "avalanche.benchmarks": {"CLExperience": object, "OnlineCLExperience": object},
        "avalanche.models.batch_renorm": {"BatchRenorm2D": type("BatchRenorm2D", (nn.Module,), {})},
        "avalanche.models.utils": {"avalanche_forward": lambda model, x, task: model(x)},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    try:
        found = {name: importlib.import_module(f"avalanche.training.plugins.{name}") for name in ("ewc", "mas")}
    except ImportError as error:
        pytest.skip(f"avalanche's plugins cannot be imported alone: {error}")
    yield found
    for name in [
        n for n in sys.modules if n.partition(".")[0] == "avalanche" and n not in contents | dict.fromkeys(folders)
    ]:
        del sys.modules[name]


def test_ewc_is_avalanches_at_batch_size_one(theirs):
    exps, models = [experience(seed) for seed in (1, 2)], (mlp(), mlp())
    ours = EWCPlugin(models[0], 6.0)
    other = theirs["ewc"].EWCPlugin(3.0)  # no one half
    for model, plugin in zip(models, (ours, other), strict=True):
        strategy = Strategy(model, [plugin], batch_size=1)
        for exp in exps:
            strategy.train(exp)
    for name, f in ours.method.importance.items():
        expected = sum(other.importances[t][name].data for t in range(2))
        torch.testing.assert_close(f, expected.to(f), rtol=1e-6, atol=1e-9)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_ewc_of_avalanche_shrinks_with_the_batch_and_ours_does_not(theirs):
    model = mlp()
    found = []
    for batch in (1, 12):
        ours, other = EWCPlugin(model), theirs["ewc"].EWCPlugin(1.0)
        strategy = Strategy(model, [ours, other], batch_size=batch)
        strategy.experience = experience(1)
        strategy.call("after_training_exp")
        found.append((ours.method.importance["0.weight"].sum(), other.importances[0]["0.weight"].data.sum()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=0)
    assert float(found[1][1]) < 0.5 * float(found[0][1])


def test_mas_is_avalanches_at_batch_size_one(theirs):
    """Theirs has no one half in the norm, so twice our importance."""
    model = mlp()
    ours, other = MASPlugin(model), theirs["mas"].MASPlugin()
    strategy = Strategy(model, [ours, other], batch_size=1)
    strategy.experience = experience(1)
    strategy.call("after_training_exp")
    for name, f in ours.method.importance.items():
        torch.testing.assert_close(2 * f, other.importance[name].data.to(f), rtol=1e-6, atol=1e-9)
