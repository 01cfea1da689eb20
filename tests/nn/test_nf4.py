"""NF4Linear and NF4Embedding: values, moves, state_dict, copies, compilation, gradients."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import formula
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_product, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tlkernels
from tlkernels import ops
from tlkernels.nn import NF4Embedding, NF4Linear

SHAPES = [(64, 128), (64, 96), (33, 65), (1, 1), (3, 5), (130, 40)]
QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"
FP4_STATE = "weight.quant_state.bitsandbytes__fp4"


def dense_weight(
    w: Tensor, *, block_size: int = 64, double_quant: bool = True, dtype: torch.dtype | None = None
) -> Tensor:
    """What a layer quantized from `w` must hold, by the formula."""
    packed, absmax = formula.nf4_quantize(w, block_size)
    if double_quant:
        absmax = formula.absmax_dequantize(*formula.absmax_quantize(absmax))
    return formula.nf4_dequantize(packed, absmax, tuple(w.shape), dtype or w.dtype, block_size)


def linear(
    out_features: int = 64, in_features: int = 96, *, bias: bool = True, dtype: torch.dtype | None = None
) -> nn.Linear:
    torch.manual_seed(out_features * 1000 + in_features)
    return nn.Linear(in_features, out_features, bias, dtype=dtype)


def same_bytes(a: nn.Module, b: nn.Module) -> None:
    for (name, x), (_, y) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), name


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_the_product_with_the_formulas_weight(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool, training: bool
) -> None:
    dense = linear(*shape, dtype=dtype).train(training)
    layer = NF4Linear.from_linear(dense, double_quant=double_quant)
    w = dense_weight(dense.weight.detach(), double_quant=double_quant)
    assert torch.equal(layer.dequantize(), w) and layer.training is training
    for rows in [(), (1,), (7,), (2, 3), (0,), (70,)]:
        x = torch.randn(*rows, shape[1]).to(dtype)
        y = layer(x)
        w32 = dense_weight(dense.weight.detach(), double_quant=double_quant, dtype=torch.float32)
        if x.numel():
            assert_product(y.detach(), x, w32, dense.bias.detach(), f"rows {rows}")
        assert y.shape == (*rows, shape[0]) and y.dtype == dtype


@given(
    out_features=st.integers(1, 70), in_features=st.integers(1, 150), block_size=st.sampled_from([32, 64, 128, 4096]),
    double_quant=st.booleans(), bias=st.booleans(), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_any_layer_survives_its_state_dict(
    out_features: int, in_features: int, block_size: int, double_quant: bool, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    dense = nn.Linear(in_features, out_features, bias)
    layer = NF4Linear.from_linear(dense, block_size=block_size, double_quant=double_quant)
    w = dense_weight(dense.weight.detach(), block_size=block_size, double_quant=double_quant)
    assert torch.equal(layer.dequantize(), w)
    other = NF4Linear(in_features, out_features, bias)  # of another block size, and perhaps other scales
    assert str(other.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"
    same_bytes(layer, other)
    assert torch.equal(other.dequantize(), w) and other.block_size == block_size
    assert repr(other) == repr(layer)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_embedding_gives_rows_of_the_formulas_table(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool
) -> None:
    torch.manual_seed(1)
    dense = nn.Embedding(*shape, padding_idx=-1, dtype=dtype)
    layer = NF4Embedding.from_embedding(dense, double_quant=double_quant)
    w = dense_weight(dense.weight.detach(), double_quant=double_quant)
    assert layer.padding_idx == shape[0] - 1
    for indices in [torch.randint(shape[0], (2, 5)), torch.arange(shape[0], dtype=torch.int32), torch.tensor(0)]:
        assert torch.equal(layer(indices), w[indices.long()])
    assert layer(torch.zeros(0, dtype=torch.long)).shape == (0, shape[1])
    with pytest.raises((IndexError, RuntimeError), match="indices"):
        layer(torch.tensor([shape[0]]))


def test_fresh_layers_are_drawn_like_dense_ones() -> None:
    torch.manual_seed(5)
    layer = NF4Linear(96, 64, dtype=torch.bfloat16)
    torch.manual_seed(5)
    dense = nn.Linear(96, 64, dtype=torch.bfloat16)
    assert torch.equal(layer.dequantize(), dense_weight(dense.weight.detach()))
    assert torch.equal(layer.bias, dense.bias) and layer.bias.requires_grad
    torch.manual_seed(5)
    table = NF4Embedding(50, 40, padding_idx=3)
    torch.manual_seed(5)
    assert torch.equal(table.dequantize(), dense_weight(nn.Embedding(50, 40, padding_idx=3).weight.detach()))
    assert not table(torch.tensor(3)).any() or table.double_quant  # 8-bit scales need not decode 0 to 0


@pytest.mark.parametrize("code", [torch.tensor(ops.FP4_CODE), torch.linspace(1, -1, 16)], ids=["fp4", "descending"])
def test_other_tables(code: Tensor) -> None:
    dense = linear(33, 65)
    layer = NF4Linear.from_linear(dense, code=code, double_quant=False)
    packed, absmax = formula.nf4_quantize(dense.weight.detach(), code=code)
    assert torch.equal(layer.dequantize(), formula.nf4_dequantize(packed, absmax, (33, 65), torch.float32, code=code))
    other = NF4Linear(65, 33)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), layer.dequantize()) and repr(other) == repr(layer)


def test_custom_tables_are_not_passed_off_as_bitsandbytes_data() -> None:
    state = NF4Linear.from_linear(linear(), code=torch.linspace(-1, 1, 16)).state_dict()
    assert [key for key in state if "quant_state" in key] == ["weight.quant_state.tlkernels__table"]


# ---- construction: wrong calls --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: NF4Linear(64, 64, block_size=48), ValueError, "block_size is 48; expected a power of two"),
        (lambda: NF4Linear(64, 64, block_size=48, device="meta"), ValueError, "block_size is 48"),
        (
            lambda: NF4Linear.from_linear(nn.Embedding(4, 4)),
            TypeError,
            "linear is a Embedding; expected a torch.nn.Linear",
        ),
        (
            lambda: NF4Embedding.from_embedding(nn.Linear(4, 4)),
            TypeError,
            "embedding is a Linear; expected a torch.nn.Emb",
        ),
        (
            lambda: NF4Embedding.from_embedding(nn.Embedding(4, 4, max_norm=1.0)),
            ValueError,
            "max_norm is 1.0; expected None",
        ),
        (lambda: NF4Embedding(4, 4, padding_idx=4), ValueError, "padding_idx is 4; expected -4 <= padding_idx < 4"),
        (lambda: NF4Linear.from_weight(torch.zeros(4, 4)), TypeError, "weight is a Tensor; expected an NF4Weight"),
        (
            lambda: NF4Linear.from_weight(ops.nf4_quantize(torch.zeros(4))),
            ValueError,
            r"shape \(4,\); expected a matrix",
        ),
        (
            lambda: NF4Linear.from_weight(ops.nf4_quantize(torch.zeros(4, 6)), torch.zeros(6)),
            ValueError,
            r"bias has shape \(6,\); expected \(4,\)",
        ),
        (lambda: NF4Linear(64, 32)(torch.zeros(2, 65)), ValueError, "x has 65 features"),
        (lambda: NF4Linear(64, 32)(torch.zeros(2, 64, dtype=torch.long)), TypeError, "x has dtype int64"),
    ],
)
def test_wrong_calls(call: Callable[[], object], error: type[Exception], sentence: str) -> None:
    with pytest.raises((error, RuntimeError), match=sentence):
        call()


def test_weight_is_the_packed_bytes_and_no_matrix() -> None:
    layer = NF4Linear.from_linear(linear())
    assert isinstance(layer.weight, Tensor) and layer.weight.dtype == torch.uint8
    assert layer.weight.shape == (64 * 96 // 2, 1) and layer.weight.device == torch.device("cpu")
    assert layer.weight.data_ptr() == layer.packed.data_ptr()
    with pytest.raises(TypeError, match="4-bit codes, not a matrix; call the layer"):
        nn.functional.linear(torch.zeros(2, 96), layer.weight)
    with pytest.raises(TypeError, match="4-bit codes, not a matrix"):
        nn.functional.embedding(torch.tensor([0]), layer.weight)


# ---- moves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("move", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.to("cpu", torch.float16), torch.float16),
        (lambda m: m.type(torch.float16), torch.float16),
        (lambda m: m.half().float(), torch.float32),
        (lambda m: m.share_memory(), torch.float32),
        (lambda m: m.to("cpu"), torch.float32),
    ],
)
def test_moves_change_no_byte_of_the_weight(
    move: Callable[[nn.Module], nn.Module], dtype: torch.dtype, double_quant: bool
) -> None:
    layer = NF4Linear.from_linear(linear(), double_quant=double_quant)
    table = NF4Embedding.from_embedding(nn.Embedding(10, 40), double_quant=double_quant)
    model = nn.ModuleList([layer, table])
    before, w = copy.deepcopy(model), layer.dequantize(torch.float32)
    assert move(model) is model
    same_bytes(before, model)
    assert layer.bias.dtype == dtype and layer.dequantize().dtype == dtype
    assert table(torch.tensor([1])).dtype == dtype
    assert torch.equal(layer.dequantize(torch.float32), w)
    assert json.loads(bytes(layer.state_dict()[QUANT_STATE].tolist()))["dtype"] == str(dtype).removeprefix("torch.")


def test_share_memory_shares_every_buffer() -> None:
    layer = NF4Linear.from_linear(linear()).share_memory()
    assert all(t.is_shared() for t in (*layer.parameters(), *layer.buffers()))


def test_layers_that_share_a_weight_share_it_after_moves() -> None:
    table = NF4Embedding.from_embedding(nn.Embedding(50, 64))
    model = nn.ModuleList([table, NF4Linear.from_weight(table.nf4_weight)])
    for move in [lambda m: m.half(), lambda m: m.to("cpu", torch.float32), lambda m: m.share_memory(), copy.deepcopy]:
        model = move(model)
        assert {b.data_ptr() for b in model[0].buffers()} == {b.data_ptr() for b in model[1].buffers()}
    model.load_state_dict(nn.ModuleList([table, NF4Linear.from_weight(table.nf4_weight)]).state_dict())
    assert model[0].packed.data_ptr() == model[1].packed.data_ptr()


def test_meta_to_empty_and_reset() -> None:
    layer = NF4Linear(96, 64, device="meta", dtype=torch.bfloat16)
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    assert layer(torch.zeros(3, 96, device="meta", dtype=torch.bfloat16)).shape == (3, 64)
    layer.to_empty(device="cpu")
    assert layer.absmax_scale.dtype == torch.float32 and layer.absmax_offset.shape == ()
    torch.manual_seed(7)
    layer.reset_parameters()
    torch.manual_seed(7)
    same_bytes(layer, NF4Linear(96, 64, dtype=torch.bfloat16))
    table = NF4Embedding(9, 40, padding_idx=2, device="meta").to_empty(device="cpu")
    torch.manual_seed(7)
    table.reset_parameters()
    torch.manual_seed(7)
    same_bytes(table, NF4Embedding(9, 40, padding_idx=2))
    assert NF4Linear.from_linear(linear()).to("meta").packed.is_meta


def test_autocast_computes_in_its_dtype_as_linear_does(backend: str) -> None:
    dense = linear()
    layer = NF4Linear.from_linear(dense)
    x = torch.randn(4, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert dense(x).dtype == layer(x).dtype == torch.bfloat16
        y = layer(x)
        assert layer(x.double()).dtype == torch.float64
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, layer(x.bfloat16())) and torch.equal(compiled, y)


# ---- state_dict -----------------------------------------------------------------------------------------------------


def test_state_dict_layout() -> None:
    dense = linear(64, 96, dtype=torch.bfloat16)
    state = NF4Linear.from_linear(dense).state_dict(prefix="fc.")
    packed, absmax = formula.nf4_quantize(dense.weight.detach())
    q, scale, offset = formula.absmax_quantize(absmax)
    numbers = json.loads(bytes(state.pop(f"fc.{QUANT_STATE}").tolist()))
    assert torch.tensor(numbers.pop("nested_offset"), dtype=torch.float32).item() == offset.item()  # the same bits
    assert numbers == {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 96], "nested_blocksize": 256,
        "nested_dtype": "float32",
    }  # fmt: skip
    expected = {
        "fc.weight": packed[:, None], "fc.weight.absmax": q, "fc.weight.quant_map": formula.NF4,
        "fc.weight.nested_absmax": scale, "fc.weight.nested_quant_map": formula.dynamic_table(), "fc.bias": dense.bias,
    }  # fmt: skip
    assert state.keys() == expected.keys()
    assert all(state[k].dtype == v.dtype and torch.equal(state[k], v) for k, v in expected.items())
    assert set(NF4Linear.from_linear(dense, double_quant=False).state_dict()) == {
        "weight", "weight.absmax", "weight.quant_map", QUANT_STATE, "bias",
    }  # fmt: skip


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_offset_survives_its_json_bit_for_bit(offset: float) -> None:
    weight = ops.nf4_quantize(torch.randn(4, 64), double_quant=True)
    layer = NF4Linear.from_weight(weight._replace(absmax_offset=torch.tensor(offset)))
    other = NF4Linear(64, 4, bias=False)
    other.load_state_dict(layer.state_dict())
    assert other.absmax_offset.view(torch.int32) == torch.tensor(offset).view(torch.int32)


def test_state_dict_is_a_view_and_safetensors_takes_it(tmp_path: Path) -> None:
    from safetensors.torch import load_model, save_model

    model = nn.Sequential(NF4Linear.from_linear(linear(64, 96)), NF4Linear.from_linear(linear(32, 64)))
    assert model.state_dict()["0.weight"].data_ptr() == model[0].packed.data_ptr()
    save_model(model, str(tmp_path / "m.safetensors"))
    other = nn.Sequential(NF4Linear(96, 64), NF4Linear(64, 32))
    load_model(other, str(tmp_path / "m.safetensors"))
    same_bytes(model, other)


def broken(key: str, value: object) -> Callable[[dict[str, Tensor]], None]:
    def edit(state: dict[str, Tensor]) -> None:
        state[key] = value(state[key]) if callable(value) else value

    return edit


def numbers(**changes: object) -> Callable[[dict[str, Tensor]], None]:
    def edit(state: dict[str, Tensor]) -> None:
        table = {**json.loads(bytes(state[QUANT_STATE].tolist())), **changes}
        state[QUANT_STATE] = torch.tensor(
            list(json.dumps({k: v for k, v in table.items() if v != ...}, default=str).encode())
        )
        state[QUANT_STATE] = state[QUANT_STATE].to(torch.uint8)

    return edit


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (broken("weight", lambda t: t[:-1]), r"size mismatch for 0\.weight: uint8 of shape \(3071, 1\) is 3071 bytes"),
        (broken("weight", torch.zeros(64, 96)), r"0\.weight is a dense float32 matrix; expected 4-bit codes"),
        (broken("weight.absmax", lambda t: t[:-1]), r"mismatch for 0\.weight\.absmax: .* \(95,\); expected \(96,\)"),
        (broken("weight.absmax", lambda t: t.char()), r"0\.weight\.absmax has dtype int8; expected uint8 or float32"),
        (broken("weight.quant_map", lambda t: t[:-1]), r"0\.weight\.quant_map: its shape is \(15,\); expected \(16,\)"),
        (broken("weight.quant_map", lambda t: -t), r"0\.weight\.quant_map is not the table of NF4"),
        (broken("weight.nested_absmax", lambda t: t.repeat(2)), r"weight\.nested_absmax: .* \(2,\); expected \(1,\)"),
        (broken("weight.nested_absmax", lambda t: t.half()), r"0\.weight\.nested_absmax has dtype float16; expected"),
        (broken("weight.nested_quant_map", torch.zeros(256)), r"0\.weight\.nested_quant_map is not the signed dynamic"),
        (broken(QUANT_STATE, lambda t: t[:-1]), r"bitsandbytes__nf4 is not the bytes of a JSON object"),
        (broken(QUANT_STATE, torch.tensor([255]).byte()), r"bitsandbytes__nf4 is not the bytes of a JSON"),
        (broken(QUANT_STATE, torch.tensor([*b"[]"]).byte()), r"bitsandbytes__nf4 is not .*: it holds a list"),
        (broken(QUANT_STATE, lambda t: t.float()), r"bitsandbytes__nf4 is not .*: its dtype is float32, not uint8"),
        (numbers(quant_type="int4"), r"bitsandbytes__nf4: quant_type is 'int4'; expected 'nf4'"),
        (numbers(blocksize=48), r"bitsandbytes__nf4: blocksize is 48; expected a power of two from 32 to 4096"),
        (numbers(blocksize="64"), r"bitsandbytes__nf4: blocksize is '64'; expected"),
        (numbers(blocksize=128), r"size mismatch for 0\.weight\.absmax: its shape is \(96,\); expected \(48,\)"),
        (numbers(nested_blocksize=0), r"bitsandbytes__nf4: nested_blocksize is 0; expected"),
        (numbers(nested_offset="1"), r"bitsandbytes__nf4: nested_offset is '1'; expected a number"),
        (numbers(nested_dtype="float16"), r"bitsandbytes__nf4: nested_dtype is 'float16'; expected 'float32'"),
        (numbers(dtype="int8"), r"bitsandbytes__nf4: dtype is 'int8'; expected one of float32"),
        (numbers(shape=[96, 64]), r"size mismatch for 0\.weight\.quant_state\..*: shape is \[96, 64\]; .* \[64, 96\]"),
        (numbers(shape=...), r"bitsandbytes__nf4 lacks shape"),
        (numbers(nested_offset=...), r"bitsandbytes__nf4 lacks nested_offset"),
        (broken("weight.quant_map", lambda t: t.to("meta")), r"0\.weight\.quant_map is on the meta device"),
        (lambda s: s.update({FP4_STATE: s[QUANT_STATE]}), r"found .* and .*; expected one"),
        (lambda s: s.pop("weight.absmax"), r'Missing key\(s\) in state_dict: "0\.weight\.absmax"'),
        (lambda s: s.pop("weight"), r'Missing key\(s\) in state_dict: "0\.weight"'),
        (lambda s: s.pop(QUANT_STATE), r'Missing key\(s\) in state_dict: "0\.weight\.quant_state\.bitsandbytes__nf4"'),
        (lambda s: s.pop("weight.nested_absmax"), r'Missing key\(s\) in state_dict: "0\.weight\.nested_absmax"'),
        (lambda s: s.pop("bias"), r'Missing key\(s\) in state_dict: "0\.bias"'),
        (lambda s: s.clear(), r'Missing key\(s\) in state_dict: "0\.bias", "0\.weight", "0\.weight\.absmax"'),
        (lambda s: s.update({"weight.SCB": torch.zeros(1)}), r'Unexpected key\(s\) in state_dict: "0\.weight\.SCB"'),
        (lambda s: s.update({"extra": torch.zeros(1)}), r'Unexpected key\(s\) in state_dict: "0\.extra"'),
        (broken("bias", torch.zeros(65)), r"size mismatch for 0\.bias"),
    ],
)  # fmt: skip
def test_bad_entries_are_refused_by_name(edit: Callable[[dict[str, Tensor]], None], sentence: str) -> None:
    state = NF4Linear.from_linear(linear()).state_dict()
    edit(state)
    model = nn.Sequential(NF4Linear.from_linear(linear(64, 96)))
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=sentence):
        model.load_state_dict({f"0.{k}": v for k, v in state.items()})
    if "Unexpected" not in sentence and "bias" not in sentence:  # torch loads what it can before it raises
        same_bytes(before, model)


def test_not_strict() -> None:
    layer, state = NF4Linear.from_linear(linear(64, 96)), NF4Linear.from_linear(linear(64, 96)).state_dict()
    found = layer.load_state_dict({"bias": state["bias"], "other": state["bias"]}, strict=False)
    assert "weight" in found.missing_keys and found.unexpected_keys == ["other"]
    del state["weight.quant_map"]  # a part of a weight is no weight
    with pytest.raises(RuntimeError, match=r"weight is incomplete: expected also weight\.quant_map"):
        layer.load_state_dict(state, strict=False)


def test_float_scales_do_not_take_nested_entries() -> None:
    plain = NF4Linear.from_linear(linear(), double_quant=False).state_dict()
    nested = NF4Linear.from_linear(linear()).state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight.nested_absmax"'):
        NF4Linear(96, 64).load_state_dict({**plain, "weight.nested_absmax": nested["weight.nested_absmax"]})


def test_loading_keeps_dtype_and_memory_unless_assigned() -> None:
    source = NF4Linear.from_linear(linear(dtype=torch.bfloat16))
    layer = NF4Linear(96, 64)
    pointer = layer.packed.data_ptr()
    layer.load_state_dict(source.state_dict())
    assert layer.packed.data_ptr() == pointer and layer.bias.dtype == layer.dtype == torch.float32
    assert torch.equal(layer.dequantize(torch.bfloat16), source.dequantize())
    state = source.state_dict()
    meta = NF4Linear(96, 64, device="meta")
    with pytest.warns(UserWarning, match="meta device does nothing; use load_state_dict"):
        meta.load_state_dict(state)
    assert meta.packed.is_meta
    meta.load_state_dict(state, assign=True)
    assert meta.dtype == meta.bias.dtype == torch.bfloat16 and meta.packed.data_ptr() == source.packed.data_ptr()
    same_bytes(meta, source)


def test_old_forms_of_the_codes_load() -> None:
    layer, state = NF4Linear.from_linear(linear()), NF4Linear.from_linear(linear()).state_dict()
    for codes in [
        state["weight"].view(1, -1),
        *(state["weight"].view(-1).view(t).view(-1, 1) for t in (torch.bfloat16, torch.float32)),
    ]:
        other = NF4Linear(96, 64)
        other.load_state_dict({**state, "weight": codes})
        same_bytes(layer, other)


def test_meta_layers_list_their_keys() -> None:
    assert NF4Linear(96, 64, device="meta").state_dict().keys() == NF4Linear(96, 64).state_dict().keys()
    assert all(t.is_meta for t in NF4Linear(96, 64, device="meta").state_dict().values())


def test_load_hooks_that_rename_entries_are_heard() -> None:
    layer, state = NF4Linear(96, 64), NF4Linear.from_linear(linear()).state_dict()

    def rename(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        for key in [k for k in state_dict if k.startswith(f"{prefix}w4")]:
            state_dict[key.replace("w4", "weight")] = state_dict.pop(key)

    layer.register_load_state_dict_pre_hook(rename)
    layer.load_state_dict({k.replace("weight", "w4", 1): v for k, v in state.items()})
    assert torch.equal(layer.dequantize(), NF4Linear.from_linear(linear()).dequantize())


# ---- copies, compilation, functional use ----------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
def test_copies(double_quant: bool) -> None:
    layer = NF4Linear.from_linear(linear(dtype=torch.bfloat16), double_quant=double_quant).eval()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        same_bytes(layer, other)
        assert repr(other) == repr(layer) and not other.training and torch.equal(other.bias, layer.bias)
        assert other.packed.data_ptr() != layer.packed.data_ptr()
    state = io.BytesIO()
    torch.save(layer.state_dict(), state)
    state.seek(0)
    again = NF4Linear(96, 64, dtype=torch.bfloat16)
    again.load_state_dict(torch.load(state, weights_only=True))
    same_bytes(layer, again) if again.double_quant == double_quant else pytest.fail("the kind of scales did not load")


@pytest.mark.parametrize("double_quant", [True, False])
def test_compile_without_graph_breaks(double_quant: bool) -> None:
    table = NF4Embedding.from_embedding(nn.Embedding(40, 96), double_quant=double_quant)
    model = nn.Sequential(table, NF4Linear.from_linear(linear(), double_quant=double_quant))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    indices = torch.randint(40, (3, 4))
    assert torch.equal(compiled(indices), model(indices))
    head = NF4Linear.from_linear(linear(), double_quant=double_quant)
    gradients = []
    for f in (head, torch.compile(head, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-1, 1, 480).view(5, 96).requires_grad_()
        head.bias.grad = None
        (f(x) ** 2).sum().backward()
        gradients.append((x.grad, head.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_export_runs_saves_and_takes_other_batch_sizes() -> None:
    model = nn.Sequential(NF4Embedding.from_embedding(nn.Embedding(40, 96)), NF4Linear.from_linear(linear())).eval()
    indices = torch.randint(40, (5,))
    program = torch.export.export(model, (indices,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for n in (5, 33):
        indices = torch.randint(40, (n,))
        assert torch.equal(program.module()(indices), model(indices))
    assert torch.equal(torch.export.load(file).module()(indices), model(indices))
    assert not any(t.numel() == 64 * 96 for t in (*program.state_dict.values(), *program.constants.values()))


def test_functional_call_and_torch_func() -> None:
    layer = NF4Linear.from_linear(linear())
    w = layer.dequantize().double()
    x, bias = torch.randn(5, 96), torch.randn(64)
    y = torch.func.functional_call(layer, {"bias": bias}, (x,))
    assert_product(y, x, layer.dequantize(), bias)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(layer, parameters, (x,)) ** 2).sum()

    grads, grad_x = torch.func.grad(loss, argnums=(0, 1))({"bias": bias}, x)
    output = x.double() @ w.T + bias.double()
    assert relative_error(grads["bias"], 2 * output.sum(0)) < 1e-6
    assert relative_error(grad_x, 2 * output @ w) < 1e-6
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0))({"bias": bias}, x)
    assert relative_error(per_sample, 2 * output @ w) < 1e-6


# ---- training through a frozen weight -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 96), (64, 128), (33, 65)])
def test_input_gradient_in_every_mode_and_order_of_modes(
    backend: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    layer = NF4Linear.from_linear(linear(*shape, dtype=dtype))
    w = dense_weight(linear(*shape, dtype=dtype).weight.detach(), dtype=torch.float32)
    absmax = layer.absmax.clone()
    for mode in (True, False, True, False, False, True):
        layer.train(mode)
        with torch.no_grad():
            layer(torch.randn(3, shape[1]).to(dtype))  # in eval mode bitsandbytes repacks the weight here
        x = torch.randn(7, shape[1]).to(dtype).requires_grad_()
        grad_output = torch.randn(7, shape[0]).to(dtype)
        layer.bias.grad = None
        layer(x).backward(grad_output)
        assert_product(x.grad, grad_output, w.T, context=f"train={mode}")
        bound = 2e-2 if dtype == torch.bfloat16 else 1e-6  # a sum of 7 rows, rounded once to the dtype
        assert relative_error(layer.bias.grad, grad_output.double().sum(0)) < bound
        assert layer.absmax.dtype == absmax.dtype and torch.equal(layer.absmax, absmax)


def test_scales_stay_float32_whatever_runs() -> None:
    layer = NF4Linear.from_linear(linear(dtype=torch.bfloat16), double_quant=False).eval()
    before = layer.absmax.clone()
    layer(torch.randn(1, 96).bfloat16())
    layer.train().bfloat16()
    assert layer.absmax.dtype == torch.float32 and torch.equal(layer.absmax, before)


@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (31, 64), (64, 31), (33, 100), (48, 80), (65, 129)])
def test_any_size_runs_in_eval(backend: str, out_features: int, in_features: int) -> None:
    dense = linear(out_features, in_features, dtype=torch.bfloat16).eval()
    layer = NF4Linear.from_linear(dense)
    x = torch.randn(2, in_features).bfloat16()
    with torch.no_grad():
        w = dense_weight(dense.weight.detach(), dtype=torch.float32)
        assert_product(layer(x), x, w, dense.bias)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = nn.Sequential(NF4Linear.from_linear(linear(64, 96)), nn.GELU(), NF4Linear.from_linear(linear(8, 64)))
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        x = torch.linspace(-1, 1, 480).view(5, 96).requires_grad_()
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("double_quant", [True, False])
def test_nothing_dense_is_saved_for_backward(double_quant: bool) -> None:
    layer = NF4Linear.from_linear(linear(256, 512), double_quant=double_quant)
    saved: list[Tensor] = []
    x = torch.randn(64, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    own = {b.data_ptr() for b in layer.buffers()}
    assert saved and all(t.data_ptr() in own for t in saved)  # not even x: the weight has no gradient
    assert sum(t.nbytes for t in saved) == layer.nf4_weight.nbytes < 256 * 512 * 4.6 / 8
    y.sum().backward()
    assert x.grad is not None


def test_double_backward() -> None:
    layer = NF4Linear.from_linear(linear(5, 14, dtype=torch.float64))
    x = torch.randn(2, 14, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(lambda x: layer(x) ** 2, (x,))


def test_training_an_adapter_beside_it_lowers_the_loss_and_leaves_the_weight() -> None:
    torch.manual_seed(0)
    layer = NF4Linear.from_linear(linear()).requires_grad_(False)
    before = copy.deepcopy(layer)
    adapter = nn.Sequential(nn.Linear(96, 8, bias=False), nn.Linear(8, 64, bias=False))
    x, target = torch.randn(32, 96), torch.randn(32, 64)
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (layer(x) + adapter(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    same_bytes(before, layer)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 4096])
def test_meta_layers_have_the_sizes_of_real_ones(block_size: int, double_quant: bool) -> None:
    for kind in (NF4Linear, NF4Embedding):
        meta, real = (kind(65, 33, block_size=block_size, double_quant=double_quant, device=d) for d in ("meta", "cpu"))
        for (name, x), (_, y) in zip(meta.named_buffers(), real.named_buffers(), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        assert repr(meta) == repr(real)


def test_nothing_warns_on_the_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = NF4Linear.from_linear(linear())
        NF4Linear(96, 64).load_state_dict(layer.state_dict())
        layer.half().float().eval()(torch.randn(1, 96))
        assert tlkernels.nn.NF4Linear is NF4Linear
