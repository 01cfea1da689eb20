"""quantize_model and memory_report."""

from __future__ import annotations

import copy
import gc
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import formula
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import tlkernels
from tlkernels import ops
from tlkernels.nn import NF4Embedding, NF4Linear
from tlkernels.nn import quantize as quantize_module


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Language(nn.Module):
    """Embedding, blocks, an output head that may be tied to the embedding."""

    def __init__(self, vocabulary: int = 50, width: int = 48, depth: int = 3, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.blocks(self.embed(tokens)))


def language(**kwargs: Any) -> Language:
    torch.manual_seed(0)
    return Language(**kwargs)


def quantized(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, (NF4Linear, NF4Embedding))]


LINEARS = [f"blocks.{i}.{layer}" for i in range(3) for layer in ("up", "down")]
TOKENS = torch.arange(20).view(2, 10)


def dense_twin(model: nn.Module, like: nn.Module) -> nn.Module:
    """`like` with the weights that the formula says `model` holds (block size 64, double-quantized)."""
    twin = copy.deepcopy(like).double()
    for name in quantized(model):
        w = like.get_submodule(name).weight.detach()
        packed, absmax = formula.nf4_quantize(w)
        absmax = formula.absmax_dequantize(*formula.absmax_quantize(absmax))
        w = formula.nf4_dequantize(packed, absmax, tuple(w.shape), torch.float32)
        twin.get_submodule(name).weight.data.copy_(w)
    return twin


@pytest.mark.parametrize("embeddings", [False, True])
def test_model_computes_with_the_formulas_weights(embeddings: bool) -> None:
    dense = language()
    model = copy.deepcopy(dense)
    assert tlkernels.quantize_model(model, embeddings=embeddings) is model
    assert quantized(model) == ["embed"] * embeddings + LINEARS
    expected = dense_twin(model, dense)(TOKENS)
    assert (model(TOKENS).double() - expected).norm() / expected.norm() < 1e-6
    for name in quantized(model):
        assert model.get_submodule(name).block_size == 64 and model.get_submodule(name).double_quant


def test_options_reach_the_layers() -> None:
    model = tlkernels.quantize_model(language(), ["up"], embeddings=["embed"], block_size=128, double_quant=False)
    assert quantized(model) == ["embed", *(n for n in LINEARS if "down" in n), "lm_head"]
    assert all(m.block_size == 128 and not m.double_quant for m in map(model.get_submodule, quantized(model)))
    assert model.embed.padding_idx == 0


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["lm_head"], []),
        (["*.down"], ["blocks.0.down", "blocks.1.down", "blocks.2.down"]),
        (["down"], ["blocks.0.down", "blocks.1.down", "blocks.2.down"]),
        (["blocks.1"], ["blocks.1.up", "blocks.1.down"]),
        (["1"], ["blocks.1.up", "blocks.1.down"]),
        (["blocks.[01].up"], ["blocks.0.up", "blocks.1.up"]),
        (["blocks"], LINEARS),
    ],
)
def test_skip_patterns(skip: list[str], left: list[str]) -> None:
    model = tlkernels.quantize_model(language(), skip)
    expected = [n for n in LINEARS if n not in left] + (["lm_head"] if skip != ["lm_head"] else [])
    assert quantized(model) == expected


def test_a_pattern_that_matches_nothing_is_named() -> None:
    with pytest.warns(UserWarning, match="no module matches the pattern 'lmhead'"):
        tlkernels.quantize_model(language(), ["lmhead"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tlkernels.quantize_model(Block(48))  # the default pattern may match nothing


def test_idempotent() -> None:
    model = tlkernels.quantize_model(language())
    layers = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    assert tlkernels.quantize_model(model) is model
    assert dict(model.named_modules()) == layers
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_a_single_layer_is_returned_anew() -> None:
    assert isinstance(tlkernels.quantize_model(nn.Linear(4, 4)), NF4Linear)
    assert isinstance(tlkernels.quantize_model(nn.Embedding(4, 4), embeddings=True), NF4Embedding)


def test_biases_modes_and_hooks_are_kept() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    bias = model[0].bias.requires_grad_(False)
    model[1].eval()
    calls = []
    handle = model[0].register_forward_hook(lambda module, args, output: calls.append(type(module)))
    model[1].register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    tlkernels.quantize_model(model)
    assert model[0].bias is bias and not bias.requires_grad and model[0].training and not model[1].training
    model(torch.zeros(1, 8))
    assert calls == [NF4Linear, {}]
    handle.remove()
    model(torch.zeros(1, 8))
    assert calls == [NF4Linear, {}, {}]


def test_dense_weights_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    alive = weakref.WeakSet(layer.weight for layer in model)
    counts, original = [], ops.nf4_quantize

    def counted(w: Tensor, **kwargs: Any) -> ops.NF4Weight:
        gc.collect()
        counts.append(len(alive))
        return original(w, **kwargs)

    monkeypatch.setattr(quantize_module.ops, "nf4_quantize", counted)
    tlkernels.quantize_model(model)
    assert counts == [6, 5, 4, 3, 2, 1] and len(alive) == 0


# ---- tied and shared ------------------------------------------------------------------------------------------------


def test_a_head_tied_to_a_dense_embedding_stays() -> None:
    model = language(tied=True)
    with pytest.warns(UserWarning, match=r"lm_head.weight stays dense: it is tied to embed.weight"):
        tlkernels.quantize_model(model, skip=())
    assert quantized(model) == LINEARS and model.lm_head.weight is model.embed.weight


def test_an_embedding_tied_to_a_skipped_head_stays() -> None:
    model = language(tied=True)
    with pytest.warns(UserWarning, match=r"embed.weight stays dense: it is tied to lm_head.weight"):
        tlkernels.quantize_model(model, embeddings=True)
    assert model.lm_head.weight is model.embed.weight


def test_a_tie_between_quantized_layers_is_kept() -> None:
    dense = language(tied=True)
    model = tlkernels.quantize_model(copy.deepcopy(dense), skip=(), embeddings=True)
    assert quantized(model) == ["embed", *LINEARS, "lm_head"]
    expected = dense_twin(model, dense)(TOKENS)
    assert (model(TOKENS).double() - expected).norm() / expected.norm() < 1e-6
    for moved in (model, copy.deepcopy(model), model.half().float()):
        assert moved.embed.packed.data_ptr() == moved.lm_head.packed.data_ptr()
    assert tlkernels.memory_report(model).weights == 50 * 48 + 3 * 4 * 48 * 48  # the table counts once


def test_a_raw_parameter_counts_as_a_tie() -> None:
    model = Block(8)
    model.alias = model.up.weight
    with pytest.warns(UserWarning, match="up.weight stays dense: it is tied to alias"):
        tlkernels.quantize_model(model)
    assert quantized(model) == ["down"]


def test_a_layer_in_two_places_stays_one_layer() -> None:
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "b": nn.ModuleList([layer])})
    tlkernels.quantize_model(model)
    assert isinstance(model["a"], NF4Linear) and model["b"][0] is model["a"]


# ---- what must not be replaced --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("container", [False, True])
def test_torchs_transformer_layers(container: bool, training: bool, mask: bool) -> None:
    """Their fused paths read the weights of linear1, linear2 and out_proj; each must come out as on the plain path."""
    torch.manual_seed(0)
    dense: nn.Module = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
    if container:
        dense = nn.TransformerEncoder(dense, 2)
    model = copy.deepcopy(dense)
    with pytest.warns(
        UserWarning, match=r"self_attn.out_proj stays dense: torch.nn.MultiheadAttention reads its weight"
    ):
        tlkernels.quantize_model(model)
    names = quantized(model)
    assert len(names) == (4 if container else 2) and all("linear" in name for name in names)
    x, padding = torch.randn(3, 7, 64), torch.arange(7).expand(3, 7) >= torch.tensor([[5], [7], [4]])
    kwargs = {"src_key_padding_mask": padding} if mask else {}
    twin = dense_twin(model, dense).train()  # train: never the fused path
    keep = ~padding if mask else torch.ones_like(padding)
    with torch.set_grad_enabled(training):
        y = model.train(training)(x, **kwargs)
        expected = twin(x.double(), **kwargs)
    assert y.shape == x.shape
    assert (y.double() - expected)[keep].norm() / expected[keep].norm() < 1e-6


def test_torchs_transformer_layer_compiles_and_exports() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval()
    with pytest.warns(UserWarning, match="out_proj"):
        tlkernels.quantize_model(model)
    x = torch.randn(3, 7, 64)
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y)
        for strict in (False, True):
            torch.testing.assert_close(torch.export.export(model, (x,), strict=strict).module()(x), y)


def test_multihead_attention_is_untouched() -> None:
    dense = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    model = copy.deepcopy(dense)
    with pytest.warns(UserWarning, match="out_proj"):
        assert quantized(tlkernels.quantize_model(model)) == []
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        assert torch.equal(model(x, x, x)[0], dense(x, x, x)[0])


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced_forward() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: Scaled(4, 4), "Scaled is a subclass"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizedLinear is a subclass"),
        (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), "its weight is computed by a hook"),
        (replaced_forward, "its forward was replaced"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm writes to its weight"),
        (
            lambda: nn.Embedding.from_pretrained(torch.zeros(4, 4, dtype=torch.complex64)),
            "its weight has dtype complex64",
        ),
    ],
)
def test_layers_with_a_meaning_of_their_own_stay_and_are_named(layer: Callable[[], nn.Module], why: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer())
    with pytest.warns(UserWarning, match=f"1 stays dense: {why}"):
        tlkernels.quantize_model(model, embeddings=True)
    assert quantized(model) == ["0"]


def test_transformers_models_that_look_at_the_weights_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 converts the input of `wo` to the dtype of its weight, unless it is told to stay dense."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    dense = T5EncoderModel(config).eval()
    model = tlkernels.quantize_model(copy.deepcopy(dense))
    assert quantized(model) and not any(name.endswith("wo") for name in quantized(model))
    with torch.no_grad():
        expected = dense_twin(model, dense)(TOKENS).last_hidden_state
        y = model(TOKENS).last_hidden_state
    assert (y.double() - expected).norm() / expected.norm() < 1e-5


def test_a_model_on_the_meta_device_takes_a_checkpoint() -> None:
    model = tlkernels.quantize_model(language(), embeddings=True)
    with torch.device("meta"):
        skeleton = Language()
    tlkernels.quantize_model(skeleton, embeddings=True)
    assert all(t.is_meta for t in (*skeleton.parameters(), *skeleton.buffers()))
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(skeleton(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("kwargs", "error", "sentence"),
    [
        ({"model": torch.zeros(2)}, TypeError, "model is a Tensor; expected a torch.nn.Module"),
        ({"skip": "lm_head"}, TypeError, r"skip is 'lm_head'; expected a sequence of patterns"),
        ({"embeddings": "embed"}, TypeError, r"embeddings is 'embed'; expected a sequence of patterns"),
        ({"block_size": 48}, ValueError, "quantize_model: block_size is 48; expected a power of two"),
    ],
)
def test_wrong_calls(kwargs: dict[str, Any], error: type[Exception], sentence: str) -> None:
    model = language()
    with pytest.raises(error, match=sentence):
        tlkernels.quantize_model(**{"model": model, **kwargs})
    assert quantized(model) == []


# ---- progress -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["rich", "tqdm"])
def test_progress_bar_on_stderr(
    library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = quantize_module.importlib.util.find_spec
    monkeypatch.setattr(
        quantize_module.importlib.util, "find_spec", lambda n: None if n in {"rich", "tqdm"} - {library} else found(n)
    )
    monkeypatch.setenv("FORCE_COLOR", "1")
    tlkernels.quantize_model(language(), progress=True)
    out, err = capsys.readouterr()
    assert "quantizing" in err and "%" in err and not out


def test_no_bar_unless_stderr_is_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tlkernels.quantize_model(language())
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    tlkernels.quantize_model(language(), progress=False)
    assert capsys.readouterr() == ("", "")
    tlkernels.quantize_model(language())
    assert "quantizing" in capsys.readouterr().err


def test_progress_needs_a_library_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs rich or tqdm; install one with"):
        tlkernels.quantize_model(language(), progress=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert quantized(tlkernels.quantize_model(language())) == LINEARS


def test_nn_imports_no_optional_dependency() -> None:
    import subprocess

    code = (
        "import sys, torch; before = set(sys.modules);"
        "import tlkernels.nn.quantize, tlkernels.integrations.bitsandbytes;"
        "new = set(sys.modules) - before;"
        "print([m for m in ('rich', 'tqdm', 'transformers', 'bitsandbytes', 'safetensors') if m in new])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# ---- memory_report --------------------------------------------------------------------------------------------------


def test_memory_report_counts_every_byte() -> None:
    model = nn.Sequential(nn.Linear(96, 64), nn.BatchNorm1d(64), nn.Linear(64, 33, bias=False))
    dense = tlkernels.memory_report(model)
    weights, others = 96 * 64 + 64 * 33, 64 + 2 * 64
    buffers = 2 * 64 * 4 + 8
    assert (dense.weights, dense.codes, dense.bits_per_weight) == (0, 0, None)
    assert dense.total == dense.float32 == 4 * (weights + others) + buffers
    report = tlkernels.memory_report(tlkernels.quantize_model(model))
    blocks = (96, 33)
    assert report.layers == 2 and report.weights == weights and report.codes == weights // 2
    assert report.scales == sum(b + 4 + 4 for b in blocks)  # 8 bits a block, one second-level scale and an offset each
    assert report.parameters == 4 * others and report.buffers == buffers
    assert report.total == report.codes + report.scales + report.parameters + report.buffers
    assert report.float32 == dense.float32 and report.bfloat16 == 2 * (weights + others) + buffers
    assert report.bits_per_weight == pytest.approx(8 * (report.codes + report.scales) / weights)
    plain = tlkernels.memory_report(NF4Linear(1024, 1024, bias=False, double_quant=False))
    assert plain.bits_per_weight == 4.5
    nested = tlkernels.memory_report(NF4Linear(1024, 1024, bias=False))
    assert nested.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_memory_report_prints_a_table() -> None:
    lines = str(tlkernels.memory_report(NF4Linear(1024, 1024))).splitlines()
    assert [line.split("  ")[0].strip() for line in lines if not line.startswith("-")] == [
        "4-bit codes", "scales", "other parameters", "buffers", "total", "in bfloat16", "in float32",
    ]  # fmt: skip
    assert "512.00 KiB" in lines[0] and "1,048,576 weights in 1 layer" in lines[0]
    assert "4.127 bits a weight" in lines[1] and "7.70 x the total" in lines[-1]
    assert "x the total" not in str(tlkernels.memory_report(nn.Identity()))


def test_memory_report_on_meta_and_wrong_calls() -> None:
    model = language()
    here = tlkernels.memory_report(tlkernels.quantize_model(model))
    assert tlkernels.memory_report(model.to("meta")) == here
    with pytest.raises(TypeError, match=r"memory_report: model is a dict; expected a torch.nn.Module"):
        tlkernels.memory_report({})
