"""The training-time half of tlkernels.methods.finetune, held against closed forms, torch and transformers."""

from __future__ import annotations

import copy
import doctest
import importlib
import math
import pickle
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.optim import swa_utils

import tlkernels
from tlkernels.methods.finetune.averaging import EMA, SWA
from tlkernels.methods.finetune.layers import discriminative_lr_groups, layer_groups, layerwise_decay_groups
from tlkernels.methods.finetune.loop import EarlyStopping, accumulate_gradients
from tlkernels.methods.finetune.masking import MLMCollator, linear_mask_rate, mask_spans, mask_tokens, span_corruption
from tlkernels.methods.finetune.penalties import (
    L2SP,
    SAM,
    Mixout,
    apply_mixout,
    r3f_penalty,
    r_drop_loss,
    remove_mixout,
    smart_penalty,
    symmetric_kl,
)
from tlkernels.methods.finetune.schedules import (
    LRFinderResult,
    lr_find,
    slanted_triangular_schedule,
    warmup_cosine_schedule,
    warmup_linear_schedule,
)
from tlkernels.methods.finetune.unfreezing import LPFT, ChainThaw, FreezeBottom, GradualUnfreezing, LinearProbe

MODULES = ("layers", "unfreezing", "schedules", "penalties", "averaging", "masking", "loop")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(f"tlkernels.methods.finetune.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
    assert sorted(module.__all__) == sorted(set(module.__all__)) and all(hasattr(module, n) for n in module.__all__)


# ---- models ----------------------------------------------------------------------------------------------------------


def bert(layers: int = 4) -> Any:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=40, n_embd=8, n_layer=3, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def mlp(depth: int = 3, width: int = 4) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(*[nn.Conv2d(width, width, 1, bias=False) for _ in range(5)])
        self.norm = nn.BatchNorm2d(width)


class Stages(nn.Module):
    """Like a ResNet: a stem, stages of blocks of one class with down-sampling between, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3)
        self.layer1 = nn.Sequential(Block(2), Block(2))
        self.down = nn.Conv2d(2, 8, 1)
        self.layer2 = nn.Sequential(Block(8), Block(8), Block(8))
        self.fc = nn.Linear(8, 3)


# ---- layers.py -------------------------------------------------------------------------------------------------------


def assert_partition(model: nn.Module, groups: list[Any]) -> None:
    """Every parameter in exactly one group, under a name that the model knows it by."""
    placed = [(name, p) for group in groups for name, p in group.parameters.items()]
    assert Counter(id(p) for _, p in placed) == Counter(id(p) for p in model.parameters())
    assert all(model.get_parameter(name) is p for name, p in placed)
    assert sum(group.numel for group in groups) == sum(p.numel() for p in model.parameters())


def test_layer_groups_of_bert() -> None:
    model = bert(4)
    groups = layer_groups(model)
    assert [group.name for group in groups] == ["embeddings", *(f"bert.encoder.layer.{i}" for i in range(4)), "head"]
    assert_partition(model, groups)

    def beit_layer(name: str) -> int:
        if "embeddings" in name:
            return 0
        found = re.search(r"layer\.(\d+)\.", name)
        return int(found[1]) + 1 if found else 5

    for depth, group in enumerate(groups):
        assert {beit_layer(name) for name in group.parameters} == {depth}


def test_tied_parameters_count_once_in_the_lowest_layer() -> None:
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    groups = layer_groups(model)
    assert_partition(model, groups)
    assert [g.name for g in groups] == ["embeddings", *(f"transformer.h.{i}" for i in range(3)), "head"]
    assert set(groups[0].parameters) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert set(groups[-1].parameters) == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    # the tied matrix goes to the lowest of its groups even where a pattern for a later name is lower
    groups = layer_groups(model, ["lm_head", "transformer"])
    assert_partition(model, groups)
    assert set(groups[0].parameters) == {"transformer.wte.weight"}


def test_layer_groups_of_convolutional_networks() -> None:
    model = cnn()
    groups = layer_groups(model)
    assert_partition(model, groups)
    assert [sorted({name.split(".")[0] for name in g.parameters}) for g in groups] == [["0", "1"], ["4", "5"], ["9"]]
    assert [list(g.modules) for g in groups] == [["0", "1"], ["4", "5"], ["9"]]

    vgg = nn.ModuleDict({"features": nn.Sequential(*list(cnn())[:8]), "classifier": nn.Linear(6, 2)})
    groups = layer_groups(vgg)
    assert_partition(vgg, groups)
    assert [g.name for g in groups] == ["features.0", "features.4", "head"]
    assert {"features.5.weight", "features.5.bias"} < set(groups[1].parameters)  # the norm goes with its convolution

    resnet = Stages()
    groups = layer_groups(resnet)
    assert_partition(resnet, groups)
    names = ["embeddings", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer2.2", "head"]
    assert [g.name for g in groups] == names
    assert "down.weight" in groups[2].parameters  # what stands between goes with the block before
    assert "layer2.0.norm" in groups[3].modules
    one_stage = nn.ModuleDict(
        {"stem": nn.Conv2d(1, 2, 3), "blocks": nn.Sequential(Block(2), Block(2)), "fc": nn.Linear(2, 3)}
    )
    groups = layer_groups(one_stage)  # the lists inside the blocks are longer, and do not count
    assert_partition(one_stage, groups)
    assert [g.name for g in groups] == ["embeddings", "blocks.0", "blocks.1", "head"]


def test_layer_groups_of_an_encoder_with_decoder() -> None:
    model = nn.Transformer(8, 2, num_encoder_layers=3, num_decoder_layers=2, dim_feedforward=16)
    groups = layer_groups(model)
    assert_partition(model, groups)
    names = [*(f"encoder.layers.{i}" for i in range(3)), *(f"decoder.layers.{i}" for i in range(2)), "head"]
    assert [g.name for g in groups] == names
    assert "encoder.norm.weight" in groups[2].parameters and "decoder.norm.weight" in groups[-1].parameters


def test_layer_groups_without_a_list_and_with_small_heads() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2)

    assert [sorted(g.parameters) for g in layer_groups(Plain())] == [
        ["conv.bias", "conv.weight", "norm.bias", "norm.weight"],
        ["fc.bias", "fc.weight"],
    ]
    multi_task = nn.ModuleDict({"bert": bert(3), "heads": nn.ModuleList([nn.Linear(8, 2) for _ in range(2)])})
    groups = layer_groups(multi_task)
    assert_partition(multi_task, groups)
    assert len(groups) == 5 and {"heads.0.weight", "heads.1.weight"} <= set(groups[-1].parameters)
    small = [nn.Sequential(nn.Dropout(), nn.Linear(8, 2)) for _ in range(2)]
    for heads in (small, [nn.ModuleDict({"out": head}) for head in small]):
        multi_task = nn.ModuleDict({"bert": bert(3), "heads": nn.ModuleList(heads)})
        assert [g.name for g in layer_groups(multi_task)][-2:] == ["bert.bert.encoder.layer.2", "head"]


def test_layer_groups_of_a_model_in_four_bits() -> None:
    names = [group.name for group in layer_groups(bert(3))]
    model = tlkernels.quantize_model(bert(3), skip=["classifier"])
    groups = layer_groups(model)
    assert_partition(model, groups)
    assert [group.name for group in groups] == names
    assert set(groups[1].parameters) == {n for n, _ in model.named_parameters() if ".layer.0." in n}


def test_layer_groups_by_patterns() -> None:
    model = bert(4)
    groups = layer_groups(model, ["embeddings", ["layer.0", "layer.1"], ["layer.[23]"], "*"])
    assert_partition(model, groups)
    assert groups[1].numel == groups[2].numel == 2 * sum(p.numel() for p in model.bert.encoder.layer[0].parameters())
    assert set(groups[3].parameters) == {n for n, _ in model.named_parameters() if "pooler" in n or "classifier" in n}
    assert groups[0].name == "embeddings" and groups[1].name == "layer.0, layer.1"
    assert layer_groups(model, groups) == groups


@pytest.mark.parametrize("layers", [1, 6])
@pytest.mark.parametrize(
    ("make", "ratio"), [(discriminative_lr_groups, 1 / 2.6), (layerwise_decay_groups, 0.95)], ids=["2.6", "0.95"]
)
def test_learning_rates_count_layers_not_parameters(make: Callable[..., Any], ratio: float, layers: int) -> None:
    model = bert(layers)
    layers_here = ["embeddings", *(f"layer.{i}" for i in range(layers)), "*"]
    groups = make(model, 1e-3, layers=layers_here)
    assert len(groups) == layers + 2
    assert [g["lr"] for g in groups] == pytest.approx([1e-3 * ratio**above for above in range(layers + 1, -1, -1)])
    model.bert.requires_grad_(False)  # frozen layers must be known to the optimizer, too
    optimizer = torch.optim.AdamW(make(model, 1e-3, layers=layers_here))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_weight_decay_of_matrices_alone() -> None:
    model = bert(2)
    groups = layerwise_decay_groups(model, 1.0, 0.5, weight_decay=0.1)
    for group in groups:
        plain = group["name"].endswith(".no_decay")
        assert all((p.dim() <= 1) == plain for p in group["params"])
        assert group["weight_decay"] == (0.0 if plain else 0.1)
    assert len(groups) == 8 and [g["lr"] for g in groups] == [0.125, 0.125, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    everywhere = layerwise_decay_groups(model, 1.0, 0.5, weight_decay=0.1, decay_bias_and_norm=True)
    assert [g["weight_decay"] for g in everywhere] == [0.1] * 4
    assert all("weight_decay" not in g for g in layerwise_decay_groups(model, 1.0, 0.5))


def test_layers_errors() -> None:
    model = mlp()
    with pytest.raises(TypeError, match=r"layer_groups: model is a int; expected a torch\.nn\.Module"):
        layer_groups(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model \(ReLU\) has no parameters"):
        layer_groups(nn.ReLU())
    with pytest.raises(ValueError, match="the pattern 'x', which matches no parameter"):
        layer_groups(model, ["x", "*"])
    with pytest.raises(ValueError, match=r"no pattern of layers matches 1\.weight, 1\.bias, 2\.weight and 1 more"):
        layer_groups(model, ["0"])
    with pytest.raises(TypeError, match="expected a sequence with the patterns"):
        layer_groups(model, "0")
    with pytest.raises(TypeError, match="mixes groups and patterns"):
        layer_groups(model, [*layer_groups(model), "0"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"factor is 0\.5; expected a finite number >= 1"):
        discriminative_lr_groups(model, 1.0, 0.5)
    with pytest.raises(ValueError, match=r"decay is 1\.5; expected 0 < decay <= 1"):
        layerwise_decay_groups(model, 1.0, 1.5)
    with pytest.raises(ValueError, match=r"lr is 0\.0; expected a finite number > 0"):
        layerwise_decay_groups(model, 0.0)
    with pytest.raises(ValueError, match="weight_decay is -1; expected a finite number >= 0"):
        layerwise_decay_groups(model, 1.0, weight_decay=-1)


# ---- unfreezing.py ---------------------------------------------------------------------------------------------------


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_gradual_unfreezing_of_bert() -> None:
    model = bert(3)
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    before = trained(model)
    schedule = GradualUnfreezing(model)
    optimizer = torch.optim.SGD(discriminative_lr_groups(model, lr=0.1))
    ids, labels = torch.randint(40, (2, 5)), torch.tensor([0, 2])
    for epoch in range(6):
        schedule.step(epoch)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        moved = {name.split(".")[3] if ".layer." in name else name.split(".")[-3 if "embeddings" in name else -2]
                 for name, p in model.named_parameters() if not torch.equal(p, start[name])}  # fmt: skip
        blocks = {str(i) for i in range(max(0, 3 - epoch), 3)}
        assert moved - {"embeddings", "dense", "classifier"} == blocks
        assert ("embeddings" in moved) == (epoch >= 4) and "classifier" in moved
    assert trained(model) == before  # what was frozen at first stays so
    schedule.step(0)
    assert trained(model) < before
    schedule.restore()
    assert trained(model) == before


def test_a_frozen_parameter_does_not_move_with_a_stale_gradient() -> None:
    model = mlp(2)
    schedule = ChainThaw(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    head = model[1].weight.detach().clone()
    schedule.step(1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, head)


def test_chain_thaw_frozen_bottom_probe_and_lpft() -> None:
    model = mlp(4)
    chain = ChainThaw(model, epochs_per_stage=2)
    stages = [chain.step(epoch) for epoch in range(0, 14, 2)]
    assert stages == [["3"], ["0"], ["1"], ["2"], ["0", "1", "2", "3"], ["0", "1", "2", "3"], ["0", "1", "2", "3"]]
    assert chain.step(3) == ["0"] and trained(model) == {"0.weight", "0.bias"}
    chain.restore()

    assert FreezeBottom(model, 3).step(7) == ["3"] and trained(model) == {"3.weight", "3.bias"}
    model.requires_grad_(True)
    assert len(FreezeBottom(model, 0).step()) == 4
    probe = LinearProbe(model)
    assert trained(model) == {"3.weight", "3.bias"} and probe.step(9) == ["3"]
    probe.restore()
    lpft = LPFT(model, probe_epochs=2)
    assert [len(lpft.step(epoch)) for epoch in range(4)] == [1, 1, 4, 4]
    assert len(GradualUnfreezing(model, start=2, groups_per_epoch=5).step()) == 4


def test_unfreezing_goes_on_from_a_state() -> None:
    model = mlp(4)
    model[0].bias.requires_grad_(False)
    first = GradualUnfreezing(model)
    first.step(2)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    other = mlp(4)
    schedule = GradualUnfreezing(other)
    schedule.load_state_dict(state)
    assert schedule.epoch == 2 and trained(other) == {f"{i}.{n}" for i in (1, 2, 3) for n in ("weight", "bias")}
    assert schedule.step() == ["0", "1", "2", "3"] and "0.bias" not in trained(other)
    with pytest.raises(ValueError, match=r"GradualUnfreezing\.load_state_dict: .* is a parameter of the state"):
        GradualUnfreezing(mlp(3)).load_state_dict(state)


@pytest.mark.parametrize("keep", [True, False])
def test_frozen_batch_norm_statistics(keep: bool) -> None:
    model = cnn()
    schedule = GradualUnfreezing(model, freeze_batch_norm=keep)
    model.train()  # after the schedule, as loops do
    lower, x = model[1], 3 + torch.randn(4, 1, 12, 12)
    assert isinstance(lower, nn.BatchNorm2d) and lower.running_mean is not None
    before = lower.running_mean.clone()
    out = model(x)
    assert torch.equal(lower.running_mean, before) == keep
    if keep:
        reference = copy.deepcopy(model).eval()
        schedule.step(5)
        assert lower.training and torch.allclose(out, reference(x), atol=1e-6)  # the dropout-free net, frozen norms
        model(x)
        assert not torch.equal(lower.running_mean, before)
        schedule.step(0)
        schedule.restore()
        assert lower.training and not lower._forward_pre_hooks


def test_unfreezing_errors_leave_the_model_alone() -> None:
    model = mlp(3)
    with pytest.raises(ValueError, match="FreezeBottom: k is 3; expected 0 to 2: the model has 3 groups"):
        FreezeBottom(model, 3)
    with pytest.raises(ValueError, match="GradualUnfreezing: start is 0; expected >= 1"):
        GradualUnfreezing(model, start=0)
    with pytest.raises(ValueError, match="groups_per_epoch is 0; expected >= 1"):
        GradualUnfreezing(model, groups_per_epoch=0)
    with pytest.raises(ValueError, match="epochs_per_stage is 0; expected >= 1"):
        ChainThaw(model, epochs_per_stage=0)
    with pytest.raises(ValueError, match="probe_epochs is 0; expected >= 1"):
        LPFT(model, probe_epochs=0)
    assert len(trained(model)) == 6
    with pytest.raises(ValueError, match=r"LinearProbe\.step: epoch is -1; expected >= 0"):
        LinearProbe(model).step(-1)


# ---- schedules.py ----------------------------------------------------------------------------------------------------


def rates(make: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[list[float]]:
    """The rates of two groups, over the steps."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.25)]
    optimizer = torch.optim.SGD(groups)
    scheduler, seen = make(optimizer), []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(("total", "cut_frac", "ratio"), [(50, 0.1, 32), (100, 0.29, 8), (20, 0.25, 1)])
def test_slanted_triangular_is_the_papers_formula(total: int, cut_frac: float, ratio: float) -> None:
    def paper(t: int) -> float:
        cut = round(total * cut_frac)
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
        return (1 + p * (ratio - 1)) / ratio

    seen = rates(lambda o: slanted_triangular_schedule(o, total, cut_frac=cut_frac, ratio=ratio), total + 5)
    expected = [paper(t) for t in range(total + 1)] + [1 / ratio] * 4
    np.testing.assert_allclose(seen, [[e, 0.25 * e] for e in expected], rtol=1e-12)


@pytest.mark.parametrize("total", [1, 3, 19])
def test_slanted_triangular_where_the_cut_is_not_whole(total: int) -> None:
    seen = [lr for lr, _ in rates(lambda o: slanted_triangular_schedule(o, total), total + 3)]
    assert min(seen) == pytest.approx(1 / 32) and max(seen) == 1.0
    assert seen[total] == pytest.approx(1 / 32) and (total == 1 or seen[total - 1] > 1 / 32)


@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 10), (10, 10), (1, 2)])
def test_warmup_schedules_equal_those_of_transformers(warmup: int, total: int) -> None:
    linear = rates(lambda o: warmup_linear_schedule(o, warmup, total), total + 3)
    np.testing.assert_allclose(
        linear, rates(lambda o: transformers.get_linear_schedule_with_warmup(o, warmup, total), total + 3), rtol=1e-12
    )
    for cycles in (0.5, 1.5):
        cosine = rates(lambda o, c=cycles: warmup_cosine_schedule(o, warmup, total, num_cycles=c), total + 1)
        oracle = rates(lambda o, c=cycles: transformers.get_cosine_schedule_with_warmup(o, warmup, total, c), total + 1)
        np.testing.assert_allclose(cosine, oracle, rtol=1e-12, atol=1e-15)
    floor = rates(lambda o: warmup_cosine_schedule(o, warmup, total, min_lr_ratio=0.1), total + 4)
    assert [lr for lr, _ in floor[total + 1 :]] == pytest.approx([0.1] * 3)  # it does not rise again
    if warmup < total:
        middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (total - 1 - warmup) / (total - warmup)))
        assert floor[total - 1][0] == pytest.approx(middle)


def test_schedules_can_be_pickled_and_resumed() -> None:
    def make() -> Any:
        return warmup_cosine_schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 2, 9)

    def advance(scheduler: Any, steps: int) -> float:
        for _ in range(steps):
            scheduler.optimizer.step()
            scheduler.step()
        return float(scheduler.get_last_lr()[0])

    first, second = make(), make()
    assert pickle.loads(pickle.dumps(first.lr_lambdas))[0](5) == first.lr_lambdas[0](5)
    advance(first, 3)
    second.load_state_dict(first.state_dict())
    assert advance(second, 2) == advance(first, 2) == pytest.approx(0.5 * (1 + math.cos(math.pi * 3 / 7)))


def test_schedule_errors() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="num_training_steps is 0; expected >= 1"):
        slanted_triangular_schedule(optimizer, 0)
    with pytest.raises(ValueError, match=r"cut_frac is 1\.0; expected 0 < cut_frac < 1"):
        slanted_triangular_schedule(optimizer, 5, cut_frac=1.0)
    with pytest.raises(ValueError, match=r"ratio is 0\.5; expected a finite number >= 1"):
        slanted_triangular_schedule(optimizer, 5, ratio=0.5)
    with pytest.raises(ValueError, match="warmup_linear_schedule: num_warmup_steps is 6; expected 0 to num_training_"):
        warmup_linear_schedule(optimizer, 6, 5)
    with pytest.raises(ValueError, match="num_cycles is 0; expected a finite number > 0"):
        warmup_cosine_schedule(optimizer, 1, 5, num_cycles=0)
    with pytest.raises(ValueError, match="min_lr_ratio is 2; expected 0 <= min_lr_ratio <= 1"):
        warmup_cosine_schedule(optimizer, 1, 5, min_lr_ratio=2)


def regression_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def finder_setup() -> tuple[nn.Module, torch.optim.Optimizer, torch.utils.data.DataLoader[Any]]:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    # the batch norm is not the optimizer's, so nothing zeroes its gradients
    optimizer = torch.optim.AdamW([{"params": model[i].parameters(), "lr": lr} for i, lr in ((0, 0.01), (3, 0.1))])
    x = torch.randn(40, 4)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    loader = torch.utils.data.DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(5))
    regression_loss(model, next(iter(loader))).backward()
    optimizer.step()  # moments that must survive
    return model, optimizer, loader


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> list[Any]:
    tensors = [t.clone() for t in model.state_dict().values()]
    tensors += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    tensors += [v.clone() for s in optimizer.state.values() for v in s.values()]
    tensors += [torch.get_rng_state(), loader.generator.get_state()]
    rest = [[g["lr"] for g in optimizer.param_groups], [m.training for m in model.modules()]]
    return [*tensors, rest, random.getstate(), np.random.get_state()[1].tolist()]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("fail", [False, True])
def test_lr_find_restores_everything(fail: bool) -> None:
    model, optimizer, loader = finder_setup()
    before = snapshot(model, optimizer, loader)
    moments = [id(v) for s in optimizer.state.values() for v in s.values()]
    seen: list[list[float]] = []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        random.random()
        np.random.rand()
        seen.append([g["lr"] for g in optimizer.param_groups])
        if fail and len(seen) == 9:
            model.eval()
            raise KeyError("mid-way")
        return regression_loss(model, batch)

    if fail:
        with pytest.raises(KeyError, match="mid-way"):
            lr_find(model, optimizer, loss_fn, loader, start=1e-4, end=1e-1, steps=16)
    else:
        result = lr_find(model, optimizer, loss_fn, loader, start=1e-4, end=1e-1, steps=16, divergence=1e9)
        assert result.lrs == pytest.approx(np.geomspace(1e-4, 1e-1, 16).tolist()) and not result.diverged
        np.testing.assert_allclose(seen, [[0.1 * lr, lr] for lr in result.lrs])  # groups keep their ratio
        average, smoothed = 0.0, []
        for step, loss in enumerate(result.losses):
            average = 0.9 * average + 0.1 * loss
            smoothed.append(average / (1 - 0.9 ** (step + 1)))
        assert result.smoothed == pytest.approx(smoothed)
    assert same(snapshot(model, optimizer, loader), before)
    assert [id(v) for s in optimizer.state.values() for v in s.values()] == moments


def test_lr_find_on_a_quadratic() -> None:
    # L = w^2 / 2 under SGD: w <- (1 - lr) w falls fastest at lr = 1, and grows beyond lr = 2
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    model = nn.ParameterList([w])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    result = lr_find(
        model, optimizer, lambda m, _: m[0].square().sum() / 2, [None], start=1e-3, end=100, steps=60, smoothing=0
    )
    lrs = np.geomspace(1e-3, 100, 60)
    weights = 2 * np.cumprod([1.0, *(1 - lrs)])[: len(result.losses)]
    np.testing.assert_allclose(result.losses, weights**2 / 2, rtol=1e-9, atol=1e-300)
    assert result.diverged and result.losses[-1] > 4 * min(result.losses) and w.item() == 2.0
    slopes = np.gradient(np.array(result.losses[:-1]), np.log(lrs[: len(result.losses) - 1]))
    assert result.suggestion == pytest.approx(lrs[slopes.argmin()]) and slopes.min() < 0


def test_lr_find_stops_at_nan_and_finds_no_rate_where_nothing_falls() -> None:
    w = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([w], lr=1.0)
    losses = iter([1.0, 2.0, 3.0, math.nan, 1.0])
    result = lr_find(nn.ParameterList([w]), optimizer, lambda m, _: m[0].sum() * 0 + next(losses), [0], divergence=9)
    assert result.diverged and len(result.lrs) == 4 and math.isnan(result.losses[-1]) and result.suggestion is None
    losses = iter([9.0, 8.0, 3.0, 2.0, math.nan])  # steepest about the second, whatever comes after the end
    result = lr_find(nn.ParameterList([w]), optimizer, lambda m, _: m[0].sum() * 0 + next(losses), [0], smoothing=0)
    assert result.diverged and result.suggestion == result.lrs[1]


def test_lr_find_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    result = LRFinderResult([1e-3, 1e-2, 1e-1], [3.0, 2.0, 1.0], [3.0, 2.5, 1.5], False, 1e-2)
    ax = result.plot()
    assert ax.get_xscale() == "log" and list(ax.lines[1].get_ydata()) == result.smoothed
    assert result.plot(ax) is ax and ax.lines[2].get_xdata()[0] == 1e-2


def test_lr_find_errors() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"start and end are 1\.0 and 0\.1; expected 0 < start < end"):
        lr_find(model, optimizer, regression_loss, [], start=1.0, end=0.1)
    with pytest.raises(ValueError, match="steps is 1; expected >= 2"):
        lr_find(model, optimizer, regression_loss, [], steps=1)
    with pytest.raises(ValueError, match="smoothing is 1; expected 0 <= smoothing < 1"):
        lr_find(model, optimizer, regression_loss, [], smoothing=1)
    with pytest.raises(ValueError, match="divergence is 1; expected > 1"):
        lr_find(model, optimizer, regression_loss, [], divergence=1)
    with pytest.raises(ValueError, match="data is empty; expected at least one batch"):
        lr_find(model, optimizer, regression_loss, [])
    with pytest.raises(TypeError, match=r"data is an iterator \(list_iterator\)"):
        lr_find(model, optimizer, regression_loss, iter([]))
    with pytest.raises(TypeError, match=r"loss_fn returned of shape \(3,\); expected a tensor with one element"):
        lr_find(model, optimizer, lambda m, b: torch.ones(3), [0])
    with pytest.raises(ValueError, match=r"the highest lr of optimizer is 0\.0; expected > 0"):
        lr_find(model, torch.optim.SGD(model.parameters(), lr=0.0), regression_loss, [0])


# ---- penalties.py: L2-SP ---------------------------------------------------------------------------------------------


def moved_model(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Tensor]]:
    model = mlp(3).to(dtype)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return model, start


def l2_sp_formula(model: nn.Module, start: dict[str, Tensor], alpha: float, beta: float) -> Tensor:
    old = sum((p - start[name]).square().sum() for name, p in model.named_parameters() if name[0] != "2")
    new = sum(p.square().sum() for name, p in model.named_parameters() if name[0] == "2")
    return torch.as_tensor(alpha / 2 * old + beta / 2 * new)


def test_l2_sp_value_and_gradient() -> None:
    model, start = moved_model()
    anchor = L2SP(model, 0.3, 0.7, new=["2"], start=start)
    formula = l2_sp_formula(model, start, 0.3, 0.7)
    torch.testing.assert_close(anchor.penalty(), formula, rtol=1e-12, atol=0)
    params = list(model.parameters())
    expected = torch.autograd.grad(1.7 * formula, params)
    torch.testing.assert_close(torch.autograd.grad(1.7 * anchor.penalty(), params), expected)
    assert torch.autograd.gradcheck(lambda *_: anchor.penalty(), params)

    x = torch.randn(5, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    task = [p.grad.clone() for p in params if p.grad is not None]
    anchor.add_gradient_()
    torch.testing.assert_close([p.grad for p in params], [g + e / 1.7 for g, e in zip(task, expected, strict=True)])
    model.zero_grad()
    anchor.add_gradient_()
    torch.testing.assert_close([p.grad for p in params], [e / 1.7 for e in expected])


def test_l2_sp_at_the_start_and_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlkernels.methods.finetune.penalties._CHUNK", 10)  # several sweeps
    model = mlp(3)
    anchor = L2SP(model, 0.5, 0.1, new=["2"])
    model[0].requires_grad_(False)
    penalty = anchor.penalty()
    torch.testing.assert_close(penalty, 0.05 * sum(p.detach().square().sum() for p in model[2].parameters()))
    penalty.backward()
    assert model[0].weight.grad is None
    assert torch.equal(model[1].weight.grad, torch.zeros(4, 4))  # no NaN where the distance is 0
    torch.testing.assert_close(model[2].weight.grad, 0.1 * model[2].weight.detach())
    model.zero_grad()
    anchor.add_gradient_()
    assert model[0].weight.grad is None
    torch.testing.assert_close(model[2].weight.grad, 0.1 * model[2].weight.detach())


def test_l2_sp_dtypes_and_state() -> None:
    model, start = moved_model(torch.float32)
    stored = L2SP(model, 1.0, start=start, dtype=torch.bfloat16, device="cpu")
    assert all(t.dtype == torch.bfloat16 for t in stored.state_dict().values())
    rounded = {name: t.bfloat16().float() for name, t in start.items()}
    want = sum(0.5 * (p - rounded[n]).square().sum() for n, p in model.named_parameters())
    torch.testing.assert_close(stored.penalty(), want)

    half = copy.deepcopy(model).bfloat16()
    anchor = L2SP(half, 1.0, start={n: t.bfloat16() for n, t in start.items()})
    penalty = anchor.penalty()
    assert penalty.dtype == torch.float32  # a sum over many bfloat16 squares would stall
    exact = sum(0.5 * (p.detach().float() - rounded[n]).square().sum() for n, p in half.named_parameters())
    torch.testing.assert_close(penalty.detach(), exact)
    anchor.add_gradient_()
    grad = half[0].weight.grad
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grad, (half[0].weight.detach().float() - rounded["0.weight"]).bfloat16())

    fresh = L2SP(copy.deepcopy(model), 1.0)
    assert fresh.penalty().item() == 0
    fresh.load_state_dict(L2SP(model, 1.0, start=start).state_dict())
    torch.testing.assert_close(fresh.penalty(), l2_sp_formula(model, start, 1.0, 0) + sum(
        0.5 * (p - start[n]).square().sum() for n, p in model.named_parameters() if n[0] == "2"))  # fmt: skip


def test_l2_sp_sees_a_change_before_backward_and_counts_ties_once() -> None:
    model = mlp(2)
    penalty = L2SP(model, 1.0).penalty()
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()
    tied = gpt2()
    with torch.no_grad():
        anchor = L2SP(tied, 2.0)
        tied.lm_head.weight.add_(1)
    assert anchor.penalty().item() == pytest.approx(tied.lm_head.weight.numel())


def test_l2_sp_errors() -> None:
    model = mlp(2)
    with pytest.raises(ValueError, match="L2SP: alpha is -1; expected a finite number >= 0"):
        L2SP(model, -1)
    with pytest.raises(TypeError, match="new is '1'; expected a sequence of patterns"):
        L2SP(model, new="1")
    with pytest.raises(ValueError, match="new has the pattern 'head', which matches no parameter"):
        L2SP(model, new=["head"])
    with pytest.raises(ValueError, match=r"start has no 0\.weight; expected it there, or in the patterns of new"):
        L2SP(model, start={})
    bad = {**model.state_dict(), "1.weight": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=r"start\['1\.weight'\] has shape \(2, 4\); expected \(4, 4\)"):
        L2SP(model, start=bad)
    with pytest.raises(TypeError, match=r"dtype is torch\.int8; expected a floating-point dtype"):
        L2SP(model, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"load_state_dict: 1\.bias is in the state or in the model, not in both"):
        L2SP(model).load_state_dict({k: v for k, v in model.state_dict().items() if k != "1.bias"})
    with pytest.raises(ValueError, match=r"load_state_dict: 1\.weight has shape \(2, 4\); expected \(4, 4\)"):
        L2SP(model).load_state_dict(bad)


# ---- penalties.py: mixout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_dim", [None, 1])
def test_mixout_is_the_papers_formula(input_dim: int | None) -> None:
    p, start = 0.4, torch.randn(6, 50, dtype=torch.float64)
    weight = torch.randn(6, 50, dtype=torch.float64, requires_grad=True)
    out = Mixout(start, p, input_dim)(weight)
    replaced = (start * 1 - p * start) / (1 - p)  # M = 1
    kept = (weight - p * start) / (1 - p)  # M = 0
    mixed = torch.isclose(out, replaced)
    torch.testing.assert_close(out, torch.where(mixed, replaced, kept))
    assert 0.2 < mixed.double().mean() < 0.6
    if input_dim == 1:
        assert torch.equal(mixed, mixed[:1].expand_as(mixed))  # one draw for an input
    else:
        assert 0 < mixed[:, 0].sum() < 6 or 0 < mixed[:, 1].sum() < 6
    grad_output = torch.randn_like(out)
    out.backward(grad_output)
    torch.testing.assert_close(weight.grad, torch.where(mixed, 0, grad_output / (1 - p)))


def test_mixout_expectation() -> None:
    p, draws = 0.7, 4000
    start, weight = torch.randn(30, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    mixout = Mixout(start, p)
    mean = torch.stack([mixout(weight) for _ in range(draws)]).mean(0)
    deviation = (weight - start).abs() * math.sqrt(p / (1 - p) / draws)
    assert ((mean - weight).abs() < 4.5 * deviation).all()


def test_mixout_with_a_start_of_zero_is_dropout_of_the_inputs() -> None:
    torch.manual_seed(3)
    layer = nn.Linear(40, 5, bias=False)
    weight = layer.weight.detach().clone()
    apply_mixout(layer, 0.5, start={"weight": torch.zeros(5, 40)})
    effective = layer.weight
    kept = (effective != 0).all(0)
    torch.testing.assert_close(effective, weight * kept / 0.5)
    assert 5 < kept.sum() < 35


def test_apply_mixout_and_its_removal() -> None:
    model = bert(2)
    ids = torch.randint(40, (2, 6))
    plain = model.eval()(input_ids=ids).logits
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    names = apply_mixout(model, 0.6, layers=["bert.encoder"])
    assert len(names) == 2 * 6 and all(n.startswith("bert.encoder.layer.") for n in names)
    assert torch.equal(model(input_ids=ids).logits, plain)  # evaluation
    apply_mixout(model, 0.0, layers=["pooler"])
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(model(input_ids=ids).logits, plain)  # w = w0: nothing to mix
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    first, second = (model(input_ids=ids).logits for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    dense = model.bert.encoder.layer[0].output.dense
    assert torch.equal(dense.weight, dense.parametrizations.weight.original)  # not mixed, though it has moved
    state = model.state_dict()
    again = bert(2)
    apply_mixout(again, 0.6, layers=["bert.encoder", "pooler"])
    again.load_state_dict(state)
    start = again.bert.encoder.layer[0].output.dense.parametrizations.weight[0].start
    assert torch.equal(start, before["bert.encoder.layer.0.output.dense.weight"][1])

    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert remove_mixout(model) is model
    after = dict(model.named_parameters())
    assert {n: id(p) for n, p in after.items()} == {n: key for n, (key, _) in before.items()}
    name = "bert.encoder.layer.0.output.dense"
    assert torch.equal(after[f"{name}.weight"], weights[f"{name}.parametrizations.weight.original"])


def test_mixout_keeps_ties_and_takes_conv1d() -> None:
    model = gpt2()
    names = apply_mixout(model, 0.5)
    assert len(names) == 3 * 4 + 1 and "lm_head" in names
    assert model.lm_head.parametrizations.weight.original is model.transformer.wte.weight
    assert model.transformer.h[0].attn.c_attn.parametrizations.weight[0].input_dim == 0
    remove_mixout(model)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_mixout_errors() -> None:
    model = mlp(2)
    with pytest.raises(ValueError, match=r"apply_mixout: p is 1\.0; expected 0 <= p < 1"):
        apply_mixout(model, 1.0)
    with pytest.raises(TypeError, match="layers is '0'; expected a sequence of patterns"):
        apply_mixout(model, 0.5, layers="0")
    with pytest.raises(ValueError, match=r"no linear layer matches layers = \['x'\]"):
        apply_mixout(model, 0.5, layers=["x"])
    with pytest.raises(ValueError, match=r"start\['1\.weight'\] is missing; expected shape \(4, 4\)"):
        apply_mixout(model, 0.5, start={"0.weight": torch.zeros(4, 4)})
    assert not hasattr(model[0], "parametrizations")
    apply_mixout(model, 0.5, layers=["1"])
    with pytest.raises(ValueError, match="1 has a parametrized weight already"):
        apply_mixout(model, 0.5)
    assert not hasattr(model[0], "parametrizations")
    with pytest.raises(ValueError, match=r"input_dim is 2; expected a dimension of start, which has shape \(4, 4\)"):
        Mixout(torch.zeros(4, 4), 0.5, 2)


# ---- penalties.py: agreement -----------------------------------------------------------------------------------------


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) by row, from logits."""
    return nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def test_symmetric_kl() -> None:
    p, q = torch.randn(2, 3, 4, 7, dtype=torch.float64).unbind(0)
    rows = kl(p, q) + kl(q, p)
    torch.testing.assert_close(symmetric_kl(p, q), rows.mean())
    mask = torch.rand(3, 4) < 0.5
    torch.testing.assert_close(symmetric_kl(p, q, mask), rows[mask].mean())
    assert symmetric_kl(p, q, torch.zeros(3, 4, dtype=torch.bool)) == 0
    assert symmetric_kl(p, p + 5) == pytest.approx(0, abs=1e-12)
    p.requires_grad_(True)
    q.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda a, b: 1.3 * symmetric_kl(a, b, mask), (p, q))
    low = symmetric_kl(p.bfloat16(), q.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, symmetric_kl(p.bfloat16().float(), q.bfloat16().float()))
    with pytest.raises(ValueError, match=r"logits_p and logits_q have shapes \(3, 4, 7\) and \(4, 7\)"):
        symmetric_kl(p, q[0])
    with pytest.raises(ValueError, match=r"mask has shape \(4,\); expected \(3, 4\)"):
        symmetric_kl(p, q, mask[0])


def test_r_drop_is_half_the_papers_loss() -> None:
    a, b = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True).unbind(0)
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    rows = torch.arange(6)
    nll = -a.log_softmax(-1)[rows, y] - b.log_softmax(-1)[rows, y]
    paper = (nll + 0.8 * 0.5 * (kl(a, b) + kl(b, a))).mean()
    torch.testing.assert_close(r_drop_loss(a, b, y, 0.8), paper / 2)
    torch.testing.assert_close(r_drop_loss(a, a, y, 3.0), nn.functional.cross_entropy(a, y))
    y[[1, 4]] = -100
    keep = y != -100
    torch.testing.assert_close(r_drop_loss(a, b, y, 0.8), r_drop_loss(a[keep], b[keep], y[keep], 0.8))
    seq = r_drop_loss(a.view(2, 3, 5), b.view(2, 3, 5), y.view(2, 3), 0.8)
    torch.testing.assert_close(seq, r_drop_loss(a, b, y, 0.8))
    with pytest.raises(ValueError, match=r"expected \[\.\.\., C\], \[\.\.\., C\] and \[\.\.\.\]"):
        r_drop_loss(a, b, y[:2])
    with pytest.raises(ValueError, match="r_drop_loss: alpha is -1; expected a finite number >= 0"):
        r_drop_loss(a, b, y, -1)


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_r3f(noise: Any) -> None:
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x, eps = torch.randn(50, 4, dtype=torch.float64), 0.2
    seen: list[Tensor] = []

    def forward(e: Tensor) -> Tensor:
        seen.append(e - x)
        return (e @ weight).tanh()

    logits = forward(x)
    value = r3f_penalty(forward, x, logits, eps=eps, noise=noise, generator=torch.Generator().manual_seed(1))
    z = seen[1]
    moved = ((x + z) @ weight).tanh()
    expected = (kl(logits, moved) + kl(moved, logits)).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, weight, retain_graph=True), torch.autograd.grad(expected, weight)
    )
    law = stats.norm(0, eps) if noise == "normal" else stats.uniform(-eps, 2 * eps)
    assert stats.kstest(z.numpy().ravel(), law.cdf).pvalue > 0.01
    repeated = r3f_penalty(forward, x, forward(x), eps=eps, noise=noise, generator=torch.Generator().manual_seed(1))
    assert torch.equal(repeated, value)
    with pytest.raises(ValueError, match="noise is 'cauchy'; expected 'normal' or 'uniform'"):
        r3f_penalty(forward, x, x, noise="cauchy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="r3f_penalty: eps is 0; expected a finite number > 0"):
        r3f_penalty(forward, x, x, eps=0)


def test_r3f_on_a_transformer() -> None:
    model = bert(1).eval()
    ids = torch.randint(40, (3, 5))
    embeddings = model.get_input_embeddings()(ids)

    def forward(e: Tensor) -> Tensor:
        return model(inputs_embeds=e).logits

    small, large = (r3f_penalty(forward, embeddings, forward(embeddings), eps=eps, generator=torch.Generator().manual_seed(0)) for eps in (1e-3, 1e-2))  # noqa: E501  # fmt: skip
    assert 0 < small < large
    large.backward()
    assert model.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_smart_step_in_closed_form() -> None:
    # f(x) = x w, squared error: the gradient in delta is a positive multiple of sign(delta w) w, for each sample
    w, x = torch.tensor([[2.0], [-1.0], [0.5]], dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    start = torch.empty_like(x).normal_(0, 1e-2, generator=torch.Generator().manual_seed(2))
    direction = torch.sign(start @ w) * w.T / 2.0
    seen: list[Tensor] = []

    def forward(e: Tensor) -> Tensor:
        seen.append(e.detach() - x)
        return e @ w

    for eps in (1.0, 0.04):  # free, and at the boundary
        seen.clear()
        value = smart_penalty(
            forward, x, x @ w, eps=eps, step_size=0.05, noise_std=1e-2, divergence=nn.functional.mse_loss,
            generator=torch.Generator().manual_seed(2),
        )  # fmt: skip
        delta = (start + 0.05 * direction).clamp(-eps, eps)
        torch.testing.assert_close(seen[-1], delta)
        torch.testing.assert_close(value, (delta @ w).square().mean())


def test_smart_is_worse_than_noise() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    noise = r3f_penalty(model, x, model(x), eps=1e-2, generator=draws[0])
    worst = smart_penalty(model, x, model(x), eps=1e-2, step_size=1e-2, steps=3, noise_std=1e-3, generator=draws[1])
    assert worst > 2 * noise
    model.zero_grad()
    worst.backward()
    assert model[0].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="smart_penalty: steps is 0; expected >= 1"):
        smart_penalty(model, x, model(x), steps=0)
    with pytest.raises(ValueError, match="step_size is -1; expected a finite number > 0"):
        smart_penalty(model, x, model(x), step_size=-1)


# ---- penalties.py: SAM -----------------------------------------------------------------------------------------------


def test_sam_gradient_on_a_quadratic() -> None:
    a = torch.diag(torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64))
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    v = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    w0, v0, rho, lr = w.detach().clone(), v.detach().clone(), 0.3, 0.1
    sam = SAM(torch.optim.SGD([{"params": [w]}, {"params": [v]}], lr=lr), rho)

    def closure() -> Tensor:
        loss = 0.5 * w @ a @ w + 2 * v.square().sum()
        loss.backward()
        return loss

    loss = sam.step(closure)
    assert loss.item() == pytest.approx(0.5 * (1 + 20 + 1.8) + 0.5)
    norm = math.sqrt(float((a @ w0).square().sum() + (4 * v0).square().sum()))  # over all groups together
    torch.testing.assert_close(w.detach(), w0 - lr * (a @ (w0 + rho * a @ w0 / norm)))
    torch.testing.assert_close(v.detach(), v0 - lr * 4 * (v0 + rho * 4 * v0 / norm))


def test_sam_restores_exactly_and_stands_still_at_a_minimum() -> None:
    model = mlp(2)
    before = [p.detach().clone() for p in model.parameters()]
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.7)
    with pytest.raises(RuntimeError, match=r"SAM\.perturbed: no parameter has a gradient; call backward first"):  # noqa: SIM117
        with sam.perturbed():
            pass
    model(torch.ones(2, 4)).square().sum().backward()
    with pytest.raises(KeyError), sam.perturbed():
        distance = torch.stack([(p - b).norm() for p, b in zip(model.parameters(), before, strict=True)]).norm()
        assert distance.item() == pytest.approx(0.7, rel=1e-5)
        raise KeyError
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    w = nn.Parameter(torch.zeros(3))
    still = SAM(torch.optim.SGD([w], lr=1.0))

    def closure() -> Tensor:
        loss = w.square().sum()
        loss.backward()
        return loss

    still.step(closure)
    assert torch.equal(w.detach(), torch.zeros(3))
    with pytest.raises(ValueError, match="SAM: rho is 0; expected a finite number > 0"):
        SAM(torch.optim.SGD([w], lr=1.0), 0)


# ---- averaging.py ----------------------------------------------------------------------------------------------------


def train_step(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p.float()).to(p.dtype) * 0.1)
    model.train()
    model(torch.randn(4, 1, 12, 12))  # moves the statistics of batch norm


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_equal_torchs(kind: str, buffers: Any) -> None:
    model = cnn()
    if kind == "ema":
        ours: EMA | SWA = EMA(model, 0.9, buffers=buffers)
        function = swa_utils.get_ema_multi_avg_fn(0.9)
    else:
        ours, function = SWA(model, buffers=buffers), swa_utils.get_swa_avg_fn()  # the multi one fails on integers
    how = {"multi_avg_fn" if kind == "ema" else "avg_fn": function}
    theirs = swa_utils.AveragedModel(model, use_buffers=buffers == "average", **how)
    if kind == "ema":
        theirs.update_parameters(model)  # its first update is a copy: our start
    for _ in range(5):
        train_step(model)
        ours.update()
        theirs.update_parameters(model)
    for name, p in theirs.module.named_parameters():
        torch.testing.assert_close(ours.parameters[name], p.detach(), rtol=1e-6, atol=1e-7)
    for name, b in theirs.module.named_buffers():
        if b.is_floating_point():  # torch averages num_batches_tracked too, and rounds it
            torch.testing.assert_close(ours.buffers[name], b, rtol=1e-6, atol=1e-7)
    assert ours.num_updates == 5 and ours.buffers["1.num_batches_tracked"] == model[1].num_batches_tracked


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("correction", [False, True])
def test_ema_closed_form(warmup: bool, correction: bool) -> None:
    w = nn.Parameter(torch.tensor([7.0], dtype=torch.float64))
    ema = EMA(nn.ParameterList([w]), 0.7, warmup=warmup, bias_correction=correction)
    decays = [min(0.7, (1 + n) / (10 + n)) if warmup else 0.7 for n in range(25)]
    assert not warmup or (decays[0] == 0.1 and decays[-1] == 0.7)
    values = np.random.default_rng(0).normal(size=25)
    for value in values:
        w.data.fill_(value)
        ema.update()
    tail = np.cumprod([1.0, *decays[:0:-1]])[::-1]  # the product of the decays after each update
    shares = (1 - np.array(decays)) * tail
    start = math.prod(decays)
    want = (shares @ values) / shares.sum() if correction else shares @ values + start * 7
    assert shares.sum() + start == pytest.approx(1)
    assert ema.parameters["0"].item() == pytest.approx(want, rel=1e-12)


def test_ema_of_bfloat16_weights_does_not_stall() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    ema = EMA(model, 0.999)
    model.weight.data.fill_(2.0)
    for _ in range(1000):
        ema.update()
    assert ema.parameters["weight"].dtype == torch.float32
    assert ema.parameters["weight"].item() == pytest.approx(2 - 0.999**1000, rel=1e-4)
    narrow = EMA(model, 0.999, dtype=torch.float64)
    assert narrow.parameters["weight"].dtype == torch.float64
    with ema.swap():
        assert model.weight.dtype == torch.bfloat16 and model.weight.item() == pytest.approx(1.632, rel=2**-8)


def test_swap_gives_the_average_and_takes_it_back() -> None:
    model = cnn()
    ema = EMA(model, 0.5)
    for _ in range(3):
        train_step(model)
        ema.update()
    own = {name: t.clone() for name, t in model.state_dict().items()}
    objects = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(KeyError), ema.swap() as inside:
        assert inside is model
        assert all(torch.equal(p, ema.parameters[name]) for name, p in model.named_parameters())
        assert not torch.equal(model[0].weight, own["0.weight"])
        with pytest.raises(RuntimeError, match=r"EMA\.update: the model holds the average; leave swap\(\) first"):
            ema.update()
        with pytest.raises(RuntimeError, match="holds the average already"), ema.swap():
            pass
        model.train()(torch.randn(4, 1, 12, 12))
        raise KeyError
    assert all(torch.equal(t, own[name]) for name, t in model.state_dict().items())
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    other = cnn()
    ema.copy_to(other)
    assert torch.equal(other[0].weight, ema.parameters["0.weight"])
    ema.update()


def test_update_bn_of_the_average() -> None:
    model = cnn()
    swa = SWA(model)
    for _ in range(3):
        train_step(model)
        swa.update()
    data = [torch.randn(8, 1, 12, 12) for _ in range(3)]
    oracle = cnn()
    swa.copy_to(oracle)
    swa_utils.update_bn(data, oracle)
    own = {name: t.clone() for name, t in model.state_dict().items()}
    swa.update_bn(data)
    assert all(torch.equal(t, own[name]) for name, t in model.state_dict().items())
    for name, b in oracle.named_buffers():
        torch.testing.assert_close(swa.buffers[name], b)
    assert not torch.allclose(swa.buffers["1.running_mean"], own["1.running_mean"], atol=1e-4)


def test_average_goes_on_from_a_state() -> None:
    model = cnn()
    first = EMA(model, 0.9, warmup=True, bias_correction=True)
    for _ in range(3):
        train_step(model)
        first.update()
    state = copy.deepcopy(first.state_dict())
    second = EMA(model, 0.9, warmup=True, bias_correction=True)
    second.load_state_dict(state)
    for _ in range(2):
        train_step(model)
        first.update()
        second.update()
    assert first.num_updates == second.num_updates == 5
    assert all(torch.equal(t, second.parameters[name]) for name, t in first.parameters.items())
    before = second.parameters["0.weight"].clone()
    wrong = {**state, "parameters": {**state["parameters"], "9.bias": torch.zeros(4)}}
    with pytest.raises(ValueError, match=r"EMA\.load_state_dict: 9\.bias has shape \(4,\); expected \(3,\)"):
        second.load_state_dict(wrong)
    del wrong["parameters"]["9.bias"]
    with pytest.raises(ValueError, match=r"9\.bias is in the parameters of the state or of the model, not both"):
        second.load_state_dict(wrong)
    assert torch.equal(second.parameters["0.weight"], before)


def test_average_errors() -> None:
    model = mlp(2)
    with pytest.raises(ValueError, match=r"EMA: decay is 1\.0; expected 0 <= decay < 1"):
        EMA(model, 1.0)
    with pytest.raises(ValueError, match="SWA: buffers is 'keep'; expected 'copy' or 'average'"):
        SWA(model, buffers="keep")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"SWA: model is a list; expected a torch\.nn\.Module"):
        SWA([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"SWA: dtype is torch\.int64; expected a floating-point dtype"):
        SWA(model, dtype=torch.int64)
    swa = SWA(model)
    apply_mixout(model, 0.1, layers=["0"])
    with pytest.raises(RuntimeError, match=r"SWA\.update: 0\.\S+ is not in the model as it was"):
        swa.update()
    remove_mixout(model)
    swa.update()


# ---- masking.py ------------------------------------------------------------------------------------------------------

CLS, SEP, MASK, PAD, VOCAB = 1, 2, 3, 0, 1000
TOKENS: dict[str, Any] = {"mask_token_id": MASK, "vocab_size": VOCAB, "special_token_ids": [CLS, SEP, PAD]}


def corpus(rows: int, length: int, seed: int = 0) -> Tensor:
    ids = torch.randint(10, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -1] = CLS, SEP
    return ids


def within(count: int | Tensor, n: int | Tensor, p: float) -> bool:
    """Whether a count is inside the central 99.99 % of Binomial(n, p)."""
    low, high = stats.binom.interval(0.9999, int(n), p)
    return bool(low <= int(count) <= high)


def fates(ids: Tensor, masked: Tensor, labels: Tensor) -> tuple[int, int, int, int]:
    """How many tokens may be masked, are chosen, became the mask, became another token."""
    chosen = labels != -100
    mask = chosen & (masked == MASK)
    return (
        int((~torch.isin(ids, torch.tensor([CLS, SEP, PAD]))).sum()),
        int(chosen.sum()),
        int(mask.sum()),
        int((chosen & ~mask & (masked != ids)).sum()),
    )


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_mask_tokens_frequencies_equal_those_of_transformers(rate: float) -> None:
    ids = corpus(300, 100)
    ours = mask_tokens(ids, **TOKENS, mask_rate=rate, generator=torch.Generator().manual_seed(1))

    class Tokenizer:  # the part of a tokenizer that the collator's masking uses
        mask_token, mask_token_id, pad_token_id, vocab_size = "[MASK]", MASK, PAD, VOCAB

        def __len__(self) -> int:
            return VOCAB

        def convert_tokens_to_ids(self, token: str) -> int:
            return MASK

        def get_special_tokens_mask(self, row: list[int], already_has_special_tokens: bool) -> list[int]:
            return [int(t in (CLS, SEP, PAD)) for t in row]

    collator = transformers.DataCollatorForLanguageModeling(Tokenizer(), mlm_probability=rate, seed=1)
    special = torch.isin(ids, torch.tensor([CLS, SEP, PAD]))
    collator.generator = torch.Generator().manual_seed(1)
    theirs = collator.torch_mask_tokens(ids.clone(), special_tokens_mask=special)
    for masked, labels in (ours, theirs):
        n, chosen, mask, other = fates(ids, masked, labels)
        assert within(chosen, n, rate) and within(mask, chosen, 0.8)
        assert within(other, chosen, 0.1 * (1 - 2 / VOCAB))  # a random token is the old one or the mask now and then
    shares = mask_tokens(ids, **TOKENS, mask_rate=rate, replacement=(0.5, 0.4, 0.1))
    _, chosen, mask, other = fates(ids, *shares)
    assert within(mask, chosen, 0.5 + 0.4 / VOCAB) and within(other, chosen, 0.4 * (1 - 2 / VOCAB))
    replaced = ours.input_ids[(ours.labels != -100) & (ours.input_ids != MASK) & (ours.input_ids != ids)]
    assert stats.kstest(replaced.numpy(), stats.randint(0, VOCAB).cdf).pvalue > 1e-3  # over the whole vocabulary


@given(
    rows=st.integers(0, 4), length=st.integers(0, 30), rate=st.floats(0, 1), seed=st.integers(0, 99),
    words=st.booleans(), spans=st.booleans(),
)  # fmt: skip
def test_masking_invariants(rows: int, length: int, rate: float, seed: int, words: bool, spans: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (rows, length), generator=generator)
    maskable = torch.rand(rows, length, generator=generator) < 0.8
    word_ids = torch.randint(-1, 3, (rows, length), generator=generator) if words else None
    before = ids.clone()

    def run() -> Any:
        function = mask_spans if spans else mask_tokens
        return function(
            ids, **TOKENS, mask_rate=rate, maskable=maskable, word_ids=word_ids,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    out = run()
    assert torch.equal(ids, before)
    chosen = out.labels != -100
    allowed = maskable & ~torch.isin(ids, torch.tensor([CLS, SEP, PAD]))
    assert not (chosen & ~allowed).any()
    assert torch.equal(out.input_ids[~chosen], ids[~chosen]) and torch.equal(out.labels[chosen], ids[chosen])
    assert all(torch.equal(a, b) for a, b in zip(out, run(), strict=True))
    if rate == 0:
        assert not chosen.any()
    for r in range(rows):
        start = 0
        free = 0
        while start < length:  # words are taken whole
            end = start + 1
            while word_ids is not None and end < length and word_ids[r, end] == word_ids[r, start]:
                end += 1
            usable = bool(allowed[r, start:end].all()) and (word_ids is None or bool(word_ids[r, start] >= 0))
            free += (end - start) * usable
            assert chosen[r, start:end].all() or not chosen[r, start:end].any()
            assert usable or not chosen[r, start:end].any()
            start = end
        if spans:
            number = int(chosen[r].sum())
            budget = max(1, round(rate * free)) if free and rate else 0
            assert number >= budget if words else number == budget
            assert torch.equal(out.span_ids[r] >= 0, chosen[r])
            for span in range(int(out.span_ids[r].max()) + 1 if length else 0):
                where = (out.span_ids[r] == span).nonzero()[:, 0]
                assert len(where) and int(where[-1] - where[0]) == len(where) - 1  # contiguous
        if not spans and rate == 1:
            assert int(chosen[r].sum()) == free


def test_whole_words_are_chosen_at_the_rate() -> None:
    ids = torch.randint(10, VOCAB, (200, 60))
    word_ids = (torch.arange(60) // 3).expand(200, 60)
    out = mask_tokens(ids, **TOKENS, word_ids=word_ids, generator=torch.Generator().manual_seed(0))
    by_word = (out.labels != -100).view(200, 20, 3)
    assert torch.equal(by_word.all(-1), by_word.any(-1)) and within(by_word.all(-1).sum(), 4000, 0.15)
    chosen = by_word.sum()
    assert within(((out.labels != -100) & (out.input_ids == MASK)).sum(), chosen, 0.8)  # by token


def test_mask_spans_lengths() -> None:
    ids = torch.randint(10, VOCAB, (2000, 100), generator=torch.Generator().manual_seed(0))
    out = mask_spans(ids, **TOKENS, generator=torch.Generator().manual_seed(1))
    assert ((out.labels != -100).sum(1) == 15).all()
    first = out.span_ids == 0  # no earlier span can cut it, and the budget is longer than any
    start = first.long().argmax(1)
    lengths = first.sum(1)[start <= 90]  # nor the end of the row
    expected = 0.8 ** np.arange(10)
    expected /= expected.sum()
    assert expected @ np.arange(1, 11) == pytest.approx(3.797, abs=1e-3)  # the paper: 3.8
    counts = np.bincount(lengths.numpy(), minlength=11)
    assert counts[0] == 0 and len(counts) == 11
    assert stats.chisquare(counts[1:], expected * len(lengths)).pvalue > 1e-3
    assert stats.chisquare(np.bincount(start.numpy())[:91]).pvalue > 1e-3  # uniform


def test_mask_spans_replaces_whole_spans() -> None:
    ids = torch.randint(10, VOCAB, (150, 400), generator=torch.Generator().manual_seed(0))
    out = mask_spans(ids, **TOKENS, generator=torch.Generator().manual_seed(1))
    fate: Counter[str] = Counter()
    for r in range(150):
        for span in range(int(out.span_ids[r].max()) + 1):
            where = out.span_ids[r] == span
            masked, kept = (out.input_ids[r, where] == MASK).all(), (out.input_ids[r, where] == ids[r, where]).all()
            fate["mask" if masked else "kept" if kept else "random"] += 1
            assert kept or masked or (out.input_ids[r, where] == MASK).sum() <= 1  # by chance, 1 in 1000
    total = sum(fate.values())
    assert total > 2000 and within(fate["mask"], total, 0.8)
    assert within(fate["random"], total, 0.1) and within(fate["kept"], total, 0.1)


@given(
    length=st.integers(2, 200), density=st.floats(0.01, 0.99), mean=st.floats(1, 8), seed=st.integers(0, 99),
    eos=st.booleans(),
)  # fmt: skip
def test_span_corruption_can_be_undone(length: int, density: float, mean: float, seed: int, eos: bool) -> None:
    ids = torch.arange(length)
    sentinels = list(range(5000, 4700, -1))
    inputs, labels = span_corruption(
        ids, sentinels, noise_density=density, mean_span_length=mean, eos_token_id=7777 if eos else None,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    if eos:
        assert inputs[-1] == labels[-1] == 7777
        inputs, labels = inputs[:-1], labels[:-1]
    noise = min(max(round(density * length), 1), length - 1)
    spans = int((inputs > 4000).sum())
    assert spans == min(max(round(noise / mean), 1), length - noise)
    assert len(inputs) == length - noise + spans and len(labels) == noise + spans
    assert inputs[inputs > 4000].tolist() == labels[labels > 4000].tolist() == sentinels[:spans]
    content: dict[int, list[int]] = {}
    for token in labels.tolist():
        if token > 4000:
            content[token] = []
            current = content[token]
        else:
            current.append(token)
    assert all(content.values())
    assert [t for token in inputs.tolist() for t in content.get(token, [token])] == ids.tolist()
    assert inputs[0] == 0 and inputs[-1] > 4000  # begins with text, ends with noise


def test_span_corruption_cuts_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    seen: Counter[tuple[int, ...]] = Counter()
    for _ in range(1200):  # 8 tokens, 4 of them noise in 2 spans: 3 * 3 ways
        labels = span_corruption(torch.arange(8), [90, 91], noise_density=0.5, mean_span_length=2, generator=generator)[
            1
        ]
        seen[tuple(labels.tolist())] += 1
    assert len(seen) == 9 and stats.chisquare(list(seen.values())).pvalue > 1e-3


def test_collator() -> None:
    examples = [corpus(1, n)[0] for n in (5, 9, 12)]
    collate = MLMCollator(
        **TOKENS, pad_token_id=PAD, mask_rate=linear_mask_rate(1.0, 0.2, 4), pad_to_multiple_of=8,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    batch = collate(examples)
    assert batch["input_ids"].shape == (3, 16) and batch["attention_mask"].sum(1).tolist() == [5, 9, 12]
    assert ((batch["labels"] != -100).sum(1) == torch.tensor([3, 7, 10])).all()  # at a rate of 1: all but [CLS], [SEP]
    restored = torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])
    for i, example in enumerate(examples):
        assert torch.equal(restored[i, : len(example)], example) and (restored[i, len(example) :] == PAD).all()
    many = [corpus(1, 102)[0]] * 50
    collate.step = 4
    rate = (collate(many)["labels"] != -100).sum()
    assert within(rate, 5000, 0.2) and collate.step == 5
    first, second = collate(many)["labels"], collate(many)["labels"]
    assert not torch.equal(first, second)  # drawn anew: dynamic masking

    spans = MLMCollator(**TOKENS, pad_token_id=PAD, masking="span")
    batch = spans([{"input_ids": [1, 50, 51, 52, 2], "word_ids": [None, 0, 0, 1, None]}, {"input_ids": [1, 2], "word_ids": [None, None]}])  # noqa: E501  # fmt: skip
    chosen = (batch["labels"] != -100)[0].tolist()
    assert chosen in ([False, True, True, False, False], [False, False, False, True, False])
    assert batch["span_ids"].shape == (2, 5) and not (batch["labels"][1] != -100).any()
    assert pickle.loads(pickle.dumps(spans)).masking == "span"
    assert [linear_mask_rate(0.3, 0.1, 2)(t) for t in (0, 1, 2, 9)] == pytest.approx([0.3, 0.2, 0.1, 0.1])


def test_masking_errors() -> None:
    ids = corpus(2, 6)
    with pytest.raises(TypeError, match="mask_tokens: input_ids has dtype int32; expected int64"):
        mask_tokens(ids.int(), **TOKENS)
    with pytest.raises(ValueError, match="mask_rate is 2; expected 0 <= mask_rate <= 1"):
        mask_tokens(ids, **TOKENS, mask_rate=2)
    with pytest.raises(ValueError, match=r"replacement is \(0\.8, 0\.1, 0\.2\); expected three shares"):
        mask_tokens(ids, **TOKENS, replacement=(0.8, 0.1, 0.2))
    with pytest.raises(ValueError, match="mask_token_id is 9; expected 0 to vocab_size - 1 = 4"):
        mask_tokens(ids, mask_token_id=9, vocab_size=5)
    with pytest.raises(ValueError, match=r"maskable has shape \(2,\); expected \(2, 6\)"):
        mask_tokens(ids, **TOKENS, maskable=torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="maskable has dtype int64; expected bool"):
        mask_tokens(ids, **TOKENS, maskable=torch.ones_like(ids))
    with pytest.raises(ValueError, match=r"mask_spans: word_ids has shape \(6,\); expected \(2, 6\)"):
        mask_spans(ids, **TOKENS, word_ids=torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="p is 1; expected 0 < p < 1"):
        mask_spans(ids, **TOKENS, p=1)
    with pytest.raises(ValueError, match="max_span_length is 0; expected >= 1"):
        mask_spans(ids, **TOKENS, max_span_length=0)
    with pytest.raises(ValueError, match="sentinel_ids has 1 entries; expected 3, one for each span"):
        span_corruption(torch.arange(20), [9], noise_density=0.5)
    with pytest.raises(ValueError, match=r"input_ids has shape \(1,\); expected \[T\] with T >= 2"):
        span_corruption(torch.arange(1), [9])
    with pytest.raises(ValueError, match="noise_density is 1; expected 0 < noise_density < 1"):
        span_corruption(torch.arange(5), [9], noise_density=1)
    with pytest.raises(ValueError, match="mean_span_length is 0; expected a finite number >= 1"):
        span_corruption(torch.arange(5), [9], mean_span_length=0)
    with pytest.raises(ValueError, match="linear_mask_rate: end is 2; expected 0 <= end <= 1"):
        linear_mask_rate(0.1, 2, 5)
    with pytest.raises(ValueError, match="num_steps is 0; expected >= 1"):
        linear_mask_rate(0.1, 0.2, 0)
    with pytest.raises(ValueError, match="masking is 'word'; expected 'token' or 'span'"):
        MLMCollator(**TOKENS, pad_token_id=0, masking="word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pad_to_multiple_of is 0; expected >= 1"):
        MLMCollator(**TOKENS, pad_token_id=0, pad_to_multiple_of=0)
    collate = MLMCollator(**TOKENS, pad_token_id=0)
    with pytest.raises(ValueError, match="examples is empty; expected at least one"):
        collate([])
    with pytest.raises(ValueError, match="an example has 1 word_ids and 2 input_ids; expected as many"):
        collate([{"input_ids": [5, 6], "word_ids": [0]}])
    with pytest.raises(ValueError, match=r"an example has shape \(2, 6\); expected \[T\]"):
        collate([ids])


# ---- loop.py ---------------------------------------------------------------------------------------------------------


def test_accumulated_gradient_is_that_of_the_full_batch() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7)).double()
    x, labels = torch.randn(9, 4, 5, dtype=torch.float64), torch.randint(7, (9, 4))
    labels[torch.rand(9, 4) < 0.4] = -100
    labels[3:5] = -100  # a micro-batch without targets

    def loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    full = loss_fn((x, labels))
    expected = torch.autograd.grad(full, list(model.parameters()))
    cuts = [(0, 1), (1, 3), (3, 5), (5, 9)]
    micro = [(x[a:b], labels[a:b]) for a, b in cuts]
    loss = accumulate_gradients(micro, loss_fn, lambda batch: (batch[1] != -100).sum())
    torch.testing.assert_close(loss, full.detach())
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(grads, list(expected))
    clipped = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # as in the documented loop
    torch.testing.assert_close(clipped, torch.stack([g.norm() for g in expected]).norm())

    model.zero_grad()  # the plain mean, which this is not
    kept = [batch for batch in micro if (batch[1] != -100).any()]
    for batch in kept:
        (loss_fn(batch) / len(kept)).backward()
    assert not torch.allclose(model[0].weight.grad, expected[0], rtol=1e-3)


def test_accumulation_with_scaler_and_autocast() -> None:
    model = nn.Linear(4, 2)
    x = torch.randn(6, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def loss_fn(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch).float().square().mean()

    loss = accumulate_gradients([x[:1], x[1:]], loss_fn, len, scaler=scaler)
    scaled = model.weight.grad.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.unscale_(optimizer)
    torch.testing.assert_close(model.weight.grad, scaled / 8)
    reference = torch.autograd.grad(model(x).square().mean(), model.weight)[0]
    torch.testing.assert_close(model.weight.grad, reference, rtol=0.05, atol=0.02)
    assert loss.item() == pytest.approx(model(x).square().mean().item(), rel=0.05)
    before = model.weight.detach().clone()
    scaler.step(optimizer)
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * scaled / 8)


def test_accumulation_errors() -> None:
    with pytest.raises(TypeError, match="micro_batches is a list_iterator; expected a sequence"):
        accumulate_gradients(iter([1]), lambda b: torch.ones(()), lambda b: 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the 2 micro_batches have no targets; expected at least one"):
        accumulate_gradients([1, 2], lambda b: torch.ones(()), lambda b: 0)
    with pytest.raises(ValueError, match=r"count_fn returned -1\.0; expected >= 0"):
        accumulate_gradients([1], lambda b: torch.ones(()), lambda b: -1)


@given(values=st.lists(st.floats(-5, 5) | st.just(math.nan), max_size=12), patience=st.integers(1, 4),
       min_delta=st.sampled_from([0.0, 0.5]), mode=st.sampled_from(["min", "max"]))  # fmt: skip
@settings(max_examples=100)
def test_early_stopping_by_definition(values: list[float], patience: int, min_delta: float, mode: Any) -> None:
    stopping = EarlyStopping(patience, min_delta, mode)
    sign = 1 if mode == "min" else -1
    best, best_step, since = math.inf, None, 0
    for step, value in enumerate(values):
        if sign * value < best - min_delta:
            best, best_step, since = sign * value, step, 0
        else:
            since += 1
        assert stopping.step(value) == (since >= patience) == stopping.stopped
        assert stopping.best_step == best_step and stopping.bad_steps == since
    assert stopping.best is None if best_step is None else stopping.best == sign * best


def test_early_stopping_restores_the_best_weights() -> None:
    model = cnn()
    stopping = EarlyStopping(2, mode="max", model=model, device="cpu")
    with pytest.raises(RuntimeError, match="there are no best weights yet"):
        stopping.restore()
    kept: dict[str, Tensor] = {}
    for value in (0.3, 0.6, 0.5):
        train_step(model)
        assert not stopping.step(torch.tensor(value))
        if value == 0.6:
            kept = copy.deepcopy(model.state_dict())
    resumed = EarlyStopping(2, mode="max", model=model)
    resumed.load_state_dict(copy.deepcopy(stopping.state_dict()))
    assert resumed.step(0.6) and resumed.best == pytest.approx(0.6) and resumed.best_step == 1
    resumed.restore()
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())


def test_early_stopping_errors() -> None:
    with pytest.raises(ValueError, match="patience is 0; expected >= 1"):
        EarlyStopping(0)
    with pytest.raises(ValueError, match="min_delta is -1; expected a finite number >= 0"):
        EarlyStopping(min_delta=-1)
    with pytest.raises(ValueError, match="mode is 'best'; expected 'min' or 'max'"):
        EarlyStopping(mode="best")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="there is no model; give one when making it"):
        EarlyStopping().restore()
