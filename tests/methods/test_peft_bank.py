"""Many adapters in one batch: against each adapter merged by hand in float64, and against PEFT's own mixed batches."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.tolerances import relative_error
from tlkernels import quantize_model
from tlkernels.methods.peft.apply import apply, merge
from tlkernels.methods.peft.bank import AdapterBank, _Factors
from tlkernels.methods.peft.checkpoint import Adapter, get_adapter, save_adapter
from tlkernels.methods.peft.lora import LoRAConfig
from tlkernels.nn import NF4Linear

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WIDTH = 32
TARGETS = ["q", "k", "v", "up", "down", "head"]


class Block(nn.Module):
    """Attention over the tokens of a row, and two layers of other shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32, bias=False), nn.Linear(WIDTH, 32)
        self.up, self.down = nn.Linear(WIDTH, 80), nn.Linear(80, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two blocks on ``[batch, tokens, 32]``, and a head on ``[batch, 32]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model() -> nn.Module:
    return Net().eval()


def adapter(model: nn.Module, seed: int, size: float = 0.3, **fields: Any) -> Adapter:
    """A random adapter of a model that is dense, large enough to be seen in every output."""
    config = LoRAConfig(**{"r": 4, "lora_alpha": 8.0, "target_modules": TARGETS, **fields})
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in config.targets(model).items():
        rank = config.rank_of(name)
        out_features, in_features = module.weight.shape  # type: ignore[misc, union-attr]
        for key, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
            tensors[f"{name}.{key}.weight"] = size * torch.randn(*shape, generator=generator) / shape[1] ** 0.5
    return Adapter(config, tensors)


def merged(model: nn.Module, adapter: Adapter | None) -> nn.Module:
    """The closed form, in float64: every weight is W + scaling * B A."""
    dense = copy.deepcopy(model).double()
    if adapter is None:
        return dense
    for key, a in adapter.tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            b = adapter.tensors[f"{name}.lora_B.weight"]
            config = adapter.config
            rank = len(a)
            scaling = config.alpha_of(name) / (rank**0.5 if config.use_rslora else rank)
            dense.get_submodule(name).weight.data += scaling * b.double() @ a.double()  # type: ignore[operator, union-attr]
    return dense


@torch.no_grad()
def one_by_one(model: nn.Module, adapters: dict[str, Adapter], names: list[str | None], x: Tensor) -> Tensor:
    """Each row alone, through the model with its adapter merged."""
    rows = []
    for name, row in zip(names, x, strict=True):
        rows.append(merged(model, None if name is None else adapters[name])(row[None].double()))
    return torch.cat(rows)


VARIED: dict[str, dict[str, Any]] = {
    "a": {},
    "b": {"r": 7, "lora_alpha": 3.5},
    "c": {"r": 1, "use_rslora": True, "lora_alpha": 0.5},
    "d": {"r": 2, "rank_pattern": {"up": 6, "layers.1.q": 3}, "alpha_pattern": {"v": 1.0}},
    "e": {"target_modules": ["layers.1.q", "layers.1.v"]},
}
MIXED: list[str | None] = ["d", None, "a", "c", "a", None, "e", "b", "c"]


def full_bank(model: nn.Module, **options: Any) -> tuple[AdapterBank, dict[str, Adapter]]:
    adapters = {name: adapter(model, seed, **fields) for seed, (name, fields) in enumerate(VARIED.items())}
    bank = AdapterBank(model, **{"capacity": 6, "max_rank": 8, "target_modules": TARGETS, **options})
    for name, one in adapters.items():
        bank.load(name, one)
    return bank, adapters


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    return (
        {name: id(module) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()},
        {name: value.clone() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        sorted(vars(model)),
    )


def same(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    values = before[2].keys() == after[2].keys() and all(torch.equal(before[2][k], after[2][k]) for k in before[2])
    return values and before[:2] == after[:2] and before[3:] == after[3:]


# ---- the result -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [MIXED, ["d", "a", "b", "a", "e", "c"], ["b"], ["e", "e"]], ids=str)
def test_a_mixed_batch_is_each_row_with_its_adapter_merged(
    names: list[str | None], model: nn.Module, backend: str
) -> None:  # fmt: skip
    bank, adapters = full_bank(model)
    x = torch.randn(len(names), 5, WIDTH)
    want = one_by_one(model, adapters, names, x)
    base = one_by_one(model, adapters, [None] * len(names), x)
    got = bank.install().forward(x, adapters=names)
    assert got.dtype == torch.float32 and relative_error(got, want) < 2e-6
    for row, name in enumerate(names):  # the adapters matter, in every row that has one
        assert (relative_error(want[row], base[row]) > 1e-2) == (name is not None)


@pytest.mark.parametrize("names", [MIXED, ["d", "a", "b", "a", "e", "c"]], ids=["with None", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mixed_batch_in_16_bits(names: list[str | None], dtype: torch.dtype, model: nn.Module) -> None:
    model = model.to(dtype)
    bank, adapters = full_bank(model)
    rounded = {
        name: replace(one, tensors={key: value.to(dtype) for key, value in one.tensors.items()})
        for name, one in adapters.items()
    }
    x = torch.randn(len(names), 5, WIDTH).to(dtype)
    want = one_by_one(model, rounded, names, x)
    alone = torch.cat(
        [
            merged(model, None if name is None else rounded[name]).to(dtype)(row[None]).detach()
            for name, row in zip(names, x, strict=True)
        ]
    )
    got = bank.install().forward(x, adapters=names)
    assert got.dtype == dtype
    # about as far from float64 as a model of this dtype with merged weights, which are rounded too
    assert relative_error(got, want) < 1.5 * relative_error(alone, want)


def test_a_row_does_not_depend_on_the_order_or_the_others(model: nn.Module) -> None:
    bank, _ = full_bank(model)
    bank.install()
    x = torch.randn(len(MIXED), 5, WIDTH)
    order = torch.randperm(len(MIXED))
    got = bank.forward(x[order], adapters=[MIXED[i] for i in order.tolist()])
    assert relative_error(got, bank.forward(x, adapters=MIXED)[order]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_none_is_the_base_model_bit_for_bit(dtype: torch.dtype, model: nn.Module) -> None:
    model = model.to(dtype)
    x = torch.randn(len(MIXED), 5, WIDTH).to(dtype)
    with torch.no_grad():
        base = model(x)
        bank, _ = full_bank(model)
        assert torch.equal(model(x), base), "a bank that is not installed"
        bank.install()
        assert torch.equal(model(x), base), "outside a block"
        assert torch.equal(bank.forward(x, adapters=[None] * len(MIXED)), base)
        got = bank.forward(x, adapters=MIXED)
        for row, name in enumerate(MIXED):
            assert torch.equal(got[row], base[row]) == (name is None), row
        assert torch.equal(model(x), base), "after a block"


def test_blocks_nest_and_end_with_an_error(model: nn.Module) -> None:
    bank, _ = full_bank(model)
    bank.install()
    other = Net().eval()
    second, _ = full_bank(other)
    second.install()
    x = torch.randn(2, 3, WIDTH)
    with torch.no_grad():
        a, b, base = bank.forward(x, adapters=["a", "a"]), bank.forward(x, adapters=["b", "b"]), model(x)
        theirs = second.forward(x, adapters=["c", None])
        with bank.use(["a", "a"]):
            with bank.use(["b", "b"]), second.use(["c", None]):
                assert torch.equal(model(x), b) and torch.equal(other(x), theirs)
            assert torch.equal(model(x), a)
        with pytest.raises(KeyError), bank.use(["a", "a"]):
            raise KeyError
        assert torch.equal(model(x), base)
    bank.remove()  # nothing reads it any more


def test_hooks_of_the_model_run(model: nn.Module) -> None:
    bank, adapters = full_bank(model)
    seen = []
    model.get_submodule("layers.0.q").register_forward_hook(lambda *_: seen.append(1))
    bank.install()
    x = torch.randn(2, 3, WIDTH)
    got = bank.forward(x, adapters=["a", "b"])
    assert seen == [1] and relative_error(got, one_by_one(bank.remove(), adapters, ["a", "b"], x)) < 2e-6


def test_autocast(model: nn.Module) -> None:
    bank, adapters = full_bank(model)
    x = torch.randn(len(MIXED), 5, WIDTH)
    want = one_by_one(model, adapters, MIXED, x)
    bank.install()
    for names in (MIXED, ["a"] * len(MIXED)):
        with torch.autocast("cpu", torch.bfloat16):
            got = bank.forward(x, adapters=names)
        assert got.dtype == torch.bfloat16
        if names is MIXED:
            assert relative_error(got, want) < 2e-2


def test_inference_mode(model: nn.Module) -> None:
    bank, _ = full_bank(model)
    bank.install()
    x = torch.randn(len(MIXED), 5, WIDTH)
    with torch.inference_mode(), bank.use(MIXED):
        got = model(x)
    assert torch.equal(got, bank.forward(x, adapters=MIXED))


# ---- kinds of layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_in_4_bits(dtype: torch.dtype, model: nn.Module) -> None:
    quantized = quantize_model(copy.deepcopy(model)).eval()
    dense = copy.deepcopy(model)
    for name, module in quantized.named_modules():
        if isinstance(module, NF4Linear):
            dense.get_submodule(name).weight.data = module.dequantize(torch.float32)  # type: ignore[union-attr]
    adapters = {name: adapter(model, seed, **fields) for seed, (name, fields) in enumerate(VARIED.items())}
    x = torch.randn(len(MIXED), 5, WIDTH).to(dtype)
    want = one_by_one(dense, adapters, MIXED, x)
    quantized = quantized.to(dtype)
    with torch.no_grad():
        base = quantized(x)
    assert any(isinstance(module, NF4Linear) for module in quantized.modules())
    bank = AdapterBank(quantized, 5, 8, TARGETS)
    for name, one in adapters.items():
        bank.load(name, one)
    got = bank.install().forward(x, adapters=MIXED)
    assert relative_error(got, want) < (2e-6 if dtype == torch.float32 else 3e-2)
    assert all(torch.equal(got[row], base[row]) for row, name in enumerate(MIXED) if name is None)


class Packed(nn.Module):
    """`Net`, with q, k and v of each block in one layer."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for block in net.layers:
            layer = nn.Module()
            layer.qkv = nn.Linear(WIDTH, 96)
            parts = [block.q, block.k, block.v]
            layer.qkv.weight.data = torch.cat([part.weight.data for part in parts])
            zero = torch.zeros(32)
            layer.qkv.bias.data = torch.cat([zero if part.bias is None else part.bias.data for part in parts])
            layer.up, layer.down = block.up, block.down
            self.layers.append(layer)
        self.head = net.head

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + functional.scaled_dot_product_attention(*layer.qkv(x).chunk(3, -1))  # type: ignore[operator]
            x = x + layer.down(torch.tanh(layer.up(x)))  # type: ignore[operator]
        return self.head(x.mean(1))


@pytest.mark.parametrize("names", [MIXED, ["a", "e", "d"]], ids=["with None", "all"])
def test_a_packed_layer_takes_the_adapters_of_its_parts(names: list[str | None], model: nn.Module) -> None:
    adapters = {name: adapter(model, seed, **fields) for seed, (name, fields) in enumerate(VARIED.items())}
    x = torch.randn(len(names), 5, WIDTH)
    want = one_by_one(model, adapters, names, x)
    parts = {"q": 32, "k": 32, "v": 32}
    bank = AdapterBank(Packed(model).eval(), 5, 8, ["qkv", "up", "down", "head"], packed={"qkv": parts})  # type: ignore[arg-type]
    for name, one in adapters.items():
        bank.load(name, one)
    got = bank.install().forward(x, adapters=names)
    assert relative_error(got, want) < 2e-6


def test_conv1d_of_transformers() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(pytorch_utils.Conv1D(12, 8)).eval()
    a, b = torch.randn(3, 8), torch.randn(12, 3)
    bank = AdapterBank(model, 1, 4, ["0"])
    state = {"base_model.model.0.lora_A.weight": a, "base_model.model.0.lora_B.weight": b}
    bank.load("a", state, config=LoRAConfig(r=3, lora_alpha=6))
    x = torch.randn(2, 8)
    with torch.no_grad():
        want = model(x) + 2.0 * x @ a.T @ b.T
    assert relative_error(bank.install().forward(x, adapters=["a", "a"]), want) < 1e-6


def test_torchs_fused_transformer_layer_does_not_pass_the_adapters_by() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    model = nn.Sequential(layer)
    state = {"0.linear1.lora_A.weight": torch.randn(2, 16), "0.linear1.lora_B.weight": torch.randn(24, 2)}
    config = LoRAConfig(r=2, lora_alpha=2, target_modules=["linear1"])
    bank = AdapterBank(model, 1, 2)
    bank.load("a", state, config=config)
    assert sorted(bank.layers) == ["0.linear1", "0.linear2"], "the output projection is never called"
    x = torch.randn(2, 3, 16)
    want = one_by_one(model, {"a": Adapter(config, state)}, ["a", None], x)
    with torch.no_grad():
        base = model(x)
    got = bank.install().forward(x, adapters=["a", None])
    assert relative_error(got, want) < 2e-6 < 1e-2 < relative_error(got[0], base[0])


def test_the_model_may_change_dtype_while_installed(model: nn.Module) -> None:
    bank, adapters = full_bank(model)
    x = torch.randn(len(MIXED), 5, WIDTH)
    want = one_by_one(model, adapters, MIXED, x)
    bank.install()
    model.bfloat16()
    section = bank.layers["layers.0.q"].sections[0]
    assert section.lora_a.dtype == torch.bfloat16 and section.scalings.dtype == torch.float32
    assert relative_error(bank.forward(x.bfloat16(), adapters=MIXED), want) < 3e-2
    assert relative_error(bank.remove()(x.bfloat16()).detach(), want) > 5e-2


def test_factors_of_another_dtype(model: nn.Module) -> None:
    bank, adapters = full_bank(model, dtype=torch.bfloat16)
    assert bank.layers["head"].sections[0].lora_a.dtype == torch.bfloat16
    rounded = {
        name: replace(one, tensors={key: value.bfloat16() for key, value in one.tensors.items()})
        for name, one in adapters.items()
    }
    x = torch.randn(len(MIXED), 5, WIDTH)
    want = one_by_one(model, rounded, MIXED, x)
    assert relative_error(bank.install().forward(x, adapters=MIXED), want) < 2e-6


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_a_cache(beams: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=59, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    names, states = ["a", None, "b"], {}
    bank = AdapterBank(model, 2, 3, ["c_attn"])
    for name in ("a", "b"):
        parts = {f"transformer.h.{i}.attn.c_attn": (torch.randn(3, 32) / 4, torch.randn(96, 3)) for i in (0, 1)}
        states[name] = parts
        state = {
            f"{key}.lora_{letter}.weight": t for key, ab in parts.items() for letter, t in zip("AB", ab, strict=True)
        }
        bank.load(name, state, config=LoRAConfig(r=3, lora_alpha=3, target_modules=["c_attn"]))
    ids = torch.randint(1, 59, (3, 4))
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
    want = []
    for row, name in zip(ids, names, strict=True):
        alone = copy.deepcopy(model)
        for key, (a, b) in states.get(name, {}).items():  # type: ignore[call-overload]
            alone.get_submodule(key).weight.data += (b @ a).T  # Conv1D
        want.append(alone.generate(row[None], attention_mask=torch.ones(1, 4), **options))
    assert not torch.equal(want[0], copy.deepcopy(model).generate(ids[:1], attention_mask=torch.ones(1, 4), **options))
    bank.install()
    with bank.use([name for name in names for _ in range(beams)]), torch.no_grad():
        got = model.generate(ids, attention_mask=torch.ones(3, 4), **options)
    assert torch.equal(got, torch.cat(want))


def test_a_compiled_model_still_asks_the_bank(model: nn.Module) -> None:
    bank, _ = full_bank(model)
    bank.install()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 5, WIDTH)
    with torch.no_grad():
        base = model(x)
        assert torch.equal(compiled(x), base)
        for names in (["a", "b", None], ["c", None, None], ["a", "a", "e"]):
            with bank.use(names):
                got = compiled(x)
            assert torch.equal(got, bank.forward(x, adapters=names)) and not torch.equal(got, base)
        assert torch.equal(compiled(x), base)


# ---- files, and PEFT ------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(model: nn.Module, tmp_path: Path) -> Iterator[tuple[Any, dict[str, Path]]]:
    """A model of PEFT with three adapters that it trained and saved, and their folders."""
    peft = pytest.importorskip("peft")
    fields: dict[str, dict[str, Any]] = {
        "law": {"r": 4, "lora_alpha": 16, "target_modules": ["q", "v", "head"]},
        "code": {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": ["up", "down"]},
        "news": {"r": 2, "lora_alpha": 8, "rank_pattern": {"v": 5}, "target_modules": ["q", "k", "v"]},
    }
    configs = {name: peft.LoraConfig(**values) for name, values in fields.items()}
    tuned = peft.get_peft_model(copy.deepcopy(model), configs["law"], adapter_name="law")
    for name in ("code", "news"):
        tuned.add_adapter(name, configs[name])
    x, goal = torch.randn(6, 4, WIDTH), torch.randn(6, 7)
    for name in fields:
        tuned.set_adapter(name)
        optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=0.03)
        for _ in range(6):
            optimizer.zero_grad()
            functional.mse_loss(tuned(x), goal).backward()
            optimizer.step()
    tuned.save_pretrained(str(tmp_path))
    yield tuned.eval(), {name: tmp_path / name for name in fields}


def test_adapters_that_peft_saved_match_its_own_mixed_batch(model: nn.Module, trained: Any) -> None:
    tuned, folders = trained
    names: list[str | None] = ["law", "news", None, "code", "law", "news", "code", "code"]
    x = torch.randn(len(names), 5, WIDTH)
    with torch.no_grad():
        want = tuned(x, adapter_names=["__base__" if name is None else name for name in names])
        base = model(x)
    bank = AdapterBank(model, 3, 8, TARGETS)
    for name, folder in folders.items():
        bank.load(name, str(folder) if name == "law" else folder)
    got = bank.install().forward(x, adapters=names)
    assert relative_error(got, want) < 2e-6
    assert all(relative_error(want[i], base[i]) > 1e-2 for i, name in enumerate(names) if name is not None)


def test_pefts_state_dict_loads(model: nn.Module, trained: Any) -> None:
    import peft

    tuned, folders = trained
    bank = AdapterBank(model, 2, 8, TARGETS).install()
    bank.load("file", folders["code"])
    state = peft.get_peft_model_state_dict(tuned, adapter_name="code")
    bank.load("state", state, config=LoRAConfig(r=8, lora_alpha=8, use_rslora=True, target_modules=["up", "down"]))
    x = torch.randn(2, 5, WIDTH)
    assert torch.equal(*(bank.forward(x, adapters=[name, name]) for name in ("file", "state")))


def test_adapters_of_this_library_saved_and_in_memory(model: nn.Module, tmp_path: Path) -> None:
    tuned = copy.deepcopy(model)
    apply(tuned, LoRAConfig(r=3, target_modules=["q", "down"], init_lora_weights=False))
    save_adapter(tuned, tmp_path)
    bank = AdapterBank(model, 2, 4, TARGETS).install()
    bank.load("file", tmp_path)
    bank.load("memory", get_adapter(tuned))
    merge(tuned)
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        want = tuned(x)
    assert relative_error(bank.forward(x, adapters=["file", "memory"]), want) < 2e-6


# ---- coming and going -----------------------------------------------------------------------------------------------


def test_install_and_remove_leave_the_model_as_it_was(model: nn.Module) -> None:
    model.get_submodule("layers.1").train()
    model.head.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    before = snapshot(model)
    bank, _ = full_bank(model)
    assert same(before, snapshot(model)) and not bank.installed
    assert bank.install() is bank and bank.installed
    up: Any = model.get_submodule("layers.0.up")
    assert (up.in_features, up.out_features, up.weight.shape, up.bias is up.base_layer.bias) == (32, 80, (80, 32), True)
    assert "in_features=32, out_features=80, capacity=6, max_rank=8" in repr(up)
    with pytest.raises(RuntimeError, match="lacks the adapter's update; call the layer"):
        functional.linear(torch.randn(1, 32), up.weight)
    with pytest.raises(NotImplementedError, match="BankLinear: its update cannot be merged"):
        merge(model)
    bank.forward(torch.randn(2, 3, WIDTH), adapters=["a", None])
    assert bank.remove() is model and not bank.installed
    assert same(before, snapshot(model))
    x = torch.randn(1, 3, WIDTH)
    first = bank.install().forward(x, adapters=["a"])
    bank.remove()
    assert torch.equal(bank.install().forward(x, adapters=["a"]), first), "adapters stay loaded"


def test_a_new_version_takes_the_place_of_the_old(model: nn.Module) -> None:
    bank, adapters = full_bank(model, capacity=5)
    bank.install()
    x = torch.randn(len(MIXED), 5, WIDTH)
    before = bank.forward(x, adapters=MIXED)
    places = [section.lora_a.data_ptr() for layer in bank.layers.values() for section in layer.sections]
    for seed in (50, 51, 52):  # more often than there are spare slots
        adapters["a"] = adapter(bank.remove(), seed, r=seed - 47, target_modules=["k", "up"])
        want = one_by_one(model, adapters, MIXED, x)
        bank.install().load("a", adapters["a"])
        after = bank.forward(x, adapters=MIXED)
        assert relative_error(after, want) < 2e-6
        for row, name in enumerate(MIXED):
            assert torch.equal(after[row], before[row]) == (name != "a")
    assert sorted(bank.names) == ["a", "b", "c", "d", "e"]
    now = [section.lora_a.data_ptr() for layer in bank.layers.values() for section in layer.sections]
    assert now == places, "nothing is allocated anew"


def _without(one: Adapter, key: str) -> Adapter:
    return replace(one, tensors={k: v for k, v in one.tensors.items() if k != key})


def _with(one: Adapter, key: str, value: Any) -> Adapter:
    return replace(one, tensors={**one.tensors, key: value})


Q_A, Q_B = "layers.0.q.lora_A.weight", "layers.0.q.lora_B.weight"
BAD: dict[str, tuple[Callable[[Adapter], Any], type[Exception], str]] = {
    "kind": (lambda one: 3, TypeError, r"adapter is a int; expected a directory, an Adapter or a mapping"),
    "folder": (lambda one: "/nowhere", FileNotFoundError, "no such file"),
    "mapping": (lambda one: one.tensors, TypeError, r"config is a NoneType; expected a LoRAConfig"),
    "layer": (
        lambda one: _with(one, "layers.9.q.lora_A.weight", torch.ones(4, 32)),
        ValueError, r"adapter 'a' has the layer 'layers.9.q', which the bank has not; it has layers.0.q, .*\.\.\.",
    ),
    "shape a": (
        lambda one: _with(one, Q_A, torch.ones(4, 31)),
        ValueError, r"'layers.0.q.lora_A.weight' of shape \(4, 31\); expected \(4, 32\)",
    ),
    "shape b": (
        lambda one: _with(one, Q_B, torch.ones(31, 4)),
        ValueError, r"'layers.0.q.lora_B.weight' of shape \(31, 4\); expected \(32, 4\)",
    ),
    "rank of the config": (
        lambda one: replace(one, config=replace(one.config, r=5)),
        ValueError, r"of shape \(4, 32\); expected \(5, 32\), by its config's rank",
    ),
    "max_rank": (
        lambda one: replace(one, config=replace(one.config, r=9)),
        ValueError, r"rank 9 on layers.0.q; expected at most max_rank, 8",
    ),
    "factor": (lambda one: _without(one, Q_B), ValueError, r"no 'layers.0.q.lora_B.weight', but the other factor"),
    "empty": (lambda one: replace(one, tensors={}), ValueError, r"adapter 'a' is empty"),
    "bias": (
        lambda one: _with(one, "layers.0.q.base_layer.bias", torch.ones(32)),
        ValueError, r"has 'layers.0.q.base_layer.bias'; expected only lora_A and lora_B",
    ),
    "nan": (
        lambda one: _with(one, Q_A, torch.full((4, 32), float("nan"))),
        ValueError, r"'layers.0.q.lora_A.weight' that are not finite in torch.float32",
    ),
    "overflow": (
        lambda one: _with(one, Q_A, torch.full((4, 32), 1e300, dtype=torch.float64)),
        ValueError, r"not finite in torch.float32",
    ),
    "dora": (
        lambda one: replace(one, config=replace(one.config, use_dora=True)),
        ValueError, r"use_dora=True; expected False",
    ),
    "pissa": (
        lambda one: replace(one, config=replace(one.config, init_lora_weights="pissa")),
        ValueError, r"init_lora_weights='pissa' and goes with another base weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_failed_load_leaves_the_bank_as_it_was(case: str, model: nn.Module) -> None:
    change, error, message = BAD[case]
    bad = change(adapter(model, 9))
    bank, _ = full_bank(model, lru=True, capacity=5)
    bank.install()
    x = torch.randn(len(MIXED), 5, WIDTH)
    before, names = bank.forward(x, adapters=MIXED), bank.names
    with pytest.raises(error, match=message):
        bank.load("a", bad)
    with pytest.raises(error):
        bank.load("new", bad)
    assert bank.names == names and torch.equal(bank.forward(x, adapters=MIXED), before)


def test_an_error_in_the_middle_of_copying_loses_nothing(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, _ = full_bank(model, lru=True, capacity=5)
    new = adapter(model, 9)
    bank.install()
    x = torch.randn(len(MIXED), 5, WIDTH)
    before, names = bank.forward(x, adapters=MIXED), bank.names
    written, write = [], _Factors.write

    def fail(self: _Factors, *args: Any) -> None:
        if len(written) == 3:
            raise MemoryError("no memory")
        written.append(self.name)
        write(self, *args)

    monkeypatch.setattr(_Factors, "write", fail)
    for name in ("a", "new"):
        written.clear()
        with pytest.raises(MemoryError):
            bank.load(name, new)
        assert len(written) == 3 and bank.names == names
        assert torch.equal(bank.forward(x, adapters=MIXED), before)
        names = bank.names
    monkeypatch.undo()
    bank.load("a", new)
    want = one_by_one(bank.remove(), {"a": new}, ["a"], x[:1])
    assert relative_error(bank.install().forward(x[:1], adapters=["a"]), want) < 2e-6


def test_a_mapping_needs_float_tensors_and_a_config_of_its_own(model: nn.Module) -> None:
    bank = AdapterBank(model, 2, 8, TARGETS)
    one = adapter(model, 0)
    with pytest.raises(TypeError, match=r"adapter has a torch.int64 for 'layers.0.q.lora_A.weight'"):
        bank.load("a", {**one.tensors, Q_A: torch.ones(4, 32, dtype=torch.int64)}, config=one.config)
    with pytest.raises(TypeError, match=r"adapter has a str for"):
        bank.load("a", {**one.tensors, Q_A: "x"}, config=one.config)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"config is given beside an adapter that has its own"):
        bank.load("a", one, config=one.config)
    for name in ("", None):
        with pytest.raises(TypeError, match=r"name is .*; expected a string that is not empty"):
            bank.load(name, one)  # type: ignore[arg-type]
    assert len(bank) == 0


def test_the_least_recently_used_goes_first(model: nn.Module) -> None:
    bank = AdapterBank(model, 3, 4, TARGETS, lru=True)
    adapters = {name: adapter(model, seed) for seed, name in enumerate("abcdefg")}
    bank.install()
    x = torch.randn(3, 3, WIDTH)
    for name in "abc":
        bank.load(name, adapters[name])
    assert bank.names == ("a", "b", "c")
    bank.forward(x[:2], adapters=["a", None])
    assert bank.names == ("b", "c", "a")
    bank.load("b", adapters["b"])  # another version counts as a use
    assert bank.names == ("c", "a", "b")
    bank.load("d", adapters["d"])
    assert bank.names == ("a", "b", "d") and "c" not in bank and "d" in bank and len(bank) == 3
    bank.pin("a")
    bank.load("e", adapters["e"], pin=True)
    assert bank.names == ("a", "d", "e") and bank.pinned == ("a", "e")
    bank.load("f", adapters["f"])
    assert bank.names == ("a", "e", "f")
    bank.pin("f")
    before = bank.forward(x, adapters=["a", "e", "f"])
    with pytest.raises(RuntimeError, match=r"capacity is 3, and all are pinned \(a, e, f\); unpin one"):
        bank.load("g", adapters["g"])
    bank.load("e", adapters["e"])  # a new version of what is pinned
    assert torch.equal(bank.forward(x, adapters=["a", "e", "f"]), before)
    assert bank.pinned == ("a", "e", "f")
    bank.unpin("f")
    bank.load("g", adapters["g"])
    assert bank.names == ("a", "e", "g") and bank.pinned == ("a", "e")
    want = one_by_one(bank.remove(), adapters, ["a", "e", "g"], x)
    assert relative_error(bank.install().forward(x, adapters=["a", "e", "g"]), want) < 2e-6


def test_a_full_bank_says_so(model: nn.Module) -> None:
    bank = AdapterBank(model, 2, 4, TARGETS)
    one = adapter(model, 0)
    bank.load("a", one)
    bank.load("b", one)
    with pytest.raises(RuntimeError, match=r"the bank is full, capacity is 2 \(a, b\); evict one, or make .* lru=True"):
        bank.load("c", one)
    assert bank.names == ("a", "b")
    bank.pin("b")
    with pytest.raises(ValueError, match=r"evict: name is 'b', which is pinned; unpin it first"):
        bank.evict("b")
    bank.evict("a")
    bank.load("c", one)
    assert bank.names == ("b", "c")
    for call in (bank.evict, bank.pin, bank.unpin):
        with pytest.raises(ValueError, match=rf"{call.__name__}: name has 'a', which is not loaded; loaded are: b, c"):
            call("a")


def test_memory(model: nn.Module) -> None:
    bank = AdapterBank(model, 3, 8, ["q", "up"])
    bank.load("a", adapter(model, 0, r=2, target_modules=["q"]))
    bank.load("b", adapter(model, 0, r=5, target_modules=["q", "up"]))
    report = bank.memory()
    per_rank = 2 * (32 + 32) * 4, 2 * (32 + 80) * 4  # two layers each, float32
    assert (report.adapters, report.capacity, report.layers) == (2, 3, 4)
    assert report.slot_bytes == 8 * sum(per_rank)
    assert report.total_bytes == 4 * report.slot_bytes
    assert report.used_bytes == 2 * per_rank[0] + 5 * sum(per_rank)
    assert str(report).startswith("2 of 3 adapters on 4 layers: 45,056 bytes")
    assert "names=['a', 'b']" in repr(bank)
    assert AdapterBank(model, 3, 8, ["q", "up"], dtype=torch.bfloat16).memory().total_bytes == report.total_bytes // 2


# ---- threads --------------------------------------------------------------------------------------------------------


def _in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start it; the result's function waits, and raises what it raised."""
    out: list[Any] = []

    def run() -> None:
        try:
            out.append((work(), None))
        except BaseException as error:
            out.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(30)
        assert out, "the thread hangs"
        if out[0][1] is not None:
            raise out[0][1]
        return out[0][0]

    return result


def test_swaps_while_others_run_never_mix_versions(model: nn.Module) -> None:
    """Every output is of one version, the same for both forward passes of a block."""
    versions = [adapter(model, seed) for seed in (0, 1)]
    bank = AdapterBank(model, 2, 4, TARGETS)
    bank.load("still", adapter(model, 2))
    bank.install()
    names: list[str | None] = ["swapped", "still", None, "swapped"]
    x = torch.randn(4, 5, WIDTH)
    expected = []
    for version in versions:
        bank.load("swapped", version)
        expected.append(bank.forward(x, adapters=names))
    assert not torch.equal(*expected)
    stop, counts = threading.Event(), [0, 0]

    def serve() -> None:
        while not stop.is_set():
            with torch.no_grad(), bank.use(names):
                first, second = model(x), model(x)
            version = next((i for i, want in enumerate(expected) if torch.equal(first, want)), None)
            assert version is not None, "factors of two versions in one forward pass"
            assert torch.equal(second, first), "another version in the same block"
            counts[version] += 1

    servers = [_in_thread(serve) for _ in range(3)]
    end, swaps = time.monotonic() + 2.0, 0
    while time.monotonic() < end or (min(counts) < 3 and time.monotonic() < end + 20):
        bank.load("swapped", versions[swaps % 2])
        swaps += 1
    stop.set()
    for result in servers:
        result()
    assert swaps > 10 and min(counts) >= 3, (swaps, counts)
    assert not any(bank._readers)


def test_threads_have_their_own_adapters(model: nn.Module) -> None:
    bank, _ = full_bank(model)
    bank.install()
    x = torch.randn(2, 5, WIDTH)
    want = {name: bank.forward(x, adapters=[name, None]) for name in VARIED}
    with torch.no_grad():
        base = model(x)
    barrier = threading.Barrier(len(VARIED) + 1, timeout=20)

    def serve(name: str | None) -> bool:
        for _ in range(5):
            if name is None:
                barrier.wait()
                with torch.no_grad():
                    assert torch.equal(model(x), base)
                continue
            with torch.no_grad(), bank.use([name, None]):
                barrier.wait()  # all are in their blocks now
                assert torch.equal(model(x), want[name])
        return True

    results = [_in_thread(lambda name=name: serve(name)) for name in (*VARIED, None)]
    assert all(result() for result in results)


def test_a_block_keeps_what_it_began_with(model: nn.Module) -> None:
    bank = AdapterBank(model, 1, 4, TARGETS, lru=True)
    versions = [adapter(model, seed) for seed in range(3)]
    bank.install()
    x = torch.randn(2, 5, WIDTH)
    expected = []
    for version in versions:
        bank.load("a", version)
        expected.append(bank.forward(x, adapters=["a", "a"]))
    bank.load("a", versions[0])
    inside, leave = threading.Event(), threading.Event()

    def serve() -> Tensor:
        with torch.no_grad(), bank.use(["a", "a"]):
            inside.set()
            assert leave.wait(20)
            return model(x)

    running = _in_thread(serve)
    assert inside.wait(20)
    bank.load("a", versions[1], timeout=0)  # into the spare slot, at once
    assert torch.equal(bank.forward(x, adapters=["a", "a"]), expected[1])
    with pytest.raises(TimeoutError, match=r"no slot became free in 0.05 s; running `use` blocks still read older"):
        bank.load("a", versions[2], timeout=0.05)
    with pytest.raises(TimeoutError):
        bank.load("b", versions[2], timeout=0.05)
    assert bank.names == ("a",) and torch.equal(bank.forward(x, adapters=["a", "a"]), expected[1])
    with pytest.raises(RuntimeError, match=r"remove: a forward pass is running in a `use` block"):
        bank.remove()
    waiting = _in_thread(lambda: bank.load("a", versions[2]))  # waits for the block to end
    time.sleep(0.05)
    assert torch.equal(bank.forward(x, adapters=["a", "a"]), expected[1])
    leave.set()
    assert torch.equal(running(), expected[0]), "the version from when the block began"
    waiting()
    assert torch.equal(bank.forward(x, adapters=["a", "a"]), expected[2])


def test_evicted_while_it_runs(model: nn.Module) -> None:
    bank = AdapterBank(model, 2, 4, TARGETS, lru=True)
    bank.load("a", adapter(model, 0))
    others = [adapter(model, seed) for seed in (1, 2)]
    bank.install()
    x = torch.randn(1, 5, WIDTH)
    want = bank.forward(x, adapters=["a"])
    with torch.no_grad(), bank.use(["a"]):
        bank.evict("a")
        for seed, other in enumerate(others):
            _in_thread(lambda name=f"n{seed}", other=other: bank.load(name, other, timeout=0))()
        assert bank.names == ("n0", "n1") and torch.equal(model(x), want)
    with pytest.raises(ValueError, match=r"adapters has 'a', which is not loaded; loaded are: n0, n1"):
        bank.forward(x, adapters=["a"])


# ---- wrong calls ----------------------------------------------------------------------------------------------------


def test_inference_only(model: nn.Module) -> None:
    bank, _ = full_bank(model)
    bank.install()
    model.train()
    x = torch.randn(1, 3, WIDTH)
    with bank.use(["a"]), pytest.raises(RuntimeError, match=r"for inference and has no gradient; .*torch.no_grad"):
        model(x)
    assert not bank.forward(x, adapters=["a"]).requires_grad
    assert model(x).requires_grad, "outside a block the model is its own"
    model.requires_grad_(False)
    with bank.use(["a"]):
        assert torch.equal(model(x), bank.forward(x, adapters=["a"]))
        with pytest.raises(RuntimeError, match="has no gradient"):
            model(x.clone().requires_grad_())


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_another_number_of_rows(count: int, model: nn.Module) -> None:
    bank, _ = full_bank(model)
    bank.install()
    names = ["a"] * count
    if not names:
        assert bank.forward(torch.randn(0, 3, WIDTH), adapters=[]).shape == (0, 7)
        return
    with pytest.raises(ValueError, match=rf"adapters has {count} entries, but .* shape \(2, 3, 32\)"):
        bank.forward(torch.randn(2, 3, WIDTH), adapters=names)
    assert not any(bank._readers)


def test_wrong_names_for_the_rows(model: nn.Module) -> None:
    bank, adapters = full_bank(model)
    x = torch.randn(2, 3, WIDTH)
    with pytest.raises(RuntimeError, match=r"use: the bank is not in the model; call install\(\) first"):
        bank.forward(x, adapters=["a", "a"])
    with pytest.raises(RuntimeError, match=r"remove: the bank is not in the model"):
        bank.remove()
    bank.install()
    with pytest.raises(ValueError, match=r"adapters has 'z', which is not loaded; loaded are: a, b, c, d, e"):
        bank.forward(x, adapters=["a", "z"])
    with pytest.raises(ValueError, match=r"adapters has \['a'\], which is not loaded"):
        bank.forward(x, adapters=[["a"], "a"])  # type: ignore[list-item]
    for wrong in ("aa", 3, None):
        with pytest.raises(TypeError, match=r"adapters is a \w+; expected a list of names"):
            bank.forward(x, adapters=wrong)  # type: ignore[arg-type]
    assert bank.names == ("a", "b", "c", "d", "e") and not any(bank._readers)
    with bank.use(["a", "a"]), pytest.raises(RuntimeError, match=r"load: called inside a `use` block of this bank"):
        bank.load("z", adapters["a"])


def test_wrong_banks(model: nn.Module) -> None:
    for name in ("capacity", "max_rank"):
        for value in (0, -1, 1.0, True):
            with pytest.raises(ValueError, match=rf"{name} is {value}; expected 1 or more"):
                AdapterBank(model, **{"capacity": 2, "max_rank": 2, name: value})
    with pytest.raises(TypeError, match=r"model is a str; expected a torch.nn.Module"):
        AdapterBank("model", 2, 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype is torch.int8; expected a floating-point dtype"):
        AdapterBank(model, 2, 2, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"target_modules is \['nothing'\], which matches no module"):
        AdapterBank(model, 2, 2, ["nothing"])
    with pytest.raises(ValueError, match=r"target_modules is \[\]; expected at least one name"):
        AdapterBank(model, 2, 2, [])
    with pytest.raises(TypeError, match=r"AdapterBank: layers.0: base_layer is a Block; expected a torch.nn.Linear"):
        AdapterBank(model, 2, 2, ["layers.0"])
    with pytest.raises(ValueError, match=r"model is itself a target, a Linear"):
        AdapterBank(nn.Linear(2, 2), 2, 2)
    with pytest.raises(ValueError, match=r"packed has 'qkv', which matches none of the target modules"):
        AdapterBank(model, 2, 2, ["q"], packed={"qkv": {"q": 32}})
    with pytest.raises(ValueError, match=r"packed has widths \[32, 16\] for layers.0.up; .* out_features, 80"):
        AdapterBank(model, 2, 2, ["up"], packed={"up": {"a": 32, "b": 16}})
    bank = AdapterBank(model, 2, 2, ["q"]).install()
    with pytest.raises(RuntimeError, match=r"install: it is installed already"):
        bank.install()
    with pytest.raises(ValueError, match=r"model has adapters already \(layers.0.q\); expected none"):
        AdapterBank(model, 2, 2, ["up"])
    with pytest.raises(TypeError, match=r"AdapterBank: it cannot be copied or pickled; remove\(\) it from the model"):
        copy.deepcopy(model)
    bank.remove()
    model.get_submodule("layers.1").q = nn.Linear(WIDTH, 32)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"install: layers.1.q of the model was replaced since the bank was made"):
        bank.install()
    assert same(before, snapshot(model))
