"""Checkpoints and live layers, to bitsandbytes 0.50 and back, on the CPU."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import formula
import pytest
import torch
from tolerances import assert_product
from torch import Tensor, nn

import tlkernels
from tlkernels import ops
from tlkernels.integrations.bitsandbytes import from_bitsandbytes, quantization_config, to_bitsandbytes
from tlkernels.nn import NF4Embedding, NF4Linear

bnb = pytest.importorskip("bitsandbytes")
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear4bit(
    out_features: int, in_features: int, quant_type: str, double_quant: bool, dtype: torch.dtype, *, seed: int = 0
) -> tuple[Any, nn.Linear]:
    torch.manual_seed(seed)
    dense = nn.Linear(in_features, out_features, dtype=dtype)
    layer = bnb.nn.Linear4bit(in_features, out_features, quant_type=quant_type, compress_statistics=double_quant)
    layer.to(dtype).load_state_dict(dense.state_dict())
    return layer.to("cpu").train(), dense  # the move quantizes


def decoded(layer: Any) -> Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def load4bit(state: dict[str, Tensor], out_features: int, in_features: int, quant_type: str, double_quant: bool) -> Any:
    """What transformers does with an entry of a 4-bit checkpoint."""
    layer = bnb.nn.Linear4bit(in_features, out_features, quant_type=quant_type, compress_statistics=double_quant)
    stats = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    layer.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu", module=layer)
    layer.bias = nn.Parameter(state["bias"])
    return layer.train()


# ---- state_dict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_their_checkpoint_loads_here(quant_type: str, double_quant: bool, dtype: torch.dtype) -> None:
    theirs, _ = linear4bit(96, 128, quant_type, double_quant, dtype)
    state = copy.deepcopy(theirs.state_dict())
    ours = NF4Linear(128, 96, dtype=dtype)
    assert str(ours.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(ours.dequantize(), decoded(theirs)) and ours.double_quant == double_quant
    back = ours.state_dict()
    assert back.keys() == state.keys()
    for key, value in state.items():
        if "quant_state" in key:
            assert json.loads(bytes(value.tolist())) == json.loads(bytes(back[key].tolist()))
        else:
            assert back[key].dtype == value.dtype and torch.equal(back[key], value), key
    x = torch.randn(5, 128).to(dtype)
    assert_product(ours(x).detach(), x, decoded(theirs).float(), ours.bias.detach())
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_our_checkpoint_loads_there(quant_type: str, double_quant: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    code = torch.tensor(ops.FP4_CODE) if quant_type == "fp4" else None
    ours = NF4Linear.from_linear(nn.Linear(128, 96, dtype=dtype), double_quant=double_quant, code=code)
    theirs = load4bit(ours.state_dict(), 96, 128, quant_type, double_quant)
    assert torch.equal(decoded(theirs), ours.dequantize())
    x = torch.randn(5, 128).to(dtype)
    torch.testing.assert_close(theirs(x), ours(x), rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 1024, 4096])
@pytest.mark.parametrize("double_quant", [True, False])
def test_both_write_the_same_bytes(block_size: int, double_quant: bool) -> None:
    torch.manual_seed(2)
    w = torch.randn(40, 4096)
    data, state = bnb.functional.quantize_4bit(
        w, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )
    weight = ops.nf4_quantize(w, block_size=block_size, double_quant=double_quant)
    if double_quant:  # the mean's last bit depends on the order of summation: take theirs
        absmax = ops.nf4_quantize(w, block_size=block_size).absmax
        assert weight.absmax_offset == pytest.approx(float(state.offset), rel=1e-6)
        q, scale, offset = ops.absmax_quantize(absmax, offset=state.offset)
        weight = weight._replace(absmax=q, absmax_scale=scale, absmax_offset=offset)
    ours = NF4Linear.from_weight(weight).state_dict()
    assert torch.equal(ours.pop("weight"), data)
    theirs = state.as_dict(packed=True)
    assert ours.keys() == {f"weight.{key}" for key in theirs}
    for key, value in theirs.items():
        if "quant_state" in key:
            assert json.loads(bytes(value.tolist())) == json.loads(bytes(ours[f"weight.{key}"].tolist()))
        elif key == "absmax" and double_quant:
            assert_nearest(ours["weight.absmax"], value, absmax - state.offset, state.state2.absmax)
        else:
            assert torch.equal(ours[f"weight.{key}"], value), key


def assert_nearest(ours: Tensor, theirs: Tensor, values: Tensor, scale: Tensor) -> None:
    """8-bit codes agree, but for values so near the middle of two that bitsandbytes' CPU code takes the farther one.

    It seeks the code by the value rounded to about 2**-16; ours is the nearest, by the formula.
    """
    table = formula.dynamic_table()
    v = values.double() / scale.repeat_interleave(256)[: len(values)].double()
    mine, other = ((table.double()[codes.long()] - v).abs() for codes in (ours, theirs))
    assert (mine <= other + 1e-7).all() and (other - mine).max() < 2**-15
    assert (ours != theirs).float().mean() < 0.01


# ---- defects of bitsandbytes that do not occur here -----------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(64, 96), (64, 100), (31, 64), (64, 33), (48, 80)])
def test_its_bytes_of_any_shape_decode_and_run_rightly_here(shape: tuple[int, int], training: bool) -> None:
    """bitsandbytes writes the right bytes for rows of 96, and decodes them wrongly; odd sizes fail in its eval mode."""
    theirs, dense = linear4bit(*shape, "nf4", False, torch.bfloat16)
    ours = NF4Linear(shape[1], shape[0], dtype=torch.bfloat16).train(training)
    ours.load_state_dict(theirs.state_dict())
    w = formula.nf4_dequantize(*formula.nf4_quantize(dense.weight.detach()), shape, torch.float32)
    assert torch.equal(ours.dequantize(torch.float32), w)
    x = torch.randn(3, shape[1]).bfloat16()
    with torch.set_grad_enabled(training):
        assert_product(ours(x).detach(), x, w, dense.bias.detach())


def test_gradient_after_eval_and_train() -> None:
    theirs, _ = linear4bit(64, 128, "nf4", False, torch.bfloat16)
    ours = from_bitsandbytes(theirs).eval()
    with torch.no_grad():
        ours(torch.randn(2, 128).bfloat16())
    ours.train()
    x = torch.randn(3, 128).bfloat16().requires_grad_()
    grad_output = torch.randn(3, 64).bfloat16()
    ours(x).backward(grad_output)
    assert_product(x.grad, grad_output, decoded(theirs).float().T)
    assert ours.absmax.dtype == torch.float32 and torch.equal(ours.absmax, theirs.weight.quant_state.absmax)


# ---- live layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_live_layers_there_and_back_share_their_bytes(quant_type: str, double_quant: bool, dtype: torch.dtype) -> None:
    theirs, _ = linear4bit(64, 128, quant_type, double_quant, dtype)
    ours = from_bitsandbytes(theirs)
    assert isinstance(ours, NF4Linear) and ours.training and ours.bias is theirs.bias and ours.dtype == dtype
    assert ours.packed.data_ptr() == theirs.weight.data_ptr()
    assert ours.absmax.data_ptr() == theirs.weight.quant_state.absmax.data_ptr()
    assert torch.equal(ours.dequantize(), decoded(theirs))
    again = to_bitsandbytes(ours)
    assert type(again) is bnb.nn.Linear4bit and again.weight.data_ptr() == ours.packed.data_ptr()
    assert again.weight.quant_state.absmax.data_ptr() == ours.absmax.data_ptr() and again.bias is ours.bias
    assert torch.equal(decoded(again), decoded(theirs)) and again.weight.bnb_quantized
    x = torch.randn(3, 128).to(dtype)
    torch.testing.assert_close(again(x), theirs(x), rtol=0, atol=0)
    ours.to("meta")  # ours alone
    assert theirs.weight.quant_state.absmax.device.type == "cpu"


@pytest.mark.parametrize("quant_storage", [torch.bfloat16, torch.float32])
def test_codes_stored_as_floats(quant_storage: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = bnb.nn.Linear4bit(128, 64, quant_type="nf4", quant_storage=quant_storage).to("cpu")
    assert theirs.weight.dtype == quant_storage
    expected = decoded(theirs)
    assert torch.equal(from_bitsandbytes(theirs).dequantize(), expected)
    ours = NF4Linear(128, 64)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.dequantize(), expected)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_layer_that_has_run_in_eval_mode(double_quant: bool) -> None:
    """On a CPU with bfloat16 products bitsandbytes has repacked the codes and rounded the scales; codes come back."""
    theirs, _ = linear4bit(64, 128, "nf4", double_quant, torch.bfloat16)
    before = from_bitsandbytes(copy.deepcopy(theirs))
    with torch.no_grad():
        y = theirs.eval()(torch.ones(1, 128).bfloat16())
    if not getattr(theirs.weight.quant_state, "packing_format_for_cpu", False):
        assert torch.equal(from_bitsandbytes(theirs).dequantize(), before.dequantize())
        return
    with pytest.warns(UserWarning, match="eval mode, which rounded its scales to bfloat16"):
        after = from_bitsandbytes(theirs)
    assert torch.equal(after.packed, before.packed) and not after.double_quant and not after.training
    absmax = (
        ops.absmax_dequantize(before.absmax, before.absmax_scale, before.absmax_offset)
        if double_quant
        else before.absmax
    )
    assert torch.equal(after.absmax, absmax.bfloat16().float())
    with torch.no_grad():  # and the bitsandbytes layer still works
        assert torch.equal(theirs(torch.ones(1, 128).bfloat16()), y)


def test_layers_not_quantized_yet() -> None:
    dense = nn.Linear(128, 64)
    theirs = bnb.nn.Linear4bit(128, 64, quant_type="fp4", compress_statistics=False)
    theirs.load_state_dict(dense.state_dict())
    ours = from_bitsandbytes(theirs)
    assert torch.equal(ours.dequantize(), decoded(theirs.to("cpu"))) and not ours.double_quant


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["EmbeddingNF4", "EmbeddingFP4"])
def test_embeddings(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = getattr(bnb.nn, kind)(50, 64, dtype=dtype).to("cpu")
    indices = torch.randint(50, (3, 4))
    ours = from_bitsandbytes(theirs)
    assert isinstance(ours, NF4Embedding) and ours.packed.data_ptr() == theirs.weight.data_ptr()
    assert torch.equal(ours(indices), theirs(indices)) and ours(indices).dtype == dtype
    again = to_bitsandbytes(ours)
    assert isinstance(again, bnb.nn.Embedding4bit) and torch.equal(again(indices), theirs(indices))


def test_whole_models_and_layers_in_two_places() -> None:
    layer, _ = linear4bit(64, 64, "nf4", True, torch.float32)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, nn.LayerNorm(64)), "c": nn.Linear(64, 64)})
    assert from_bitsandbytes(model) is model
    assert isinstance(model["a"], NF4Linear) and model["b"][0] is model["a"] and type(model["c"]) is nn.Linear
    assert to_bitsandbytes(model) is model
    assert isinstance(model["a"], bnb.nn.Linear4bit) and model["b"][0] is model["a"]


def test_what_bitsandbytes_cannot_hold() -> None:
    with pytest.raises(ValueError, match="table is neither NF4 nor FP4"):
        to_bitsandbytes(NF4Linear.from_linear(nn.Linear(64, 64), code=torch.linspace(-1, 1, 16)))
    with pytest.warns(UserWarning, match="rows of 96 are not a multiple of block_size 64"):
        to_bitsandbytes(NF4Linear(96, 64))


def test_without_bitsandbytes_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        from_bitsandbytes(nn.Identity())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        quantization_config(nn.Identity())


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


def tiny(transformers: Any, *, tied: bool = False) -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train(False)


TOKENS = torch.arange(24).view(2, 12)


def save_theirs(transformers: Any, directory: Path, *, double_quant: bool, quant_type: str) -> Any:
    tiny(transformers).save_pretrained(directory / "dense")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "dense", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    model.save_pretrained(directory / "theirs")
    return model.train()  # train: eval mode would repack


@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_a_checkpoint_of_transformers_loads_here(
    transformers: Any, tmp_path: Path, quant_type: str, double_quant: bool
) -> None:
    from safetensors.torch import load_file

    theirs = save_theirs(transformers, tmp_path, double_quant=double_quant, quant_type=quant_type)
    model = tlkernels.quantize_model(tiny(transformers))
    state = load_file(tmp_path / "theirs" / "model.safetensors")
    assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
    layers = [name for name, m in model.named_modules() if isinstance(m, NF4Linear)]
    assert len(layers) == 14
    for name in layers:
        assert torch.equal(model.get_submodule(name).dequantize(), decoded(theirs.get_submodule(name))), name
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_checkpoint_saved_here_loads_in_transformers(transformers: Any, tmp_path: Path, double_quant: bool) -> None:
    model = tlkernels.quantize_model(tiny(transformers), double_quant=double_quant)
    model.config.quantization_config = quantization_config(model)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32).train()
    layers = [name for name, m in model.named_modules() if isinstance(m, NF4Linear)]
    assert len(layers) == 14
    for name in layers:
        assert isinstance(theirs.get_submodule(name), bnb.nn.Linear4bit)
        assert torch.equal(decoded(theirs.get_submodule(name)), model.get_submodule(name).dequantize()), name
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_a_live_transformers_model_is_converted_and_saves_what_it_was(transformers: Any, tmp_path: Path) -> None:
    theirs = save_theirs(transformers, tmp_path, double_quant=True, quant_type="nf4")
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        ours = from_bitsandbytes(theirs)
        assert sum(isinstance(m, NF4Linear) for m in ours.modules()) == 14
        for mode in (True, False):
            torch.testing.assert_close(ours.train(mode)(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path / "again")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="cpu").train()
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=0, atol=0)


def test_a_tied_head_of_transformers_stays_tied(transformers: Any) -> None:
    model = tiny(transformers, tied=True)
    with pytest.warns(UserWarning, match=r"lm_head\.weight stays dense: it is tied to model\.embed_tokens\.weight"):
        tlkernels.quantize_model(model, skip=())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(TOKENS)


def test_quantization_config_says_what_it_cannot_say(transformers: Any) -> None:
    model = tlkernels.quantize_model(tiny(transformers))
    config = quantization_config(model)
    assert config.llm_int8_skip_modules == ["lm_head"] and config.bnb_4bit_quant_type == "nf4"
    with pytest.raises(ValueError, match="embed_tokens is an NF4Embedding, which transformers cannot load"):
        quantization_config(tlkernels.quantize_model(model, embeddings=True))
    with pytest.raises(ValueError, match=r"the 4-bit tables are \[\]; expected all 'nf4' or all 'fp4'"):
        quantization_config(nn.Linear(2, 2))
