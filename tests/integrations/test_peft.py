"""PEFT's adapters on this library's kernels: every answer and every gradient against plain PEFT on the same weights."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import relative_error
from torch import Tensor, nn

import tlkernels
from tlkernels import ops
from tlkernels.integrations.peft import accelerate, register, restore
from tlkernels.nn import NF4Linear

peft = pytest.importorskip("peft")

# norm of the difference between two float32 sums, and between two results of bfloat16 layers one after another
LIMIT = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


class Net(nn.Module):
    """Two adapted layers, one without a bias, and a head."""

    def __init__(self, i: int = 32, j: int = 48, k: int = 24) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(i, j), nn.Linear(j, k, bias=False), nn.Linear(k, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


def config(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["a", "b"], "init_lora_weights": False, **options})


def adapted(base: nn.Module | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model((base or Net()).to(dtype), config(**options))


def inputs(rows: int = 6, features: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, features, generator=generator).to(dtype)


def answer(model: nn.Module, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Output and all gradients, for a gradient of the output in which no two elements are alike."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x, **kwargs)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    found = {"output": out.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(fast: dict[str, Tensor], plain: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    assert fast.keys() == plain.keys() and len(plain) > 2
    for name, value in plain.items():
        assert fast[name].dtype == value.dtype, name
        assert relative_error(fast[name], value) <= LIMIT[dtype], (name, relative_error(fast[name], value))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that ran, in order: equal answers would otherwise prove nothing."""
    ran: list[str] = []
    for name in ("lora_linear", "lora_linear_grouped", "nf4_linear", "dora_weight_norm"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name), ran))
    return ran


def counted(name: str, op: Callable[..., Any], ran: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        ran.append(name)
        return op(*args, **kwargs)

    return call


def pair(model: Any) -> tuple[Any, Any]:
    """The model as PEFT made it, and an accelerated copy."""
    fast = copy.deepcopy(model)
    done = accelerate(fast)
    assert done.changed and not done.left
    return model, fast


# ---- what PEFT documents --------------------------------------------------------------------------------------------

CONFIGS = {
    "lora": {"lora_alpha": 6},
    "patterns": {"lora_alpha": 5, "rank_pattern": {"a": 7}, "alpha_pattern": {"b": 1}},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "bias of the adapter": {"target_modules": ["a", "b", "head"], "lora_bias": True, "lora_alpha": 3},
    "biases train": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["head"]},
    "dora": {"use_dora": True, "lora_alpha": 3},
    "dora, patterns": {"use_dora": True, "rank_pattern": {"a": 7}, "use_rslora": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_configurations(options: dict[str, Any], dtype: torch.dtype, kernels: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: a lora_bias on a layer without bias cannot be merged
        plain, fast = pair(adapted(dtype=dtype, **options))
    x = inputs(dtype=dtype)
    if options.get("lora_bias") or options.get("use_dora"):
        for name, p in (*plain.named_parameters(), *fast.named_parameters()):
            if "magnitude" in name or "lora_B.default.bias" in name:
                p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) / 4
    expected = answer(plain, x)
    kernels.clear()
    assert_same(answer(fast, x), expected, dtype)
    assert kernels.count("lora_linear") == (3 if "head" in options.get("target_modules", ()) else 2)
    assert kernels.count("dora_weight_norm") == (2 if options.get("use_dora") else 0)


def test_frozen_weights_have_no_gradient() -> None:
    _, fast = pair(adapted())
    assert {n.split(".")[-3] for n in answer(fast, inputs()) if n not in ("output", "x")} == {"lora_A", "lora_B"}


def test_a_base_that_trains() -> None:
    plain, fast = pair(adapted())
    for model in (plain, fast):
        model.requires_grad_(True)
    assert "base_model.model.a.base_layer.weight" in answer(fast, inputs())
    assert_same(answer(fast, inputs()), answer(plain, inputs()))


def several(second: dict[str, Any] | None = None, **first: Any) -> Any:
    model = adapted(lora_alpha=6, **first)
    model.add_adapter("second", config(**{"r": 3, "lora_alpha": 7, **(second or {})}))
    model.add_adapter("third", config(r=2, lora_alpha=4, target_modules=["b"]))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("active", [["default", "second"], ["second", "default", "third"], ["third"], ["second"]])
def test_several_active_adapters(active: list[str], dtype: torch.dtype, kernels: list[str]) -> None:
    plain, fast = pair(several(dtype=dtype))
    for model in (plain, fast):
        model.base_model.set_adapter(active)
    kernels.clear()
    assert_same(
        answer(
            fast,
            inputs(dtype=dtype),
        ),
        answer(plain, inputs(dtype=dtype)),
        dtype,
    )
    assert kernels == ["lora_linear"] * (1 if active == ["third"] else 2)  # one product for all that are active


def test_several_with_equal_scaling_and_biases() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(lora_alpha=4, target_modules=["a"], lora_bias=True)
        model.add_adapter("second", config(r=2, lora_alpha=2, target_modules=["a"], lora_bias=True))
    plain, fast = pair(model)
    for m in (plain, fast):
        m.base_model.set_adapter(["default", "second"])
    found = answer(fast, inputs())
    assert sum(name.endswith("bias") for name in found) == 2
    assert_same(found, answer(plain, inputs()))


@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]])
def test_dora_beside_another_adapter_is_peft_s(order: list[str], kernels: list[str]) -> None:
    model = several(second={"use_dora": True})
    done = accelerate(fast := copy.deepcopy(model))
    assert list(done.partly.values()) == ["PEFT's forward where a DoRA adapter is active together with another"] * 2
    for m in (model, fast):
        m.base_model.set_adapter(order)
    kernels.clear()
    assert_same(answer(fast, inputs()), answer(model, inputs()))
    assert "lora_linear" not in kernels


def test_disable_adapter() -> None:
    plain, fast = pair(several(modules_to_save=["head"]))
    for model in (plain, fast):
        model.base_model.model.head.modules_to_save["default"].weight.data.mul_(2)
    with fast.disable_adapter(), plain.disable_adapter():
        off = fast(inputs())
        assert torch.equal(off, plain(inputs()))
    assert_same(answer(fast, inputs()), answer(plain, inputs()))
    assert relative_error(off, fast(inputs())) > 0.1


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(safe: bool, dora: bool) -> None:
    plain, fast = pair(adapted(use_dora=dora, lora_alpha=6))
    before, x = fast(inputs()).detach(), inputs()
    for model in (plain, fast):
        model.merge_adapter(safe_merge=safe)
    assert torch.equal(fast(x), plain(x)) and relative_error(fast(x), before) < 1e-5
    with fast.disable_adapter():  # unmerges, as PEFT does
        off = fast(x)
    assert not fast.base_model.model.a.merged and relative_error(off, before) > 0.1
    assert relative_error(fast(x), before) < 1e-5
    merged = fast.merge_and_unload(safe_merge=safe)
    assert type(merged.a) is nn.Linear and relative_error(merged(x), before) < 1e-5


def test_merge_refuses_nan() -> None:
    _, fast = pair(adapted())
    fast.base_model.model.b.lora_A["default"].weight.data[1, 2] = float("nan")
    weight = fast.base_model.model.b.base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        fast.merge_adapter(safe_merge=True)
    assert torch.equal(fast.base_model.model.b.base_layer.weight, weight)


def test_adapters_come_and_go() -> None:
    model = adapted(lora_alpha=6)
    plain, fast = pair(model)
    for m in (plain, fast):
        torch.manual_seed(4)
        m.add_adapter("late", config(r=5, lora_alpha=1))
        m.set_adapter("late")
    assert_same(answer(fast, inputs()), answer(plain, inputs()))
    for m in (plain, fast):
        m.add_weighted_adapter(["default", "late"], [0.3, 0.7], "mix", combination_type="cat")
        m.set_adapter("mix")
        m.delete_adapter("default")
    assert_same(answer(fast, inputs()), answer(plain, inputs()))
    base = fast.unload()
    assert type(base.a) is nn.Linear
    with plain.disable_adapter():
        assert torch.equal(base(inputs()), plain(inputs()))


def test_an_adapter_on_new_layers_needs_a_second_call(kernels: list[str]) -> None:
    model = adapted(target_modules=["a"])
    accelerate(model)
    model.add_adapter("wide", config(target_modules=["a", "b"]))
    model.set_adapter("wide")
    kernels.clear()
    before = answer(model, inputs())
    assert kernels == ["lora_linear"]
    done = accelerate(model)
    assert done.changed == ("base_model.model.b",) and done.already == ("base_model.model.a",)
    assert_same(answer(model, inputs()), before)
    assert kernels.count("lora_linear") == 3


def test_scale_layers() -> None:
    plain, fast = pair(adapted())
    for model in (plain, fast):
        for layer in (model.base_model.model.a, model.base_model.model.b):
            layer.scale_layer(0.25)
    assert_same(answer(fast, inputs()), answer(plain, inputs()))


def test_save_and_load(tmp_path: Path) -> None:
    plain, fast = pair(several(modules_to_save=["head"]))
    fast.save_pretrained(tmp_path / "fast")
    plain.save_pretrained(tmp_path / "plain")
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "fast")
    assert accelerate(again).changed
    again.load_adapter(tmp_path / "fast" / "second", "second")
    for model in (again, fast, plain):
        model.eval()
    assert torch.equal(again(inputs()), fast(inputs()))
    again.set_adapter("second")
    fast.set_adapter("second")
    assert torch.equal(again(inputs()), fast(inputs()))
    for file in sorted((tmp_path / "plain").rglob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "fast" / file.relative_to(tmp_path / "plain")).read_bytes()


# ---- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_autocast(dora: bool) -> None:
    plain, fast = pair(adapted(use_dora=dora, lora_alpha=6))
    found, expected = [], []
    for model, results in ((plain, expected), (fast, found)):
        x = inputs().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        results += [out, x.grad, *grads]
    assert found[0].dtype == torch.bfloat16 and len(found) == (8 if dora else 6)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype and relative_error(f, e) < LIMIT[torch.bfloat16]


@pytest.mark.parametrize("active", [["default"], ["default", "second"]])
@pytest.mark.parametrize("bnb", [False, True])
def test_autocast_of_4_bits(bnb: bool, active: list[str], kernels: list[str]) -> None:
    if bnb:
        plain, fast = pair(several_on(net4bit()))
    else:
        plain, fast = nf4_net(lora_alpha=6)
        for model in (plain, fast):
            torch.manual_seed(5)
            model.add_adapter("second", config(r=3, lora_alpha=7))
    for model in (plain, fast):
        model.train().base_model.set_adapter(active)
    x = inputs(features=64 if bnb else 32)
    names = ["default", "__base__", "second", "default", "second", "__base__"]
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = answer(plain, x), answer(fast, x)
        assert_same(found, expected, torch.bfloat16)
        with torch.no_grad():
            kernels.clear()
            mixed = fast.eval()(x, adapter_names=names)
            assert kernels == ["lora_linear_grouped"] * 2
            for i, name in enumerate(names):
                if name != "__base__":
                    fast.set_adapter(name)
                with fast.disable_adapter() if name == "__base__" else contextlib.nullcontext():
                    assert relative_error(mixed[i], fast(x)[i]) < LIMIT[torch.bfloat16]
    assert found["output"].dtype == mixed.dtype == torch.bfloat16


def test_adapters_in_bfloat16() -> None:
    plain, fast = pair(several(dtype=torch.bfloat16).to(torch.bfloat16))
    for model in (plain, fast):
        model.base_model.set_adapter(["default", "second"])
    exact = copy.deepcopy(plain).float()  # PEFT rounds every product to bfloat16: hold both against float32
    reference, x = answer(exact, inputs()), inputs(dtype=torch.bfloat16)
    ours, theirs = answer(fast, x), answer(plain, x)
    for name, value in reference.items():
        error = relative_error(ours[name], value)
        assert ours[name].dtype == theirs[name].dtype == torch.bfloat16
        assert error <= 1.1 * relative_error(theirs[name], value) + 1e-3, (name, error)


def test_mixed_dtypes_are_torch_s_error() -> None:
    plain, fast = pair(adapted())
    messages = []
    for model in (plain, fast):
        with pytest.raises(RuntimeError) as error:
            model(inputs(dtype=torch.bfloat16))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


# ---- dropout --------------------------------------------------------------------------------------------------------


def test_eval_draws_no_random_numbers_and_drops_nothing() -> None:
    plain, fast = pair(adapted(lora_dropout=0.5))
    plain.eval(), fast.eval()
    state = torch.get_rng_state()
    assert_same(answer(fast, inputs()), answer(plain, inputs()))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_dropout_draws_no_random_numbers_in_training() -> None:
    _, fast = pair(adapted())
    state = torch.get_rng_state()
    answer(fast.train(), inputs())
    assert torch.equal(torch.get_rng_state(), state)


class Mask(nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, mask: Tensor, p: float) -> None:
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask.view(x.shape) / (1 - self.p)


def test_dropout_is_peft_s_with_the_op_s_mask() -> None:
    p = 0.25
    plain, fast = pair(adapted(lora_dropout=p, lora_alpha=6))
    torch.manual_seed(5)
    found = answer(fast, inputs())
    torch.manual_seed(5)
    for name, width in (("a", 32), ("b", 48)):
        rng = torch.randint(2**63 - 1, (2,), dtype=torch.int64)
        mask = ops.lora_dropout_mask(rng, 18, width, p)
        assert 0.6 < mask.float().mean() < 0.9
        getattr(plain.base_model.model, name).lora_dropout["default"] = Mask(mask, p)
    assert_same(found, answer(plain, inputs()))
    torch.manual_seed(6)
    assert relative_error(answer(fast, inputs())["output"], found["output"]) > 0.01


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    model = peft.get_peft_model(nn.ModuleDict({"a": layer}), config(target_modules=["a"], lora_dropout=0.3))
    accelerate(model)
    x = torch.randn(64)
    torch.manual_seed(7)
    draws = model.base_model.model["a"](x.expand(4000, 64)).detach()
    exact = model.eval().base_model.model["a"](x).detach()
    update = model.base_model.model["a"].get_delta_weight("default").detach()
    deviation = (update.square() @ x.square() * (0.3 / 0.7)).sqrt()
    assert ((draws.mean(0) - exact).abs() < 5 * deviation / 4000**0.5).all()
    assert ((draws.std(0) / deviation - 1).abs() < 0.06).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_with_dropout_is_peft_s_for_the_same_seed(dtype: torch.dtype, kernels: list[str]) -> None:
    plain, fast = pair(adapted(use_dora=True, lora_dropout=0.3, lora_alpha=6, dtype=dtype))
    x = inputs(dtype=dtype)
    torch.manual_seed(8)
    expected = answer(plain, x)
    torch.manual_seed(8)
    kernels.clear()
    found = answer(fast, x)
    assert kernels.count("lora_linear") == 2
    assert_same(found, expected, dtype)
    assert relative_error(fast.eval()(x), found["output"]) > 0.02


def test_several_with_different_dropouts(kernels: list[str]) -> None:
    plain, fast = pair(several(second={"lora_dropout": 0.5}, lora_dropout=0.25))
    for model in (plain, fast):
        model.base_model.set_adapter(["default", "second", "third"])
        model.base_model.model.b.lora_dropout["second"] = Mask(torch.arange(18 * 48) % 3 != 0, 0.5)
    kernels.clear()
    layer = fast.base_model.model.a
    x = inputs()
    torch.manual_seed(9)
    found = layer(x)
    assert kernels == ["lora_linear"]
    torch.manual_seed(9)
    mask = ops.lora_dropout_mask(torch.randint(2**63 - 1, (2,)), 18, 32, 0.25).view(x.shape)
    other = layer.lora_dropout["second"](x)  # torch's own, drawn after the op's
    first = (x * mask / 0.75) @ layer.get_delta_weight("default").T
    expected = layer.base_layer(x) + first + other @ layer.get_delta_weight("second").T
    assert relative_error(found, expected) < LIMIT[torch.float32]
    # a dropout module that is not torch's is PEFT's to call
    kernels.clear()
    fast.base_model.model.b(torch.randn(6, 3, 48))
    assert not kernels
    # where one adapter has no dropout, it goes with the base
    fast.base_model.model.b.lora_dropout["second"] = nn.Dropout(0.5)
    fast.base_model.model.b(torch.randn(6, 3, 48)).sum().backward()
    assert kernels == ["lora_linear"]


def test_all_of_it_dropped_is_peft_s(kernels: list[str]) -> None:
    _, fast = pair(adapted())
    fast.base_model.model.a.lora_dropout["default"] = nn.Dropout(1.0)
    fast.base_model.model.a(inputs())
    assert not kernels


# ---- mixed batches --------------------------------------------------------------------------------------------------

NAMES = ["second", "__base__", "third", "default", "second", "__base__"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_batch(dtype: torch.dtype, kernels: list[str]) -> None:
    plain, fast = pair(several(dtype=dtype))
    x = inputs(dtype=dtype)
    kernels.clear()
    with torch.no_grad():
        found = fast.eval()(x, adapter_names=NAMES)
    assert kernels == ["lora_linear_grouped"] * 2
    assert relative_error(found, plain.eval()(x, adapter_names=NAMES)) < LIMIT[dtype]
    for i, name in enumerate(NAMES):
        if name == "__base__":
            with fast.disable_adapter():
                alone = fast(x[i : i + 1])
        else:
            fast.set_adapter(name)
            alone = fast(x[i : i + 1])
        assert relative_error(found[i : i + 1], alone) < LIMIT[dtype], name
    base = fast(x, adapter_names=["__base__"] * 6)
    with plain.disable_adapter():
        assert torch.equal(base, plain(x))


def test_mixed_batch_gradients() -> None:
    plain, fast = pair(several())
    for model in (plain, fast):
        model.base_model.set_adapter(["default", "second", "third"])
        model.eval()
    assert_same(answer(fast, inputs(), adapter_names=NAMES), answer(plain, inputs(), adapter_names=NAMES))


def test_mixed_batch_errors_are_peft_s() -> None:
    _, fast = pair(several())
    fast.eval()
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        fast(inputs(), adapter_names=["default"])
    with pytest.raises(ValueError, match="non-existing adapter"):
        fast(inputs(), adapter_names=["nobody"] * 6)
    fast.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        fast(inputs(), adapter_names=NAMES)
    _, dora = pair(adapted(use_dora=True))
    with pytest.raises(ValueError, match="when DoRA is enabled"):
        dora.eval()(inputs(), adapter_names=["default"] * 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_batch_with_a_bias(dtype: torch.dtype) -> None:
    model = several(lora_bias=True, target_modules=["a"], second={"target_modules": ["a"]}, dtype=dtype)
    model.base_model.model.a.lora_B["default"].bias.data.fill_(2.0)
    plain, fast = pair(model)
    for m in (plain, fast):
        m.base_model.set_adapter(["default", "second"])
        m.eval()
    x = inputs(dtype=dtype)
    assert_same(answer(fast, x, adapter_names=NAMES), answer(plain, x, adapter_names=NAMES), dtype)


def test_mixed_batch_with_dropout_that_is_on() -> None:
    _, fast = pair(several(lora_dropout=0.5))
    layer = fast.train().base_model.model.a
    torch.manual_seed(3)
    found = layer(inputs(), adapter_names=NAMES)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(inputs()[3], 0.5)
    expected = layer.base_layer(inputs()[3]) + dropped @ layer.get_delta_weight("default").T
    assert relative_error(found[3].detach(), expected.detach()) < 1e-6


# ---- transformers models --------------------------------------------------------------------------------------------


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes))
    return peft.get_peft_model(model, config(target_modules=["q_proj", "v_proj", "down_proj"], **options))


def learn(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(dropout: float, reentrant: bool) -> None:
    plain, fast = pair(llama(lora_alpha=8, lora_dropout=dropout))
    ids = torch.randint(64, (3, 7), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    direct = learn(fast.train(), ids)
    fast.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    fast.enable_input_require_grads()
    torch.manual_seed(3)
    recomputed = learn(fast, ids)
    for name, value in direct.items():
        assert torch.equal(recomputed[name], value), name  # the masks too
    if not dropout:
        assert_same(recomputed, learn(plain, ids))


def test_generate_and_mixed_generate() -> None:
    model = llama(lora_alpha=32)
    model.add_adapter("second", config(r=2, lora_alpha=40, target_modules=["q_proj", "v_proj", "down_proj"]))
    plain, fast = pair(model.eval())
    ids = torch.randint(64, (3, 5), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(input_ids=ids, **options), plain.generate(input_ids=ids, **options))
    names = ["second", "__base__", "default"]
    mixed = fast.generate(input_ids=ids, adapter_names=names, **options)
    assert torch.equal(mixed, plain.generate(input_ids=ids, adapter_names=names, **options))
    assert not torch.equal(mixed, fast.generate(input_ids=ids, **options))


# ---- bitsandbytes ---------------------------------------------------------------------------------------------------


def net4bit(**options: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    net = Net(64, 128, 64)  # bitsandbytes decodes rows that are no multiple of a block wrongly on a CPU
    for name in ("a", "b"):
        dense = getattr(net, name)
        kind = {"quant_type": "nf4", "compress_statistics": True, **options}
        layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, dense.bias is not None, **kind)
        layer.load_state_dict(dense.state_dict())
        setattr(net, name, layer.to("cpu"))
    net.is_loaded_in_4bit = True
    return net


FOUR_BIT = {
    "nf4": {},
    "fp4, float32 scales": {"quant_type": "fp4", "compress_statistics": False},
    "bfloat16": {"compute_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("kind", FOUR_BIT.values(), ids=FOUR_BIT.keys())
@pytest.mark.parametrize("dora", [False, True])
def test_bitsandbytes(kind: dict[str, Any], dora: bool, kernels: list[str]) -> None:
    plain, fast = pair(adapted(net4bit(**kind), use_dora=dora, lora_alpha=6))
    layer = fast.base_model.model.a
    assert type(layer) is peft.tuners.lora.Linear4bit
    data, state = layer.base_layer.weight.data, layer.base_layer.weight.quant_state
    weights = []
    original = ops.lora_linear
    ops.lora_linear = lambda x, weight, *rest, **options: (
        weights.append(weight) or original(x, weight, *rest, **options)
    )
    found = answer(fast.train(), inputs(features=64))
    ops.lora_linear = original
    assert weights[0].packed.data_ptr() == data.data_ptr() and weights[0].absmax is state.absmax  # not copied
    dtype = torch.bfloat16 if kind.get("compute_dtype") else torch.float32
    assert_same(found, answer(plain.train(), inputs(features=64)), dtype)
    assert found["output"].dtype == torch.float32


def test_bitsandbytes_in_eval_mode_is_not_repacked() -> None:
    _, fast = pair(several_on(net4bit()))
    fast.eval()
    training = fast.train()(inputs(features=64)).detach()
    with torch.no_grad():
        fast.eval()
        assert torch.equal(fast(inputs(features=64)), training)
        with fast.disable_adapter():
            off = fast(inputs(features=64))
        mixed = fast(
            inputs(features=64), adapter_names=["default", "__base__", "second", "default", "second", "__base__"]
        )
    assert not getattr(fast.base_model.model.a.base_layer.weight.quant_state, "packing_format_for_cpu", False)
    assert relative_error(mixed[0], training[0]) < 1e-6 and relative_error(mixed[1], off[1]) < 1e-6
    fast.set_adapter("second")
    assert relative_error(mixed[4], fast(inputs(features=64))[4]) < 1e-6


def several_on(base: nn.Module) -> Any:
    model = adapted(base, lora_alpha=6)
    model.add_adapter("second", config(r=3, lora_alpha=7))
    return model


def test_bitsandbytes_mixed_batch_with_gradients() -> None:
    plain, fast = pair(several_on(net4bit()))
    names = ["default", "__base__", "second", "default", "second", "__base__"]
    layer, other = (model.train().base_model.model.a for model in (fast, plain))
    found = answer(layer, inputs(features=64), adapter_names=names)
    # PEFT's own raises here: it adds in place to what a custom autograd.Function returned
    other.base_layer.register_forward_hook(lambda module, args, out: out.clone())
    assert_same(found, answer(other, inputs(features=64), adapter_names=names))


def test_bitsandbytes_merge() -> None:
    plain, fast = pair(several_on(net4bit()))
    before = fast(inputs(features=64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rounding
        fast.merge_adapter()
        merged = fast(inputs(features=64))
        plain.merge_adapter()
        assert relative_error(merged, plain(inputs(features=64))) < 1e-5 < relative_error(merged, before) < 0.5
        for model in (plain, fast):
            model.unmerge_adapter()
    assert_same(answer(fast, inputs(features=64)), answer(plain, inputs(features=64)))


def test_bitsandbytes_repacked_or_not_yet_quantized_is_left(kernels: list[str]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = adapted(net4bit())
    fresh = copy.deepcopy(model)
    fresh.base_model.model.a.base_layer = bnb.nn.Linear4bit(64, 128, quant_type="nf4")
    done = accelerate(fresh)
    assert done.changed == ("base_model.model.b",)
    assert "has not quantized its weight yet" in done.left["base_model.model.a"]
    # what bitsandbytes does in eval mode on a CPU with bfloat16 products, while a layer is accelerated or before
    accelerate(model)
    model.base_model.model.a.base_layer.weight.quant_state.packing_format_for_cpu = True
    called: list[str] = []
    model.base_model.model.a.base_layer.forward = lambda x: called.append("base") or x.new_zeros(*x.shape[:-1], 128)
    model(inputs(features=64))
    assert called == ["base"] and kernels == ["lora_linear"]
    restore(model)
    del model.base_model.model.a.base_layer.forward
    assert "repacked its weight" in accelerate(model).left["base_model.model.a"]


# ---- NF4Linear ------------------------------------------------------------------------------------------------------


def nf4_net(**options: Any) -> tuple[Any, Any]:
    """An adapted 4-bit model, and PEFT's own on the dense weights that the 4 bits stand for."""
    torch.manual_seed(0)
    net = tlkernels.quantize_model(Net(), skip=["head"])
    dense = copy.deepcopy(net)
    for name in ("a", "b"):
        layer = getattr(net, name)
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.load_state_dict(
            {"weight": layer.dequantize()} | ({} if layer.bias is None else {"bias": layer.bias.data})
        )
        setattr(dense, name, linear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        four = peft.get_peft_model(net, register(config(**options)))
        plain = peft.get_peft_model(dense, config(**options))
    result = plain.load_state_dict({k: v for k, v in four.state_dict().items() if "lora_" in k}, strict=False)
    assert not result.unexpected_keys
    return plain, four


@pytest.mark.parametrize("options", [
    {}, {"rank_pattern": {"a": 7}, "use_rslora": True}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.3},
    {"lora_bias": True, "target_modules": ["a"]},
])  # fmt: skip
def test_nf4_linear(options: dict[str, Any], kernels: list[str]) -> None:
    plain, four = nf4_net(**{"lora_alpha": 6, **options})
    assert type(four.base_model.model.a.base_layer) is NF4Linear
    torch.manual_seed(3)
    expected = answer(plain, inputs())
    torch.manual_seed(3)
    kernels.clear()
    found = answer(four, inputs())
    assert_same(found, expected)
    assert kernels.count("lora_linear") == len(config(**options).target_modules)
    done = accelerate(four)
    assert not done.changed and len(done.already) == len(config(**options).target_modules) and not done.left


@pytest.mark.parametrize("order", [["default", "dora", "more"], ["dora", "default"], ["more", "default"]])
def test_nf4_linear_several(order: list[str]) -> None:
    plain, four = nf4_net(lora_alpha=6)
    for model in (plain, four):
        torch.manual_seed(5)
        model.add_adapter("dora", config(r=3, use_dora=True))
        model.add_adapter("more", config(r=2, lora_alpha=8))
    for model in (plain, four):
        model.base_model.set_adapter(order)
    assert_same(answer(four, inputs()), answer(plain, inputs()))
    names = ["default", "more", "__base__", "default", "more", "more"]
    for model in (plain, four):
        model.eval()
    with torch.no_grad():
        assert relative_error(four(inputs(), adapter_names=names), plain(inputs(), adapter_names=names)) < 3e-6


@pytest.mark.parametrize("dora", [False, True])
def test_nf4_linear_merge(dora: bool) -> None:
    plain, four = nf4_net(lora_alpha=2, use_dora=dora)
    for model in (plain, four):
        torch.manual_seed(5)
        model.add_adapter("second", config(r=3, lora_alpha=1))
        model.base_model.set_adapter(["default", "second"])
    layer = four.base_model.model.a
    codes, before = layer.base_layer.packed.clone(), four(inputs()).detach()
    four.merge_adapter(safe_merge=True)
    plain.merge_adapter()
    once = ops.nf4_quantize(plain.base_model.model.a.base_layer.weight, double_quant=True)
    assert float((once.packed != layer.base_layer.packed).float().mean()) < 0.01  # sums of another order
    assert 1e-3 < relative_error(four(inputs()), before) < 0.5 and layer.merged
    four.unmerge_adapter()
    assert torch.equal(layer.base_layer.packed, codes) and torch.equal(four(inputs()), before)
    # one after the other is the same as both at once
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    assert torch.equal(layer.base_layer.packed, once.packed) or layer.merged_adapters == ["default", "second"]
    with pytest.warns(UserWarning, match="Already unmerged"):
        four.base_model.model.b.unmerge()
    layer.unmerge()
    merged = four.merge_and_unload()
    assert type(merged.a) is NF4Linear and relative_error(merged(inputs()), before) < 0.5


def test_nf4_linear_merge_of_a_bias_and_of_nan() -> None:
    _, four = nf4_net(lora_alpha=2, lora_bias=True, target_modules=["a"])
    layer = four.base_model.model.a
    layer.lora_B["default"].bias.data.fill_(3.0)
    bias, codes = layer.base_layer.bias.detach().clone(), layer.base_layer.packed.clone()
    four.merge_adapter()
    assert torch.allclose(layer.base_layer.bias, bias + 1.5)
    four.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, bias)
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        four.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.packed, codes) and not layer.merged
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            tlkernels.quantize_model(Net(), skip=["head"]), register(config(lora_bias=True, target_modules=["b"]))
        )
    with pytest.raises(RuntimeError, match="the base layer has no bias"):
        model.merge_adapter()


def test_nf4_linear_saves_and_loads(tmp_path: Path) -> None:
    _, four = nf4_net(use_dora=True)
    four.base_model.model.a.lora_magnitude_vector["default"].weight.data *= 1.5
    four.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = tlkernels.quantize_model(Net(), skip=["head"])
    with pytest.raises(ValueError, match=r"Target module NF4Linear.* is not supported"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    torch.manual_seed(0)
    base = tlkernels.quantize_model(Net(), skip=["head"])
    again = peft.PeftModel.from_pretrained(base, tmp_path, config=register(peft.LoraConfig.from_pretrained(tmp_path)))
    assert torch.equal(again(inputs()), four(inputs()))
    again.load_adapter(tmp_path, "copy", low_cpu_mem_usage=True)  # on layers that are wrapped already
    again.set_adapter("copy")
    assert torch.equal(again(inputs()), four(inputs()))


def test_all_linear() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    tlkernels.quantize_model(model, skip=["up_proj", "lm_head"])
    with pytest.raises(ValueError, match="give register the model too"):
        register(config(target_modules="all-linear"))
    named = register(config(target_modules="all-linear"), model)
    assert len(named.target_modules) == 7 and not any("lm_head" in n for n in named.target_modules)
    done = accelerate(peft.get_peft_model(model, named))
    assert [n.split(".")[-1] for n in done.changed] == ["up_proj"] and len(done.already) == 6


@pytest.mark.parametrize(("wrong", "message"), [
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which decomposes a dense weight"),
    ({"use_bdlora": None, "alora_invocation_tokens": [1]}, "Invalid or unsupported variant combination"),
])  # fmt: skip
def test_what_nf4_linear_refuses(wrong: dict[str, Any], message: str) -> None:
    model = tlkernels.quantize_model(Net(), skip=["head"])
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, register(config(**wrong)))


# ---- the report, and undoing it -------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Layers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.linear, self.conv, self.table = nn.Linear(8, 8), nn.Conv2d(3, 4, 1), nn.Embedding(5, 8)
        self.turned, self.mine, self.replaced = Conv1D(8, 8), Mine(8, 8), nn.Linear(8, 8)
        self.hooked, self.integers = nn.Linear(8, 8), nn.Linear(8, 8)


class Mine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def odd() -> Any:
    names = ["linear", "conv", "table", "turned", "mine", "replaced", "hooked", "integers"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT, of fan_in_fan_out
        model = peft.get_peft_model(Odd(), config(target_modules=names))
    return model


def test_report() -> None:
    model = odd()
    inner = model.base_model.model
    inner.replaced.forward = lambda x: x
    inner.hooked.base_layer.register_forward_hook(lambda *_: None)
    inner.integers.base_layer.weight = nn.Parameter(inner.integers.base_layer.weight.to(torch.float8_e4m3fn), False)
    done = accelerate(model)
    prefix = "base_model.model."
    assert done.changed == (prefix + "linear", prefix + "hooked") and not done.already
    reasons = {name.removeprefix(prefix): why for name, why in done.left.items()}
    assert reasons == {
        "conv": "a lora.Conv2d; expected lora.Linear or lora.Linear4bit",
        "table": "a lora.Embedding; expected lora.Linear or lora.Linear4bit",
        "turned": "its weight is transposed (fan_in_fan_out, Conv1D)",
        "mine": "its base layer is a Mine; expected torch.nn.Linear, NF4Linear or bitsandbytes' Linear4bit",
        "replaced": "its forward was replaced",
        "integers": "its base layer's weight has dtype float8_e4m3fn",
    }
    assert list(done.partly) == [prefix + "hooked"]
    assert str(done).splitlines()[0] == "Accelerated: 2 changed, 0 already, 6 left"
    assert f"  left {prefix}conv: a lora.Conv2d" in str(done)
    other = adapted(Net(), target_modules=["a"])
    other.add_adapter("arrow", config(alora_invocation_tokens=[1], target_modules=["a"]))
    assert list(accelerate(other).partly.values()) == ["PEFT's forward where arrow (ALoraLinearVariant) is active"]
    only = adapted(Net(), target_modules=["a"], alora_invocation_tokens=[1])
    assert list(accelerate(only).left.values()) == [
        "its adapters are of a variant without a kernel: default (ALoraLinearVariant)"
    ]
    ia3 = peft.get_peft_model(Net(), peft.IA3Config(target_modules=["a"], feedforward_modules=[]))
    assert list(accelerate(ia3).left.values()) == ["a ia3.Linear; expected lora.Linear or lora.Linear4bit"]


def test_idempotent_and_restored_wholly(kernels: list[str]) -> None:
    model = adapted()
    before, attributes = model(inputs()), [dict(vars(m)) for m in model.modules()]
    state = model.state_dict()
    first, second = accelerate(model), accelerate(model)
    assert len(first.changed) == 2 and not second.changed and second.already == first.changed
    assert model.state_dict().keys() == state.keys()
    model(inputs())
    assert kernels == ["lora_linear"] * 2
    second.restore()  # changed nothing, so undoes nothing
    model(inputs())
    assert len(kernels) == 4
    first.restore()
    first.restore()
    assert torch.equal(model(inputs()), before) and len(kernels) == 4
    assert [dict(vars(m)) for m in model.modules()] == attributes
    with accelerate(model) as done:
        assert len(done.changed) == 2
        model(inputs())
        assert len(kernels) == 6
        with accelerate(model):
            pass
        model(inputs())
        assert len(kernels) == 8
    model(inputs())
    assert len(kernels) == 8
    accelerate(model)
    accelerate(model)
    restore(model)
    assert [dict(vars(m)) for m in model.modules()] == attributes


def test_report_does_not_keep_a_model() -> None:
    model = adapted()
    done = accelerate(model)
    layers = done._layers
    base = model.merge_and_unload()
    del model
    import gc

    gc.collect()
    assert all(layer() is None for layer in layers) and base is not None
    done.restore()


@pytest.mark.parametrize("where", ["base_layer", "lora_A", "lora_dropout"])
def test_hooks_run(where: str, kernels: list[str]) -> None:
    plain, fast = pair(adapted())
    seen: list[str] = []
    module = getattr(fast.base_model.model.a, where)
    module = module if where == "base_layer" else module["default"]
    handle = module.register_forward_hook(lambda *_: seen.append(where))
    fast(inputs())
    assert seen == [where] and kernels == ["lora_linear"]
    handle.remove()
    fast(inputs())
    assert len(kernels) == 3
    layer_hooks: list[str] = []
    fast.base_model.model.a.register_forward_hook(lambda *_: layer_hooks.append("layer"))
    assert_same(answer(fast, inputs()), answer(plain, inputs()))
    assert layer_hooks == ["layer"]


def test_copies_and_pickles_are_independent() -> None:
    _, fast = pair(adapted(lora_dropout=0.1))
    expected = fast.eval()(inputs())
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fast), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(inputs()), expected)
        other.base_model.model.a.lora_B["default"].weight.data.zero_()
        assert not torch.equal(other(inputs()), expected) and torch.equal(fast(inputs()), expected)
        restore(other)
        assert "forward" not in vars(other.base_model.model.a)
    _, four = nf4_net(use_dora=True)
    buffer = io.BytesIO()
    torch.save(four, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(inputs()), four(inputs()))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.2}])
def test_compile(options: dict[str, Any]) -> None:
    _, fast = pair(adapted(**options))
    fast.eval()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(inputs()), fast(inputs())) < 1e-6
    fast.train()
    if not options.get("lora_dropout"):
        torch._dynamo.reset()
        expected = answer(fast, inputs())
        assert_same({k.removeprefix("_orig_mod."): v for k, v in answer(compiled, inputs()).items()}, expected)
    torch._dynamo.reset()


def test_torch_func() -> None:
    plain, fast = pair(adapted(lora_alpha=6))
    weights = {name: p.detach() + 0.01 for name, p in fast.named_parameters() if "lora" in name}

    def loss(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda given: torch.func.functional_call(model, given, (inputs(),)).square().sum()

    assert_same(torch.func.grad(loss(fast))(weights), torch.func.grad(loss(plain))(weights))


def test_wrong_calls() -> None:
    with pytest.raises(TypeError, match="accelerate: model is a int; expected a torch"):
        accelerate(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accelerate: model holds no layer of PEFT"):
        accelerate(Net())
    with pytest.raises(TypeError, match="restore: model is a str"):
        restore("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"register: config is a IA3Config; expected a peft\.LoraConfig"):
        register(peft.IA3Config())
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        tlkernels.integrations.peft.nothing  # noqa: B018
