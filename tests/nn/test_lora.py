"""LoRA and DoRA layers against PEFT, the formula in float64, and themselves when merged."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tlkernels
from tlkernels import ops
from tlkernels.nn import NF4Embedding, NF4Linear
from tlkernels.nn.lora import BaseWeight, DoRALinear, LoRAConv2d, LoRAEmbedding, LoRALinear, TunerModule

os.environ.setdefault("HF_HUB_OFFLINE", "1")
peft = pytest.importorskip("peft")

CLOSE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomized(layer: nn.Module) -> Any:
    """The layer with an update that is not zero."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def in_peft(base: nn.Module, dropout: float = 0.0, **config: Any) -> Any:
    """PEFT's layer over a copy of `base`."""
    model = nn.Sequential(copy.deepcopy(base))
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["0"], "lora_dropout": dropout, **config}
    peft.get_peft_model(model, peft.LoraConfig(**config), autocast_adapter_dtype=False)
    return model[0]


def take(theirs: Any, ours: TunerModule) -> dict[str, nn.Parameter]:
    """Put our values into PEFT's layer; its parameters by our names."""
    pairs = {
        "lora_A": ("lora_A", "weight"), "lora_B": ("lora_B", "weight"), "lora_bias": ("lora_B", "bias"),
        "lora_magnitude_vector": ("lora_magnitude_vector", "weight"), "lora_embedding_A": ("lora_embedding_A", ""),
        "lora_embedding_B": ("lora_embedding_B", ""),
    }  # fmt: skip
    found = {}
    for name, value in ours.adapter_parameters():
        place, attribute = pairs[name]
        held = getattr(theirs, place)["default"]
        parameter = getattr(held, attribute) if attribute else held
        assert parameter.shape == value.shape and parameter.dtype == value.dtype
        parameter.data.copy_(value.data)
        found[name] = parameter
    return found


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "") -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = float(expected.abs().max()) or 1.0
    error = float((actual - expected).abs().max()) / scale
    assert actual.shape == expected.shape and error <= CLOSE[dtype], f"{what}: {error:.3g}"


def same_as_peft(ours: TunerModule, theirs: Any, x: Tensor, dtype: torch.dtype) -> None:
    """Output, and the gradients of the input and every parameter, for a grad_output that is not uniform."""
    parameters = take(theirs, ours)
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    outputs = [layer(value) for layer, value in zip((ours, theirs), inputs, strict=True)]
    assert outputs[0].dtype == outputs[1].dtype
    close(outputs[0], outputs[1], dtype, "output")
    grad = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(grad)
    if x.is_floating_point():
        assert inputs[0].grad is not None and inputs[1].grad is not None
        close(inputs[0].grad, inputs[1].grad, dtype, "x")
    for name, value in ours.adapter_parameters():
        expected = parameters[name].grad
        assert value.grad is not None and expected is not None and expected.abs().max() > 0
        close(value.grad, expected, dtype, name)


# ---- against PEFT ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True, "lora_bias": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"]
)
def test_linear_is_pefts(dtype: torch.dtype, config: dict[str, bool]) -> None:
    base = nn.Linear(40, 24).to(dtype)
    options = dict(config)
    kind: Any = DoRALinear if options.pop("use_dora", False) else LoRALinear
    ours = randomized(kind(base, 4, 6, dtype=dtype, **options))
    same_as_peft(ours, in_peft(base, **config), torch.randn(3, 5, 40, dtype=dtype), dtype)


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_conv1d_is_pefts(kind: Any) -> None:
    from transformers.pytorch_utils import Conv1D

    base = Conv1D(24, 40)
    nn.init.normal_(base.bias)
    ours = randomized(kind(base, 4, 6))
    assert ours.fan_in_fan_out and (ours.in_features, ours.out_features) == (40, 24)
    x = torch.randn(3, 40)
    theirs = in_peft(base, fan_in_fan_out=True, use_dora=kind is DoRALinear)
    same_as_peft(ours, theirs, x, torch.float32)
    out, before = ours(x), base.weight.clone()
    ours.merge()
    close(ours(x), out, torch.float32)
    ours.unmerge()
    close(base.weight, before, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"kernel_size": 3, "stride": 2, "padding": 1}, {}),
        ({"kernel_size": (1, 3), "padding": (0, 1), "bias": False}, {"use_rslora": True}),
        ({"kernel_size": 1}, {"lora_bias": True}),
        ({"kernel_size": 3, "padding": "same", "groups": 2}, {}),
    ],
)
def test_conv2d_is_pefts(shape: dict[str, Any], options: dict[str, Any], dtype: torch.dtype) -> None:
    base = nn.Conv2d(6, 8, **shape).to(dtype)
    ours = randomized(LoRAConv2d(base, 4, 6, dtype=dtype, **options))
    same_as_peft(ours, in_peft(base, **options), torch.randn(2, 6, 7, 9, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_embedding_is_pefts(dtype: torch.dtype) -> None:
    base = nn.Embedding(20, 12, padding_idx=3, scale_grad_by_freq=True).to(dtype)
    ours = randomized(LoRAEmbedding(base, 4, 6, dtype=dtype))
    same_as_peft(ours, in_peft(base), torch.tensor([[1, 3, 7], [7, 3, 19]]), dtype)
    assert ours.lora_embedding_A.grad is not None and ours.lora_embedding_A.grad[:, 3].abs().max() == 0


@pytest.mark.parametrize("init", [True, "gaussian", False])
@pytest.mark.parametrize("base", [nn.Linear(64, 48), nn.Conv2d(16, 48, 3), nn.Embedding(64, 48)], ids=str)
def test_initial_values_are_pefts(base: nn.Module, init: bool | str) -> None:
    kinds = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d, nn.Embedding: LoRAEmbedding}
    ours = kinds[type(base)](base, 16, init_lora_weights=init)
    theirs = in_peft(base, r=16, init_lora_weights=init)
    holds = theirs.lora_embedding_A if isinstance(base, nn.Embedding) else theirs.lora_A
    other = theirs.lora_embedding_B if isinstance(base, nn.Embedding) else theirs.lora_B
    for own, held in zip(ours.factors, (holds["default"], other["default"]), strict=True):
        own, expected = own.detach(), (held if isinstance(held, nn.Parameter) else held.weight).detach()
        assert math.isclose(float(own.std()), float(expected.std()), rel_tol=0.15, abs_tol=0.0)
        assert math.isclose(float(own.abs().max()), float(expected.abs().max()), rel_tol=0.5, abs_tol=0.0)


# ---- the formula ----------------------------------------------------------------------------------------------------


def dropped(x: Tensor, seed: int, p: float) -> Tensor:
    """x as ops.lora_dropout_mask says that it is dropped, for what torch's generator gives at this seed."""
    torch.manual_seed(seed)
    rng = torch.randint(2**63 - 1, (2,), dtype=torch.int64)
    mask = ops.lora_dropout_mask(rng, x.numel() // x.shape[-1], x.shape[-1], p).view(x.shape)
    return torch.where(mask, x / (1 - p), torch.zeros_like(x))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_dropout(kind: Any, quantized: bool) -> None:
    base: Any = nn.Linear(40, 24).double()
    base = NF4Linear.from_linear(base) if quantized else base
    layer = randomized(kind(base, 4, 6, dropout=0.25, dtype=torch.float64))
    weight = base.dequantize(torch.float64) if quantized else base.weight
    x = torch.randn(3, 5, 40, dtype=torch.float64, requires_grad=True)
    xd = dropped(x, 7, 0.25)
    assert 0.1 < float((xd == 0).double().mean()) < 0.4
    update = layer.scaling * xd @ layer.lora_A.T @ layer.lora_B.T
    if kind is DoRALinear:  # PEFT's formula, as the docstring gives it
        norm = (weight + layer.scaling * layer.lora_B @ layer.lora_A).norm(dim=1).detach()
        g = layer.lora_magnitude_vector / norm
        expected = x @ weight.T + base.bias + (g - 1) * (xd @ weight.T) + g * update
    else:
        expected = x @ weight.T + base.bias + update
    torch.manual_seed(7)
    out = layer(x)
    tolerance = torch.float32 if quantized and kind is DoRALinear else torch.float64  # NF4 norms are float32
    close(out, expected, tolerance)
    grad = torch.randn_like(out)
    wanted = [x, *(p for _, p in layer.adapter_parameters())]
    for got, want in zip(
        torch.autograd.grad(out, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        close(got, want, tolerance)
    layer.eval()
    close(layer(x), layer.train()(x) if layer.dropout == 0 else kind_without_dropout(layer, x), torch.float64)


def kind_without_dropout(layer: Any, x: Tensor) -> Tensor:
    other = copy.deepcopy(layer)
    other.dropout = 0.0
    return other.train()(x)


def test_dropout_needs_one_mask_for_both_terms_of_dora() -> None:
    """In PEFT, the same formula: with m at the norms (g = 1) the base term is free of dropout."""
    base = nn.Linear(40, 24)
    layer = DoRALinear(base, 4, dropout=0.5)  # B = 0, so g = 1
    x = torch.randn(6, 40)
    close(layer(x), base(x), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_nf4_base(kind: Any, dtype: torch.dtype) -> None:
    base = NF4Linear.from_linear(nn.Linear(96, 64).to(dtype))
    dense = nn.Linear(96, 64).to(dtype)
    with torch.no_grad():
        dense.weight.copy_(base.dequantize())
        assert base.bias is not None
        dense.bias.copy_(base.bias)
    ours = randomized(kind(base, 4, 6))
    other = kind(dense, 4, 6)
    other.load_state_dict(
        {f"base_layer.{k}": v for k, v in dense.state_dict().items()} | dict(ours.adapter_parameters())
    )
    assert ours.lora_A.dtype == torch.float32
    x = torch.randn(7, 96, dtype=dtype)
    outputs = []
    for layer in (ours, other):
        value = x.clone().requires_grad_()
        out = layer(value)
        out.backward(torch.linspace(-1, 2, out.numel()).view(out.shape).to(dtype))
        outputs.append([out, value.grad, *(p.grad for _, p in layer.adapter_parameters())])
    for got, want in zip(*outputs, strict=True):
        close(got, want, dtype)


def test_new_layers_are_their_base_layer() -> None:
    linear, conv, table = nn.Linear(40, 24), nn.Conv2d(4, 8, 3), nn.Embedding(20, 12)
    x, image, ids = torch.randn(3, 40), torch.randn(1, 4, 6, 6), torch.tensor([1, 2])
    close(LoRALinear(linear)(x), linear(x), torch.float32)  # to rounding: the product is another kernel's
    assert torch.equal(LoRAConv2d(conv, 4)(image), conv(image))
    assert torch.equal(LoRAEmbedding(table)(ids), table(ids))
    close(DoRALinear(linear)(x), linear(x), torch.float32)
    assert not any(p.requires_grad for layer in (linear, conv, table) for p in layer.parameters())


def test_dora_row_of_zeros_stays_zero() -> None:
    base = nn.Linear(40, 24, bias=False)
    with torch.no_grad():
        base.weight[3] = 0
    layer = DoRALinear(base, 4)
    x = torch.randn(5, 40, requires_grad=True)
    out = layer(x)
    out.backward(torch.randn_like(out))
    assert out.isfinite().all() and out[:, 3].abs().max() == 0
    grads = [x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    assert len(grads) == 4 and all(g is not None and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_conv2d_dilation_and_padding_mode(mode: Any) -> None:
    """The update is a convolution with B A, with all of the base layer's settings: merging changes no output."""
    base = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1), padding_mode=mode).double()
    layer = randomized(LoRAConv2d(base, 4, 6))
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    plain = copy.deepcopy(base)
    with torch.no_grad():
        plain.weight += layer.scaling * torch.einsum("or,rihw->oihw", layer.lora_B[:, :, 0, 0], layer.lora_A)
    close(layer(x), plain(x), torch.float64)
    layer.merge()
    close(base.weight, plain.weight, torch.float64)
    close(layer(x), plain(x), torch.float64)


def test_conv2d_dropout_is_torchs() -> None:
    layer = randomized(LoRAConv2d(nn.Conv2d(3, 8, 3), 4, dropout=0.5))
    x = torch.randn(2, 3, 5, 5)
    torch.manual_seed(3)
    out = layer(x)
    torch.manual_seed(3)
    plain = copy.deepcopy(layer).eval()
    expected = (
        layer.base_layer(x)
        + plain(nn.functional.dropout(x, 0.5))
        - layer.base_layer(_again(3, lambda: nn.functional.dropout(x, 0.5)))
    )
    close(out, expected, torch.float32)


def _again(seed: int, draw: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(seed)
    return draw()


# ---- merging --------------------------------------------------------------------------------------------------------


def cases() -> dict[str, tuple[Callable[[torch.dtype], TunerModule], Tensor]]:
    table = torch.tensor([[1, 5, 7], [2, 2, 0]])
    return {
        "linear": (lambda d: LoRALinear(nn.Linear(40, 24).to(d), 4, 6, lora_bias=True), torch.randn(3, 40)),
        "dora": (lambda d: DoRALinear(nn.Linear(40, 24).to(d), 4, 6), torch.randn(3, 40)),
        "conv": (
            lambda d: LoRAConv2d(nn.Conv2d(6, 8, 3).to(d, memory_format=torch.channels_last), 4, 6, lora_bias=True),
            torch.randn(2, 6, 5, 5),
        ),
        "embedding": (lambda d: LoRAEmbedding(nn.Embedding(20, 12).to(d), 4, 6), table),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(cases()))
def test_merge_and_unmerge(name: str, dtype: torch.dtype) -> None:
    make, x = cases()[name]
    layer = randomized(make(dtype))
    x = x.to(dtype) if x.is_floating_point() else x
    out, before = layer(x), copy.deepcopy(layer.base_layer.state_dict())
    strides = layer.base_layer.weight.stride()
    assert not layer.merged
    layer.merge()
    assert layer.merged and not torch.equal(layer.base_layer.weight, before["weight"])
    close(layer(x), out, dtype)
    assert torch.equal(layer(x), layer.base_layer(x)) and layer.base_layer.weight.stride() == strides
    randomized(layer)  # what was merged is taken out, whatever the factors are by now
    layer.merge()  # does nothing
    layer.unmerge()
    assert not layer.merged and layer._merged_a is None
    for key, value in layer.base_layer.state_dict().items():
        close(value, before[key], dtype, key)
    layer.unmerge()  # does nothing
    assert not torch.allclose(layer(x), out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["linear", "dora", "embedding"])
def test_merge_into_4_bits(name: str, double_quant: bool) -> None:
    base: Any
    if name == "embedding":
        base = NF4Embedding.from_embedding(nn.Embedding(20, 64), double_quant=double_quant)
        layer: Any = LoRAEmbedding(base, 4, 6)
        dense = lambda: base.dequantize() + layer.scaling * (layer.lora_embedding_B @ layer.lora_embedding_A).T  # noqa: E731
    else:
        base = NF4Linear.from_linear(nn.Linear(64, 24), double_quant=double_quant)
        layer = DoRALinear(base, 4, 6) if name == "dora" else LoRALinear(base, 4, 6, lora_bias=True)
        dense = lambda: base.dequantize() + layer.scaling * layer.lora_B @ layer.lora_A  # noqa: E731
    randomized(layer)
    before, bias = [t.clone() for t in base.nf4_weight if isinstance(t, Tensor)], getattr(base, "bias", None)
    bias = None if bias is None else bias.clone()
    with torch.no_grad():
        wanted = dense()
        if name == "dora":
            wanted *= (layer.lora_magnitude_vector / wanted.norm(dim=1))[:, None]
        layer.merge()
    error = float((base.dequantize() - wanted).norm() / wanted.norm())
    assert 0.01 < error < 0.15 and math.isclose(layer.merge_error, error, rel_tol=1e-3)
    assert base.double_quant == double_quant
    layer.unmerge()
    after = [t for t in base.nf4_weight if isinstance(t, Tensor)]
    assert len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert layer.merge_error is None and (bias is None or torch.equal(base.bias, bias))


def test_merged_4_bits_survive_a_move() -> None:
    layer = randomized(LoRALinear(NF4Linear.from_linear(nn.Linear(64, 24)), 4))
    before = layer.base_layer.dequantize()
    layer.merge()
    layer = copy.deepcopy(layer).to(torch.bfloat16)
    layer.unmerge()
    assert layer.base_layer.dtype == torch.bfloat16
    assert torch.equal(layer.base_layer.dequantize(torch.float32), before)


def test_dora_unmerge_of_a_magnitude_of_zero() -> None:
    base = nn.Linear(40, 24)
    layer = randomized(DoRALinear(base, 4))
    before = base.weight.clone()
    with torch.no_grad():
        layer.lora_magnitude_vector[5] = 0
    layer.merge()
    assert base.weight[5].abs().max() == 0
    layer.unmerge()
    assert torch.equal(base.weight[5], before[5])
    close(base.weight, before, torch.float32)


def test_a_merge_that_fails_changes_nothing() -> None:
    layer = randomized(LoRALinear(nn.Linear(40, 24).half(), 4))
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.lora_A.fill_(1e4)
        layer.lora_B.fill_(1e4)
    with pytest.raises(ValueError, match="sum of weight and update exceeds float16"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged
    dora = randomized(DoRALinear(nn.Linear(40, 24).half(), 4))
    before = dora.base_layer.weight.clone()
    with torch.no_grad():
        dora.lora_magnitude_vector[0] = 1e30
    with pytest.raises(ValueError, match="merged weight has values that are not finite"):
        dora.merge()
    assert torch.equal(dora.base_layer.weight, before) and not dora.merged
    with torch.no_grad():
        layer.lora_B[0, 0] = math.nan
    with pytest.raises(ValueError, match="LoRALinear: lora_B has values that are not finite"):
        layer.merge()
    with pytest.raises(ValueError, match="base layer has no bias that lora_bias could be merged into"):
        LoRALinear(nn.Linear(40, 24, bias=False), 4, lora_bias=True).merge()
    with pytest.raises(ValueError, match="base layer has 2 groups; the update cannot be merged"):
        LoRAConv2d(nn.Conv2d(4, 4, 1, groups=2), 2).merge()


def test_a_tuner_without_merged_form_says_so() -> None:
    class Plain(TunerModule):
        pass

    for call in (Plain().check_merge, Plain().merge, Plain().unmerge):
        with pytest.raises(NotImplementedError, match="Plain: its update cannot be merged"):
            call()


# ---- as a module ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(cases()))
def test_state_dict_and_copy(name: str) -> None:
    make, x = cases()[name]
    layer, other = randomized(make(torch.float32)), make(torch.float32)
    keys = {f"base_layer.{k}" for k in layer.base_layer.state_dict()} | {n for n, _ in layer.adapter_parameters()}
    assert set(layer.state_dict()) == keys
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), layer(x)) and copied.factors[0].data_ptr() != layer.factors[0].data_ptr()
    layer.merge()
    with pytest.raises(RuntimeError, match="the update is merged; unmerge before loading"):
        layer.load_state_dict(copied.state_dict())


def test_repr() -> None:
    layer = LoRALinear(nn.Linear(40, 24), 4, 6, dropout=0.1, use_rslora=True, lora_bias=True)
    assert layer.scaling == 3.0
    assert layer.extra_repr() == "rank=4, lora_alpha=6, use_rslora=True, dropout=0.1, lora_bias=True"
    layer.merge()
    assert "merged=True" in repr(layer) and "(base_layer): Linear(in_features=40" in repr(layer)
    assert DoRALinear(nn.Linear(4, 4), 2).extra_repr() == "rank=2, lora_alpha=8.0, dropout=0.0"


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_dtypes(kind: Any, weight: torch.dtype, factors: torch.dtype | None) -> None:
    layer = randomized(kind(nn.Linear(40, 24).to(weight), 4, dtype=factors))
    default = torch.float32 if weight in (torch.bfloat16, torch.float16) else weight
    assert layer.lora_A.dtype == layer.lora_B.dtype == (factors or default)
    x = torch.randn(9, 40, dtype=weight, requires_grad=True)
    out = layer(x)
    out.backward(torch.randn_like(out))
    assert out.dtype == weight and x.grad is not None and x.grad.dtype == weight
    assert layer.lora_A.grad is not None and layer.lora_A.grad.dtype == layer.lora_A.dtype
    wide = copy.deepcopy(layer).double()
    lowest = max((weight, factors or default), key=lambda d: torch.finfo(d).eps)
    close(out, wide(x.double()), lowest)


@pytest.mark.parametrize("name", list(cases()))
def test_autocast(name: str) -> None:
    make, x = cases()[name]
    layer = randomized(make(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == layer.base_layer(x).dtype if name == "embedding" else out.dtype == torch.bfloat16
    close(out, layer(x), torch.bfloat16)
    out.backward(torch.randn_like(out))
    for parameter, value in layer.adapter_parameters():
        assert value.grad is not None and value.grad.dtype == torch.float32, parameter


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("quantized", [False, True])
def test_compile(kind: Any, quantized: bool) -> None:
    base: nn.Module = nn.Linear(64, 24)
    base = NF4Linear.from_linear(base) if quantized else base  # type: ignore[arg-type]
    layer = randomized(kind(base, 4))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 64, requires_grad=True)
    out, expected = compiled(x), layer(x)
    close(out, expected, torch.float32)
    grad = torch.randn_like(out)
    wanted = [x, *(p for _, p in layer.adapter_parameters())]
    for got, want in zip(
        torch.autograd.grad(out, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        close(got, want, torch.float32)


def test_compile_with_dropout() -> None:
    layer = randomized(LoRALinear(nn.Linear(64, 24), 4, dropout=0.5))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 64)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    layer.eval()
    close(compiled(x), layer(x), torch.float32)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_activation_checkpointing_draws_the_same_mask(kind: Any, quantized: bool) -> None:
    base: Any = nn.Linear(40, 24)
    layer = randomized(kind(NF4Linear.from_linear(base) if quantized else base, 4, dropout=0.5))
    x = torch.randn(6, 40, requires_grad=True)
    grads = []
    for run in (lambda: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False), lambda: layer(x)):
        torch.manual_seed(5)
        out = run()
        grads.append([out, *torch.autograd.grad(out, [x, layer.lora_A, layer.lora_B], torch.ones_like(out) * 0.5)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_functional_call() -> None:
    layer = randomized(LoRALinear(nn.Linear(40, 24), 4))
    x = torch.randn(3, 40)
    other = {name: torch.randn_like(p) for name, p in layer.adapter_parameters()}
    out = torch.func.functional_call(layer, other, (x,))
    expected = layer.base_layer(x) + layer.scaling * x @ other["lora_A"].T @ other["lora_B"].T
    close(out, expected, torch.float32)


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("trained", ["lora_A", "lora_B"])
def test_one_trained_factor_and_an_input_without_gradient(kind: Any, trained: str) -> None:
    layer = randomized(kind(nn.Linear(40, 24), 4))
    x = torch.randn(3, 40)
    out = layer(x)
    grad = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, [getattr(layer, trained)], grad)
    for name, parameter in layer.adapter_parameters():
        parameter.requires_grad_(name == trained)
    layer(x).backward(grad)
    assert torch.equal(getattr(layer, trained).grad, expected)
    assert sum(p.grad is not None for p in layer.parameters()) == 1


def test_merged_layers_give_no_gradient() -> None:
    layer = randomized(LoRALinear(nn.Linear(40, 24), 4)).train()
    layer.merge()
    assert not layer(torch.randn(3, 40)).requires_grad
    assert layer.train(False).merged and layer.train().merged  # the mode does not unmerge


def test_meta_device() -> None:
    layer = DoRALinear(nn.Linear(40, 24, device="meta"), 4)
    assert layer.lora_A.is_meta and layer(torch.empty(3, 40, device="meta")).shape == (3, 24)


# ---- code that reads the weight -------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_fused_transformer_layers_call_the_layer(merged: bool) -> None:
    """In eval mode torch's fused path takes linear1.weight; without a hint it would leave the update out."""
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    encoder = nn.TransformerEncoder(block, 1, enable_nested_tensor=False).eval()
    encoder.layers[0].linear1 = randomized(LoRALinear(encoder.layers[0].linear1, 4))
    x = torch.randn(2, 3, 16)
    expected = encoder.train()(x)
    encoder.eval()
    if merged:
        encoder.layers[0].linear1.merge()
    with torch.no_grad():
        close(encoder(x), expected, torch.float32)
    if not merged:
        plain = copy.deepcopy(encoder)
        plain.layers[0].linear1 = plain.layers[0].linear1.base_layer
        assert not torch.allclose(plain(x), expected, atol=1e-3)


def test_weight_is_for_looking_at() -> None:
    layer = LoRALinear(nn.Linear(40, 24).bfloat16(), 4)
    weight = layer.weight
    assert isinstance(weight, BaseWeight) and weight.dtype == torch.bfloat16 and weight.shape == (24, 40)
    assert weight.data_ptr() == layer.base_layer.weight.data_ptr() and layer.bias is layer.base_layer.bias
    x = torch.randn(3, 40).bfloat16()
    assert type(x.to(weight)) is Tensor and x.to(layer.weight.dtype).dtype == torch.bfloat16
    for product in (
        lambda: nn.functional.linear(x, weight),
        lambda: nn.functional.linear(x.float(), weight.float()),
        lambda: x @ weight.t(),
        lambda: weight @ x.t(),
        lambda: x @ weight.T,
        lambda: torch.mm(x, weight.transpose(0, 1)),
    ):
        with pytest.raises(RuntimeError, match="the weight of an adapted layer lacks the adapter's update"):
            product()
    layer.merge()
    assert layer.weight is layer.base_layer.weight
    nf4 = LoRALinear(NF4Linear.from_linear(nn.Linear(64, 8)), 4)
    assert isinstance(nf4.weight, tlkernels.nn.nf4.PackedCodes)


# ---- wrong calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: LoRALinear(nn.Linear(64, 96), 0), ValueError,
         r"LoRALinear: rank is 0; expected 1 to min\(in_features, out_features\) = 64"),
        (lambda: LoRALinear(nn.Linear(64, 96), 65), ValueError, "rank is 65; expected 1 to .* = 64"),
        (lambda: DoRALinear(nn.Linear(8, 8), 2.0), ValueError, "DoRALinear: rank is 2.0"),
        (lambda: LoRALinear(nn.Linear(8, 8), True), ValueError, "rank is True"),
        (lambda: LoRALinear(nn.Linear(8, 8), 2, dropout=1.0), ValueError, "dropout is 1.0; expected 0 <= dropout < 1"),
        (lambda: LoRALinear(nn.Linear(8, 8), 2, dropout=-0.1), ValueError, "dropout is -0.1"),
        (lambda: LoRALinear(nn.Linear(8, 8), 2, math.inf), ValueError, "lora_alpha is inf; expected a finite"),
        (lambda: LoRALinear(nn.Linear(8, 8), 2, init_lora_weights="pissa"), ValueError,
         "init_lora_weights is 'pissa'; expected True, False or 'gaussian'"),
        (lambda: LoRALinear(nn.Linear(8, 8), 2, dtype=torch.int8), TypeError, "dtype is torch.int8"),
        (lambda: LoRALinear(nn.Conv2d(8, 8, 1), 2), TypeError, "base_layer is a Conv2d; expected a torch.nn.Linear"),
        (lambda: LoRALinear(nn.MultiheadAttention(8, 2).out_proj, 2), TypeError, "base_layer is a NonDynamically"),
        (lambda: LoRALinear(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), 2), TypeError,
         "ParametrizedLinear|weight that is computed by a hook"),
        (lambda: LoRALinear(nn.Bilinear(8, 8, 8), 2), TypeError, "base_layer is a Bilinear"),
        (lambda: LoRAConv2d(nn.Conv2d(4, 4, 1, groups=2), 3), ValueError, "rank is 3; expected a multiple of .* 2 gr"),
        (lambda: LoRAConv2d(nn.Conv1d(4, 4, 1), 2), TypeError, "base_layer is a Conv1d; expected a torch.nn.Conv2d"),
        (lambda: LoRAConv2d(nn.Conv2d(2, 9, 2), 9), ValueError, "LoRAConv2d: rank is 9; expected 1 to .* = 8"),
        (lambda: LoRAEmbedding(nn.Embedding(8, 8, max_norm=1.0), 2), ValueError, "base_layer has max_norm 1.0"),
        (lambda: LoRAEmbedding(nn.Embedding(8, 4), 5), ValueError, "LoRAEmbedding: rank is 5; expected 1 to .* = 4"),
        (lambda: LoRAEmbedding(nn.Linear(8, 4), 2), TypeError, "base_layer is a Linear; expected a torch.nn.Embedding"),
    ],
)  # fmt: skip
def test_wrong_calls(make: Callable[[], nn.Module], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_layers_that_do_more_are_refused() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Renamed(nn.Linear):
        pass

    with pytest.raises(TypeError, match="base_layer is a Scaled"):
        LoRALinear(Scaled(8, 8), 2)
    assert LoRALinear(Renamed(8, 8), 2)(torch.randn(2, 8)).shape == (2, 8)
    hooked = nn.Linear(8, 8)
    handle = hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="base_layer has hooks, which would not run"):
        LoRALinear(hooked, 2)
    handle.remove()
    LoRALinear(hooked, 2)
    replaced = nn.Linear(8, 8)
    replaced.forward = replaced.forward  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="forward that was replaced"):
        LoRALinear(replaced, 2)


def test_start_from_wants_the_factors_shapes() -> None:
    layer = LoRALinear(nn.Linear(8, 6), 2)
    with pytest.raises(ValueError, match=r"lora_b has shape \(2, 6\); expected \(6, 2\)"):
        layer.start_from(layer.base_layer, torch.zeros(2, 8), torch.zeros(2, 6), part_of_base=False)
