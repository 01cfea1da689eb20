"""LoRA in models: what is matched, trained, merged, initialized, saved and combined, against PEFT and closed forms."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tlkernels import ops
from tlkernels.methods.peft import init
from tlkernels.methods.peft._tuner import TunerConfig
from tlkernels.methods.peft.apply import applied, apply, merge, remove, trainable_parameters, unmerge
from tlkernels.methods.peft.checkpoint import (
    Adapter,
    at_most_full_rank,
    get_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
    write_adapter,
)
from tlkernels.methods.peft.lora import LoRAConfig
from tlkernels.methods.peft.merging import merge_adapters
from tlkernels.nn import NF4Linear
from tlkernels.nn.lora import DoRALinear, LoRAConv2d, LoRAEmbedding, LoRALinear, TunerModule

os.environ.setdefault("HF_HUB_OFFLINE", "1")
peft = pytest.importorskip("peft")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(16, 24), nn.Linear(16, 24, bias=False)
        self.norm, self.out = nn.LayerNorm(24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.norm(self.q(x) * torch.sigmoid(self.v(x))))


class Net(nn.Module):
    """An embedding, two blocks with names like a transformer's, a convolution over the sequence, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16, padding_idx=0)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.head = nn.Linear(48, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.conv(x[:, None]).transpose(1, 2).flatten(2))


IDS = torch.tensor([[1, 5, 0, 29], [7, 7, 2, 3]])
TARGETS = ["q", "v", "embed", "conv"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def train(model: nn.Module, steps: int = 3) -> Any:
    """Some steps, so that everything that is trainable has moved."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    goal = torch.randn(2, 4, 5)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(IDS), goal).backward()
        optimizer.step()
    return model.eval()


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All that a failed call must leave as it was."""
    return (
        {name: id(module) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        {name: value.clone() for name, value in model.state_dict().items()},
        sorted(vars(model)),
    )


def unchanged(model: nn.Module, before: tuple[Any, ...]) -> bool:
    now = snapshot(model)
    values = now[2].keys() == before[2].keys() and all(torch.equal(now[2][k], before[2][k]) for k in now[2])
    return values and now[:2] == before[:2] and now[3] == before[3]


def tuned(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, TunerModule)}


# ---- which modules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q", "v"]},
        {"target_modules": ["layers.1.q", "embed"]},
        {"target_modules": r".*\.\d\.(q|out)"},
        {"target_modules": ["q", "out"], "exclude_modules": ["layers.0.q"]},
        {"target_modules": ["q", "out"], "exclude_modules": r".*0\.out"},
        {"target_modules": ["q", "out"], "layers_to_transform": 1},
        {"target_modules": ["q", "out"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["q", "head"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q", "head"], "modules_to_save": ["layers.0"]},
        {"target_modules": "all-linear", "modules_to_save": ["head"]},
    ],
    ids=str,
)
def test_targets_are_pefts(fields: dict[str, Any]) -> None:
    model, other = nn.Sequential(), nn.Sequential()
    model.add_module("body", Net())  # PEFT wants a name before layers.<n>
    other.add_module("body", Net())
    apply(model, LoRAConfig(r=2, **fields))
    peft.get_peft_model(other, peft.LoraConfig(r=2, **fields))
    expected = {n for n, m in other.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert tuned(model) == expected and expected
    assert set(applied(model).targets) == expected


def test_rank_and_alpha_patterns() -> None:
    model = Net()
    config = LoRAConfig(
        r=4, lora_alpha=8, target_modules=["q", "v"], rank_pattern={"v": 2, r"layers\.1\.q": 3},
        alpha_pattern={r"^layers\.0\.q": 16}, use_rslora=True,
    )  # fmt: skip
    apply(model, config)
    found = {name: (m.rank, m.scaling) for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert found == {
        "layers.0.q": (4, 8.0), "layers.0.v": (2, 8 / math.sqrt(2)), "layers.1.q": (3, 8 / math.sqrt(3)),
        "layers.1.v": (2, 8 / math.sqrt(2)),
    }  # fmt: skip
    assert all(config.scaling_of(name) == scaling for name, (_, scaling) in found.items())


def test_only_adapters_are_trained() -> None:
    model = Net()
    before = model(IDS)
    made = apply(model, LoRAConfig(r=3, target_modules=TARGETS, modules_to_save=["head"]))
    assert made.saved == ("head",) and set(made.targets) == tuned(model)
    kinds = (LoRAEmbedding, LoRALinear, LoRAConv2d)
    assert [type(model.get_submodule(n)) for n in ("embed", "layers.0.q", "conv")] == list(kinds)
    assert torch.allclose(model(IDS), before, atol=1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    factors = {f"{n}.{f}" for n in tuned(model) - {"embed"} for f in ("lora_A", "lora_B")}
    assert trained == factors | {"embed.lora_embedding_A", "embed.lora_embedding_B", "head.weight", "head.bias"}
    before_values = {name: p.clone() for name, p in model.named_parameters()}
    train(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before_values[name])}
    assert moved == trained


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_report_and_biases_are_pefts(bias: Any) -> None:
    model, other = Net(), Net()
    fields = {"r": 3, "target_modules": ["q", "conv"], "modules_to_save": ["head"], "bias": bias}
    apply(model, LoRAConfig(**fields))
    theirs = peft.get_peft_model(other, peft.LoraConfig(**fields))
    report = trainable_parameters(model)
    trained, total = theirs.get_nb_trainable_parameters()
    # PEFT keeps the head that is trained whole twice
    assert (report.trainable, report.total) == (trained, total - 48 * 5 - 5)
    assert report.layers == {
        "layers.0.q": 3 * (16 + 24), "layers.1.q": 3 * (16 + 24), "conv": 3 * (1 * 9 + 3),
    }  # fmt: skip
    assert report.trainable_bytes == 4 * report.trainable and report.total_bytes == 4 * report.total
    assert math.isclose(report.percentage, 100 * trained / (total - 245))
    assert f"trainable: {trained:,} of {report.total:,} parameters" in str(report) and "layers.0.q" in str(report)
    ours = {n.replace("base_layer.", "") for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    expected = {
        "none": {"head.bias"},
        "lora_only": {"head.bias", "layers.0.q.bias", "layers.1.q.bias", "conv.bias"},
        "all": {n for n, _ in Net().named_parameters() if n.endswith("bias")},
    }
    assert ours == expected[bias]


def test_report_counts_4_bit_weights() -> None:
    model = nn.Sequential(NF4Linear.from_linear(nn.Linear(64, 32)), nn.Linear(32, 2))
    apply(model, LoRAConfig(r=2, target_modules=["0"]))
    report = trainable_parameters(model)
    assert report.trainable == 2 * (64 + 32) and report.total == 64 * 32 + 32 + 66 + 192
    assert report.total_bytes == 4 * (32 + 66 + 192) + model[0].base_layer.nf4_weight.nbytes  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        (LoRAConfig(target_modules=["q", "norm"]), TypeError, r"layers\.0\.norm is a LayerNorm; expected a linear"),
        (LoRAConfig(r=4, target_modules=["q", "conv"]), ValueError, "conv: LoRAConv2d: rank is 4; expected 1 to .*= 3"),
        (
            LoRAConfig(target_modules=["nothing"]),
            ValueError,
            "target_modules is .*matches no module; the model has emb",
        ),
        (LoRAConfig(target_modules=["q"], modules_to_save=["tail"]), ValueError, "has 'tail', which matches no module"),
        (LoRAConfig(target_modules=["q", "conv"], r=2, use_dora=True), TypeError, "conv is a Conv2d; use_dora is for"),
        (
            LoRAConfig(target_modules=["q", "embed"], lora_bias=True),
            TypeError,
            "embed is a Embedding; lora_bias is not",
        ),
        (LoRAConfig(target_modules=["q", "conv"], r=2, init_lora_weights="pissa"), TypeError, "'pissa' is for linear"),
        (LoRAConfig(target_modules=["q"], init_lora_weights="best"), ValueError, "init_lora_weights is 'best'"),
        (LoRAConfig(r=0), ValueError, "LoRAConfig: r is 0; expected 1 or more"),
        (LoRAConfig(lora_dropout=1.0), ValueError, "lora_dropout is 1.0; expected 0 <= lora_dropout < 1"),
        (LoRAConfig(lora_alpha=math.nan), ValueError, "lora_alpha is nan; expected a finite number"),
        (LoRAConfig(bias="some"), ValueError, "bias is 'some'; expected 'none', 'all' or 'lora_only'"),
        (LoRAConfig(target_modules="(q"), ValueError, r"target_modules is '\(q'; expected a regular expression"),
        (LoRAConfig(target_modules=[]), ValueError, "target_modules is .*expected at least one name"),
        (LoRAConfig(target_modules=3), TypeError, "target_modules is 3; expected names"),  # type: ignore[arg-type]
        (LoRAConfig(modules_to_save="head"), TypeError, "modules_to_save is 'head'; expected a sequence of names"),
        (LoRAConfig(rank_pattern={"q": 0}), ValueError, "rank_pattern is {'q': 0}; expected ranks"),
        (LoRAConfig(rank_pattern={"(q": 2}), ValueError, r"rank_pattern is .*expected regular expressions"),
        (
            LoRAConfig(layers_to_transform=[0]),
            ValueError,
            "layers_to_transform is .*expected None where target_modules",
        ),
        (LoRAConfig(layers_pattern="h"), ValueError, "layers_pattern is 'h'; expected None where layers_to_transform"),
        (LoRAConfig(use_dora=True, lora_bias=True), ValueError, "lora_bias is True; expected False where use_dora"),
        (LoRAConfig(loftq_config={"loftq_bits": 8}), ValueError, "loftq_config is .*expected loftq_bits 4"),
        (LoRAConfig(loftq_config={"bits": 4}), ValueError, r"loftq_config .* \(not \['bits'\]\)"),
        ("lora", TypeError, "config is a str; expected a TunerConfig"),
    ],
)
def test_what_cannot_be_applied_leaves_the_model(config: Any, error: type[Exception], match: str) -> None:
    model = Net()
    model.layers[0].norm.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = snapshot(model)
    with pytest.raises(error, match=match):
        apply(model, config)
    assert unchanged(model, before)


def test_a_second_config_needs_the_first_removed() -> None:
    model = Net()
    apply(model, LoRAConfig(target_modules=["q"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model has adapters already \(layers\.0\.q\)"):
        apply(model, LoRAConfig(target_modules=["v"]))
    assert unchanged(model, before)
    for call in (merge, unmerge, remove, save_adapter):
        with pytest.raises((ValueError, TypeError), match=r"has no adapters|missing 1 required"):
            call(Net())  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="the model itself, a Linear, is to be replaced"):
        apply(nn.Linear(4, 4), LoRAConfig(r=2))
    with pytest.raises(NotImplementedError, match="TunerConfig: wrap"):
        apply(Net(), TunerConfig(target_modules=["q"]))


def test_attention_of_torch_is_left_alone() -> None:
    """Its output projection is never called: an adapter there would do nothing."""
    block = nn.TransformerEncoderLayer(16, 2, 32)
    apply(block, LoRAConfig(r=2))
    assert tuned(block) == {"linear1", "linear2"}
    with pytest.raises(TypeError, match="out_proj: LoRALinear: base_layer is a NonDynamicallyQuantizableLinear"):
        apply(nn.TransformerEncoderLayer(16, 2, 32), LoRAConfig(r=2, target_modules=["out_proj"]))


def test_a_shared_module_gets_one_adapter() -> None:
    model = Net()
    model.layers[1].q = model.layers[0].q  # type: ignore[union-attr]
    apply(model, LoRAConfig(r=2, target_modules=["q"]))
    assert model.layers[1].q is model.layers[0].q and isinstance(model.layers[1].q, LoRALinear)  # type: ignore[union-attr]
    remove(model)
    assert model.layers[1].q is model.layers[0].q and isinstance(model.layers[1].q, nn.Linear)  # type: ignore[union-attr]


# ---- taking them out again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_remove_restores(bias: str) -> None:
    model = Net()
    model.conv.weight.requires_grad_(False)
    before = snapshot(model)
    apply(model, LoRAConfig(r=3, target_modules=TARGETS, modules_to_save=["head", "layers.0.out"], bias=bias))
    train(model)
    assert remove(model) is model
    model.train()
    assert unchanged(model, before)


def test_remove_follows_a_move() -> None:
    model = Net()
    apply(model, LoRAConfig(r=2, target_modules=["q"], modules_to_save=["head"]))
    model.double()
    remove(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64} and model(IDS).dtype == torch.float64


@pytest.mark.parametrize("use_dora", [False, True])
def test_remove_with_merge_leaves_a_plain_model(use_dora: bool) -> None:
    model = Net()
    targets = ["q", "v"] if use_dora else TARGETS
    apply(model, LoRAConfig(r=3, target_modules=targets, modules_to_save=["head"], use_dora=use_dora))
    out = train(model)(IDS)
    base = Net()(IDS)
    remove(model, merge=True)
    assert set(model.state_dict()) == set(Net().state_dict()) and not tuned(model)
    assert torch.allclose(model(IDS), out, atol=1e-5) and not torch.allclose(out, base, atol=1e-2)
    assert all(p.requires_grad for p in model.parameters())


def test_merge_and_unmerge() -> None:
    model = Net()
    apply(model, LoRAConfig(r=3, target_modules=TARGETS))
    out = train(model)(IDS)
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    merge(model)
    assert torch.allclose(model(IDS), out, atol=1e-5)
    assert all(m.merged for m in model.modules() if isinstance(m, TunerModule))
    merge(model)
    unmerge(model)
    assert torch.allclose(model(IDS), out, atol=1e-5)
    assert all(torch.allclose(model.get_parameter(n), w, atol=1e-6) for n, w in weights.items())
    other = copy.deepcopy(model)
    merge(other)
    remove(other)
    assert torch.allclose(other.layers[0].q.weight, weights["layers.0.q.base_layer.weight"], atol=1e-6)  # type: ignore[union-attr]
    assert tuned(model) and not tuned(other)


def test_merge_does_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    apply(model, LoRAConfig(r=3, target_modules=TARGETS))
    train(model)
    good = model.layers[1].v.lora_B.clone()  # type: ignore[union-attr]
    with torch.no_grad():
        model.layers[1].v.lora_B[0, 0] = math.inf  # type: ignore[union-attr]
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"merge: layers\.1\.v: LoRALinear: lora_B has values that are not finite"):
        merge(model)
    with pytest.raises(ValueError, match="not finite"):
        remove(model, merge=True)
    assert unchanged(model, before)
    with torch.no_grad():
        model.layers[1].v.lora_B.copy_(good)  # type: ignore[union-attr]

    def fails(self: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(LoRAConv2d, "merge", fails)  # the last of them, and not one that a check could have seen
    before = snapshot(model)
    with pytest.raises(MemoryError, match="no room"):
        merge(model)
    assert not any(m.merged for m in model.modules() if isinstance(m, TunerModule))
    assert all(torch.allclose(v, before[2][k], atol=1e-6) for k, v in model.state_dict().items())


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 30, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.mid(self.embed(ids)))

    model = Tied()
    apply(model, LoRAConfig(r=2, target_modules=["embed", "mid"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"merge: embed: its weight is tied to head, which would change too"):
        merge(model)
    assert unchanged(model, before)
    remove(model)
    assert model.head.weight is model.embed.weight
    apply(model, LoRAConfig(r=2, target_modules=["mid"], modules_to_save=["head"]))
    assert model.head.weight is not model.embed.weight  # trained apart, as PEFT does it
    assert not model.embed.weight.requires_grad and model.head.weight.requires_grad
    remove(model)
    assert model.head.weight is model.embed.weight


# ---- initial values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["pissa", "pissa_niter_8", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_init_from_the_weight_is_pefts(method: str, dtype: torch.dtype, use_rslora: bool) -> None:
    u, _, vt = torch.linalg.svd(torch.randn(24, 40), full_matrices=False)
    singular = torch.cat([torch.linspace(10, 5, 4), torch.linspace(0.5, 0.01, 20)])  # a gap, for the randomized SVD
    weight = (u * singular) @ vt
    base = nn.Linear(40, 24).to(dtype)
    with torch.no_grad():
        base.weight.copy_(weight)
    kept = base.weight.clone()
    other = nn.Sequential(copy.deepcopy(base))
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "use_rslora": use_rslora, "target_modules": ["0"]}
    peft.get_peft_model(other, peft.LoraConfig(**fields, init_lora_weights=method), autocast_adapter_dtype=False)
    model = nn.Sequential(base)
    apply(model, LoRAConfig(**fields, init_lora_weights=method, adapter_dtype=torch.float32))
    ours: Any = model[0]
    theirs: Any = other[0]
    product = (
        theirs.scaling["default"] * theirs.lora_B["default"].weight.float() @ theirs.lora_A["default"].weight.float()
    )
    own = ours.scaling * ours.lora_B @ ours.lora_A
    bound = (
        1e-4 if dtype == torch.float32 else 1e-2 * float(product.detach().abs().max())
    )  # PEFT's factors are bfloat16 then
    assert torch.allclose(own, product, atol=bound)
    assert torch.allclose(ours.base_layer.weight.float(), theirs.base_layer.weight.float(), atol=bound)
    assert torch.allclose(own + ours.base_layer.weight.float(), kept.float(), atol=bound)
    assert torch.equal(base.weight, kept) and ours.base_layer.bias is base.bias
    if method == "pissa":  # the best approximation of rank 4: what is left has the other singular values
        left = torch.linalg.svdvals(kept.float() - own.detach())
        assert torch.allclose(left[:20], torch.linalg.svdvals(kept.float())[4:], atol=1e-4)
    if method == "olora":
        assert torch.allclose(ours.lora_B.T @ ours.lora_B, torch.eye(4), atol=1e-5)
    remove(model)
    assert torch.allclose(model[0].weight.float(), kept.float(), atol=bound)  # type: ignore[union-attr]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("method", ["pissa", "olora", "orthogonal"])
def test_a_new_model_computes_what_it_did(method: str, use_dora: bool) -> None:
    model = Net()
    before = model(IDS)
    config = LoRAConfig(r=4, target_modules=["q", "v"], init_lora_weights=method, use_dora=use_dora, lora_alpha=12)
    apply(model, config)
    assert torch.allclose(model(IDS), before, atol=1e-5)
    layer: Any = model.layers[0].q  # type: ignore[union-attr]
    assert layer.lora_A.abs().max() > 0 and layer.lora_B.abs().max() > 0


def test_pissa_of_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    base = Conv1D(24, 40)
    nn.init.normal_(base.weight)
    kept = base.weight.clone()
    model = nn.Sequential(base)
    apply(model, LoRAConfig(r=4, target_modules=["0"], init_lora_weights="pissa"))
    layer: Any = model[0]
    x = torch.randn(3, 40)
    assert torch.allclose(layer(x), base(x), atol=1e-4) and type(layer.base_layer) is Conv1D
    assert torch.allclose(layer.base_layer.weight + layer.scaling * (layer.lora_B @ layer.lora_A).T, kept, atol=1e-5)
    remove(model)
    assert torch.allclose(model[0].weight, kept, atol=1e-5)  # type: ignore[union-attr]


def test_orthogonal() -> None:
    a, b = init.orthogonal(8, 40, 24, generator=torch.Generator().manual_seed(3))
    assert a.shape == (8, 40) and b.shape == (24, 8) and a.dtype == torch.float32
    assert (b @ a).abs().max() < 1e-6 and torch.linalg.matrix_rank(a) == torch.linalg.matrix_rank(b) == 4
    assert math.isclose(float(a.square().mean()), 0.5 / 100, rel_tol=0.35)  # of unit normals over 10, half the rows
    with pytest.raises(ValueError, match="rank is 5; expected an even number"):
        init.orthogonal(5, 40, 24)


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq(iterations: int) -> None:
    """Algorithm 1 of the paper, step by step in float64, and less error than quantizing alone."""
    weight = torch.randn(32, 64)
    found = init.loftq(weight, 4, 0.5, iterations=iterations)
    product = torch.zeros(32, 64, dtype=torch.float64)
    for _ in range(iterations):
        quantized = ops.nf4_dequantize(ops.nf4_quantize((weight.double() - product).float()), dtype=torch.float64)
        u, s, vt = torch.linalg.svd(weight.double() - quantized, full_matrices=False)
        product = (u[:, :4] * s[:4]) @ vt[:4]
    assert torch.allclose(0.5 * (found.lora_b @ found.lora_a).double(), product, atol=1e-5)
    dense = ops.nf4_dequantize(found.weight)
    assert torch.allclose(dense.double(), quantized, atol=1e-5)
    plain = (weight - ops.nf4_dequantize(ops.nf4_quantize(weight))).norm()
    assert (weight - dense - 0.5 * found.lora_b @ found.lora_a).norm() < 0.95 * plain


def test_loftq_in_a_model() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    weight, bias = model[0].weight.clone(), model[0].bias
    apply(model, LoRAConfig(r=4, target_modules=["0"], init_lora_weights="loftq", loftq_config={"loftq_iter": 2}))
    layer: Any = model[0]
    assert isinstance(layer.base_layer, NF4Linear) and layer.base_layer.bias is bias
    total = layer.base_layer.dequantize() + layer.scaling * layer.lora_B @ layer.lora_A
    assert (total - weight).norm() < 0.1 * weight.norm()
    remove(model)
    assert isinstance(model[0], NF4Linear)


def test_wrong_inits() -> None:
    weight = torch.randn(8, 6)
    for call, match in (
        (lambda: init.pissa(weight, 7), r"pissa: rank is 7; expected 1 to .* = 6"),
        (lambda: init.olora(weight.flatten(), 1), r"olora: weight has shape \(48,\)"),
        (lambda: init.pissa(weight, 2, 0.0), "pissa: scaling is 0.0; expected a number above 0"),
        (lambda: init.pissa(weight, 2, niter=-1), "niter is -1"),
        (lambda: init.loftq(weight, 2, iterations=0), "loftq: iterations is 0; expected 1 or more"),
        (lambda: init.olora(weight * math.nan, 2), "olora: weight has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match=r"weight is torch\.int64; expected a floating-point matrix"):
        init.pissa(torch.ones(4, 4, dtype=torch.int64), 2)
    with pytest.raises(TypeError, match="'pissa' needs the dense weight; the layer's base_layer is an NF4Linear"):
        init.initialize(LoRALinear(NF4Linear.from_linear(nn.Linear(64, 8)), 2), "pissa")
    layer = LoRALinear(nn.Linear(8, 8), 2)
    init.initialize(layer, "pissa")
    with pytest.raises(ValueError, match="base weight lacks an earlier initialization"):
        init.initialize(layer, "olora")


# ---- files ----------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q", "v"]},
    "rslora": {"target_modules": ["q", "out"], "use_rslora": True, "lora_bias": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "embedding": {"target_modules": ["embed", "q"]},
    "conv": {"target_modules": r"conv|layers\.1\.q", "r": 3},
    "saved": {"target_modules": ["q"], "modules_to_save": ["head", "norm"]},
    "patterns": {
        "target_modules": ["q", "v"], "rank_pattern": {"v": 2}, "alpha_pattern": {r"^layers\.1\.q": 3},
        "layers_to_transform": None, "exclude_modules": ["layers.0.v"],
    },
    "bias_all": {"target_modules": ["q"], "bias": "all"},
    "bias_lora": {"target_modules": ["q", "v"], "bias": "lora_only", "modules_to_save": ["head"]},
}  # fmt: skip


def fields_of(variant: str) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, **VARIANTS[variant]}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_peft_loads_what_is_saved_here(variant: str, tmp_path: Path) -> None:
    model = Net()
    base = copy.deepcopy(model)
    fields = {k: v for k, v in fields_of(variant).items() if v is not None}
    apply(model, LoRAConfig(**fields))
    out = train(model)(IDS)
    assert not torch.allclose(out, base(IDS), atol=1e-2)
    assert save_adapter(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "new" / "folder")
    assert torch.allclose(theirs(IDS), out, atol=1e-5)
    for trainable in (False, True):
        again = copy.deepcopy(base)
        made = load_adapter(again, tmp_path / "new" / "folder", trainable=trainable)
        assert torch.equal(again.eval()(IDS), out) and set(made.targets) == tuned(model)
        names = {n for n, p in again.named_parameters() if p.requires_grad}
        assert names == ({n for n, p in model.named_parameters() if p.requires_grad} if trainable else set())


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_what_peft_saved_is_loaded_here(variant: str, tmp_path: Path) -> None:
    base = Net()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields_of(variant)))
    out = train(theirs)(IDS)
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path)
    assert torch.allclose(model.eval()(IDS), out, atol=1e-5) and not torch.allclose(out, base(IDS), atol=1e-2)
    remove(model)
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize(
    "fields", [{"r": 4}, {"r": 10, "use_rslora": True, "rank_pattern": {"v": 3}}, {"use_dora": True}]
)
def test_adapters_that_changed_the_base_are_saved_for_the_base_as_it_was(
    method: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = Net()
    base = copy.deepcopy(model)
    apply(model, LoRAConfig(target_modules=["q", "v"], init_lora_weights=method, lora_alpha=4, **fields))
    out = train(model)(IDS)
    save_adapter(model, tmp_path)
    assert torch.allclose(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(IDS), out, atol=2e-5)
    other = copy.deepcopy(base)
    load_adapter(other, tmp_path)
    assert torch.allclose(other(IDS), out, atol=2e-5)
    with pytest.raises(ValueError, match=r"its base weight lacks what .* took out of it"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_pefts_adapters_that_changed_the_base(method: str, tmp_path: Path) -> None:
    base = Net()
    config = peft.LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=method)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    out = train(theirs)(IDS)
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path)
    assert torch.allclose(model(IDS), out, atol=2e-5)


def test_a_transformer(tmp_path: Path) -> None:
    """Llama: its embedding is one that PEFT saves the base weight of; bfloat16 factors beside float32 weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(64, (2, 7))
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    assert any(k.endswith("base_layer.weight") for k in read_adapter(tmp_path / "theirs").tensors)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path / "theirs", trainable=True)
    out = theirs(ids).logits
    assert torch.allclose(model(ids).logits, out, atol=1e-5) and not torch.allclose(base(ids).logits, out, atol=1e-2)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert torch.allclose(again(ids).logits, out, atol=1e-5)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.embed_tokens.weight[0] += 1
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"embed_tokens\.base_layer\.weight' differs from the model's base weight"):
        load_adapter(other, tmp_path / "theirs")
    assert unchanged(other, before)
    plain = transformers.LlamaForCausalLM(config)
    apply(plain, LoRAConfig(r=2))  # all-linear: not the output head
    assert len(tuned(plain)) == 14 and "lm_head" not in tuned(plain)


def test_a_classifier(tmp_path: Path) -> None:
    """For this task PEFT adds "classifier" and "score" to modules_to_save, whichever the model has."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    base = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(64, (2, 7))
    fields: dict[str, Any] = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    model = copy.deepcopy(base)
    apply(model, LoRAConfig(**fields, modules_to_save=["classifier"]))
    with torch.no_grad():
        for parameter in (*theirs.parameters(), *model.parameters()):
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    assert set(read_adapter(tmp_path / "theirs").config.modules_to_save) == {"classifier", "score"}
    other = copy.deepcopy(base)
    assert load_adapter(other, tmp_path / "theirs").saved == ("classifier",)
    assert torch.allclose(other(ids).logits, theirs.eval()(ids).logits, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert torch.allclose(again(ids).logits, model.eval()(ids).logits, atol=1e-5)
    assert not torch.allclose(again(ids).logits, base(ids).logits, atol=1e-2)


def test_names_that_are_ends_of_others(tmp_path: Path) -> None:
    """A list of names would make PEFT adapt inner.0 too: "all-linear" is saved as an expression then."""
    model = nn.Sequential(nn.Linear(8, 8))
    model.add_module("inner", nn.Sequential(nn.Conv2d(8, 8, 1)))
    base = copy.deepcopy(model)
    apply(model, LoRAConfig(r=2, rank_pattern={"0": 3}))
    save_adapter(model, tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["target_modules"] == "^0" and stored["peft_type"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert {n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)} == {"0"}


def test_values_are_replaced_in_a_model_that_has_adapters(tmp_path: Path) -> None:
    config = LoRAConfig(r=3, target_modules=TARGETS, modules_to_save=["head"], bias="lora_only")
    model = Net()
    other = copy.deepcopy(model)
    apply(model, config)
    out = train(model)(IDS)
    save_adapter(model, tmp_path)
    apply(other, config)
    train(other, 1)
    parameters = [id(p) for p in other.parameters()]
    load_adapter(other, tmp_path)
    assert torch.equal(other(IDS), out) and [id(p) for p in other.parameters()] == parameters
    assert any(p.requires_grad for p in other.parameters())
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"has scaling 2\.0 in the file; expected"):
        load_adapter(other, replace(get_adapter(model), config=replace(config, lora_alpha=6)))
    assert unchanged(other, before)
    merge(other)
    with pytest.raises(ValueError, match="the model's adapters are merged; unmerge them first"):
        load_adapter(other, tmp_path)


def _cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def _edit(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = {k: v.clone() for k, v in load_file(folder / "adapter_model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


A, HEAD = "base_model.model.layers.0.q.lora_A.weight", "base_model.model.head.weight"


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda d: _cut(d / "adapter_model.safetensors", 5), ValueError, "adapter_model.safetensors: damaged"),
        (lambda d: _cut(d / "adapter_model.safetensors", 900), ValueError, "adapter_model.safetensors: damaged"),
        (lambda d: _cut(d / "adapter_model.safetensors", -4), ValueError, "adapter_model.safetensors: damaged"),
        (lambda d: _cut(d / "adapter_config.json", 40), ValueError, "adapter_config.json: damaged, or no JSON"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), ValueError, "holds a list; expected an object"),
        (lambda d: (d / "adapter_config.json").unlink(), FileNotFoundError, "adapter_config.json: there is no such"),
        (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), FileNotFoundError,
         "adapter_model.safetensors: there is no such file .adapter_model.bin is a pickle"),
        (_edit(peft_type="IA3"), ValueError, "peft_type is 'IA3'; expected 'LORA'"),
        (_edit(r=5), ValueError, rf"'{A}' has shape \(3, 16\); expected \(5, 16\)"),
        (_edit(r="3"), ValueError, "r is '3'; expected a whole number"),
        (_edit(r=0), ValueError, "adapter_config.json: LoRAConfig: r is 0"),
        (_edit(rank_pattern=[1]), ValueError, r"rank_pattern is \[1\]; expected an object"),
        (_edit(target_modules=None), ValueError, "target_modules is missing"),
        (_edit(target_modules=["q", "v", "out"]), ValueError, "adapter has no .*layers.0.out.lora_A.weight'"),
        (_edit(target_modules=["q"]), ValueError, "adapter has .*layers.0.v.lora_A.weight', which the model has no"),
        (_edit(modules_to_save=["head", "embed"]), ValueError, "has no 'base_model.model.embed.weight'"),
        (_edit(use_dora=True), ValueError, "has no 'base_model.model.layers.0.q.lora_magnitude_vector'"),
        (_edit(target_parameters=["w"]), ValueError, r"target_parameters is \['w'\]; an adapter with it is not supp"),
        (_edit(init_lora_weights="corda"), ValueError, "init_lora_weights is 'corda', which changed the base weight"),
        (_edit(lora_dropout=2), ValueError, "lora_dropout is 2"),
        (_tensors(lambda t: t.pop(A)), ValueError, f"adapter has no '{A}'"),
        (_tensors(lambda t: t.update({"base_model.model.x.lora_A.weight": t[A].clone()})), ValueError,
         "adapter has 'base_model.model.x.lora_A.weight', which the model has no place for"),
        (_tensors(lambda t: t.update({"x": t[A].clone()})), ValueError, "has the key 'x'; expected keys that begin"),
        (_tensors(lambda t: t.update({A: t[A].T.contiguous()})), ValueError, rf"'{A}' has shape \(16, 3\)"),
        (_tensors(lambda t: t.update({A: t[A].int()})), ValueError, f"'{A}' has dtype torch.int32; expected floating"),
        (_tensors(lambda t: t.update({HEAD: t[HEAD].int()})), TypeError, f"'{HEAD}' has dtype torch.int32"),
    ],
)  # fmt: skip
def test_bad_files_leave_the_model(
    damage: Callable[[Path], None], error: type[Exception], match: str, tmp_path: Path
) -> None:
    model = Net()
    plain = copy.deepcopy(model)
    apply(model, LoRAConfig(r=3, target_modules=["q", "v"], modules_to_save=["head"]))
    save_adapter(train(model), tmp_path)
    damage(tmp_path)
    before = snapshot(plain)
    with pytest.raises(error, match=match):
        load_adapter(plain, tmp_path)
    assert unchanged(plain, before)


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    apply(model, LoRAConfig(r=3, target_modules=["q"]))
    save_adapter(model, tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    train(model)
    with monkeypatch.context() as patch:

        def full(file: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    save_adapter(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(files)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != files["adapter_model.safetensors"]


def test_get_adapter_copies() -> None:
    model = Net()
    apply(model, LoRAConfig(r=3, target_modules=["q"]))
    adapter = get_adapter(model)
    values = {k: v.clone() for k, v in adapter.tensors.items()}
    assert set(values) == {f"layers.{i}.q.lora_{f}.weight" for i in (0, 1) for f in "AB"}
    train(model)
    assert all(torch.equal(v, values[k]) for k, v in adapter.tensors.items())
    with pytest.raises(TypeError, match="model is a int"):
        load_adapter(3, adapter)  # type: ignore[arg-type]


def test_shared_memory_is_written_apart(tmp_path: Path) -> None:
    model = Net()
    apply(model, LoRAConfig(r=3, target_modules=["q"]))
    adapter = get_adapter(model)
    one = adapter.tensors["layers.0.q.lora_A.weight"]
    tied = replace(adapter, tensors={**adapter.tensors, "layers.1.q.lora_A.weight": one})
    write_adapter(tied, tmp_path)
    assert torch.equal(read_adapter(tmp_path).tensors["layers.1.q.lora_A.weight"], one)


# ---- combining ------------------------------------------------------------------------------------------------------

WEIGHTS = [0.7, -0.4]


def two_adapters(tmp_path: Path, ranks: tuple[int, int] = (3, 3)) -> tuple[Net, Any, list[Adapter]]:
    """A base model, PEFT's model with two adapters, and the same two here."""
    base = Net()
    theirs: Any = None
    found = []
    for i, r in enumerate(ranks):
        config = peft.LoraConfig(r=r, lora_alpha=2 + 3 * i, target_modules=TARGETS, use_rslora=i == 1)
        if theirs is None:
            theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=f"a{i}")
        else:
            theirs.add_adapter(f"a{i}", config)
        for name, p in theirs.named_parameters():
            if f".a{i}" in name:
                p.data = torch.randn(p.shape)
        theirs.save_pretrained(tmp_path, selected_adapters=[f"a{i}"])
        found.append(read_adapter(tmp_path / f"a{i}"))
    return base, theirs, found


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {"svd_rank": 2}),
        ("ties", {"density": 0.5}),
        ("ties", {"density": 0.5, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.3}),
        ("ties_svd", {"density": 0.4, "svd_rank": 3}),
        ("magnitude_prune_svd", {"density": 0.6}),
    ],
)
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 0.5]])
def test_combinations_are_pefts(method: str, options: dict[str, Any], weights: list[float], tmp_path: Path) -> None:
    ranks = (3, 2) if method in ("cat", "svd") else (3, 3)
    base, theirs, adapters = two_adapters(tmp_path, ranks)
    merged = merge_adapters(adapters, weights, method, **options)
    theirs.add_weighted_adapter(["a0", "a1"], weights, "new", combination_type=method, **options)
    theirs.set_adapter("new")
    if method == "cat":  # PEFT's rank is 5 in all layers, of which the convolution has 3
        assert merged.config.rank_of("layers.0.q") == 5 and merged.config.rank_of("conv") == 3
    for name, module in theirs.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            embedding = isinstance(module, peft.tuners.lora.Embedding)
            keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
            a, b = (merged.tensors[f"{name}.{key}"] for key in keys)
            assert merged.config.scaling_of(name) == 1.0 and a.shape[0] == merged.config.rank_of(name)
            update = b.flatten(1) @ a.flatten(1)
            expected = module.get_delta_weight("new")
            expected = expected.T if embedding else expected.flatten(1)
            assert torch.allclose(update, expected, atol=2e-4), name
    load_adapter(base, merged)
    base.eval()
    assert torch.allclose(base(IDS), theirs.eval()(IDS), rtol=1e-3, atol=1e-3 * float(base(IDS).abs().max()))


def test_cat_is_the_sum_of_the_updates(tmp_path: Path) -> None:
    _, _, adapters = two_adapters(tmp_path, (3, 2))
    merged = merge_adapters(adapters, WEIGHTS, "cat")
    total = sum(
        w
        * a.config.scaling_of("layers.1.v")
        * a.tensors["layers.1.v.lora_B.weight"]
        @ a.tensors["layers.1.v.lora_A.weight"]
        for w, a in zip(WEIGHTS, adapters, strict=True)
    )
    got = merged.tensors["layers.1.v.lora_B.weight"] @ merged.tensors["layers.1.v.lora_A.weight"]
    assert isinstance(total, Tensor) and torch.allclose(got, total, atol=1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_follows_its_generator_and_keeps_all_at_density_1(method: str, tmp_path: Path) -> None:
    _, _, adapters = two_adapters(tmp_path)
    draws = [
        merge_adapters(adapters, WEIGHTS, method, density=0.5, generator=torch.Generator().manual_seed(s)).tensors
        for s in (1, 1, 2)
    ]
    key = "layers.0.q.lora_A.weight"
    assert torch.equal(draws[0][key], draws[1][key]) and not torch.equal(draws[0][key], draws[2][key])
    whole = merge_adapters(adapters, WEIGHTS, method, density=1.0)
    same = merge_adapters(
        adapters, WEIGHTS, {"dare_linear": "linear", "dare_linear_svd": "svd"}.get(method, method.replace("dare_", "")),
        **({"density": 1.0} if "ties" in method else {}),
    )  # fmt: skip
    assert all(torch.allclose(whole.tensors[k], v, atol=1e-5) for k, v in same.tensors.items())


def test_full_rank_is_enough() -> None:
    a, b = torch.randn(9, 4, 2, 1), torch.randn(6, 9, 1, 1)
    small_a, small_b = at_most_full_rank(a, b)
    assert small_a.shape == (6, 4, 2, 1) and small_b.shape == (6, 6, 1, 1)
    assert torch.allclose(small_b.flatten(1) @ small_a.flatten(1), b.flatten(1) @ a.flatten(1), atol=1e-5)
    small_a, small_b = at_most_full_rank(a[..., 0, :], b)
    assert small_a.shape == (4, 4, 1) and small_b.shape == (6, 4, 1, 1)


def test_what_cannot_be_combined(tmp_path: Path) -> None:
    _, _, (one, two) = two_adapters(tmp_path)
    q = "layers.0.q.lora_A.weight"
    fewer = replace(two, tensors={k: v for k, v in two.tensors.items() if "layers.0.q" not in k})
    narrow = replace(two, tensors={**two.tensors, q: two.tensors[q][:, :5]})
    low = replace(two, tensors={**two.tensors, q: two.tensors[q][:2]})
    half = replace(two, tensors={k: v for k, v in two.tensors.items() if k != "layers.0.q.lora_B.weight"})
    dora = replace(two, tensors={**two.tensors, "layers.0.q.lora_magnitude_vector": torch.ones(24)})
    cases: list[tuple[list[Adapter], dict[str, Any], str]] = [
        ([one, fewer], {}, rf"adapters\[1\] has no '{q}', which adapters\[0\] has"),
        ([fewer, one], {}, rf"adapters\[0\] has no '{q}', which adapters\[1\] has"),
        ([one, narrow], {}, rf"adapters\[1\] has shape \(3, 5\) at '{q}'; expected \(3, 16\)"),
        ([one, narrow], {"method": "cat"}, rf"adapters\[1\] has shape \(3, 5\) at '{q}'"),
        ([one, low], {}, rf"adapters\[1\] has shape \(2, 16\) at '{q}'; expected \(3, 16\)"),
        ([one, half], {}, rf"adapters\[1\] has '{q}', but no 'layers.0.q.lora_B.weight'"),
        ([one, dora], {}, r"adapters\[1\] has 'layers.0.q.lora_magnitude_vector'; expected LoRA's two factors"),
        ([one], {}, "weights has 2 entries; expected 1"),
        ([one, two], {"weights": [1.0, math.inf]}, r"weights is \[1.0, inf\]; expected finite"),
        ([one, two], {"method": "mean"}, "method is 'mean'; expected one of linear, svd, cat"),
        ([one, two], {"method": "ties"}, "density is None; expected a share above 0"),
        ([one, two], {"density": 0.5}, "density is 0.5; expected None, for a method that prunes nothing"),
        ([one, two], {"svd_rank": 2}, "svd_rank is 2; expected 1 or more, with a method that ends in 'svd'"),
    ]
    for adapters, options, match in cases:
        with pytest.raises(ValueError, match=match):
            merge_adapters(adapters, **{"weights": WEIGHTS, **options})
    with pytest.raises(TypeError, match=r"adapters is \['int'\]; expected at least one Adapter"):
        merge_adapters([1], [1.0])  # type: ignore[list-item]


def test_dora_layers_are_found() -> None:
    model = Net()
    apply(model, LoRAConfig(r=2, target_modules=["q"], use_dora=True, lora_dropout=0.1))
    layer: Any = model.layers[0].q  # type: ignore[union-attr]
    assert type(layer) is DoRALinear and layer.dropout == 0.1
    assert trainable_parameters(model).layers["layers.0.q"] == 2 * (16 + 24) + 24
