"""Prompts, prefixes, selected parameters, random subspaces, AdaLoRA, optimizers: against PEFT and closed forms."""

from __future__ import annotations

import copy
import sys
from typing import Any

import peft
import pytest
import scipy.linalg
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

from tlkernels.methods.peft.adalora import AdaLoRAConfig, AdaLoRALinear, RankAllocator, orthogonality_penalty
from tlkernels.methods.peft.apply import apply, merge, unmerge
from tlkernels.methods.peft.intrinsic import Fastfood, IntrinsicModel, fast_walsh_hadamard
from tlkernels.methods.peft.lora import LoRAConfig
from tlkernels.methods.peft.optim import loraplus_groups, qlora_optimizer
from tlkernels.methods.peft.prompts import PrefixTuning, PromptTuning
from tlkernels.methods.peft.selective import bitfit, ln_tuning


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> Any:
    """With grouped keys and values, two heads of queries to one."""
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, initializer_range=0.3, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def batch() -> tuple[Tensor, Tensor]:
    """Ids and a mask that hides two of them at the left."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    return torch.randint(1, 40, (2, 7)), mask


# ---- prompts and prefixes -------------------------------------------------------------------------------------------


def in_peft(model: nn.Module, config: Any, values: Tensor) -> Any:
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    wrapped.prompt_encoder["default"].embedding.weight.data.copy_(values)
    return wrapped


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_causal_parity_with_peft(make: Any, kind: str) -> None:
    model, (ids, mask) = make(), batch()
    if kind == "prompt":
        ours: Any = PromptTuning(copy.deepcopy(model), 3, init="vocab")
        config: Any = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        own: nn.Parameter = ours.prompt
    else:
        ours = PrefixTuning(copy.deepcopy(model), 3)
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        own = ours.prefix
    ours.eval()
    theirs = in_peft(model, config, own.detach())
    out, ref = (m(input_ids=ids, attention_mask=mask, labels=ids) for m in (ours, theirs))
    assert out.logits.shape[1] == (10 if kind == "prompt" else 7)
    torch.testing.assert_close(out.logits, ref.logits)
    torch.testing.assert_close(out.loss, ref.loss)
    plain = model(ids, attention_mask=mask).logits
    assert not torch.allclose(out.logits[:, -7:], plain, atol=1e-2)
    grad = torch.randn_like(out.logits)
    out.logits.backward(grad)
    ref.logits.backward(grad)
    other = theirs.prompt_encoder["default"].embedding.weight
    assert own.grad is not None and own.grad.abs().max() > 1e-3
    torch.testing.assert_close(own.grad, other.grad)
    assert [name for name, p in ours.named_parameters() if p.grad is not None] == [kind]


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("kind", [PromptTuning, PrefixTuning])
def test_generate(make: Any, kind: Any) -> None:
    model, (ids, mask) = make(), batch()
    ours = kind(model, 3)
    if kind is PrefixTuning:
        config: Any = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        theirs = in_peft(model, config, ours.prefix.detach())
    else:
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        theirs = in_peft(model, config, ours.prompt.detach())
    ours.eval()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    new = ours.generate(ids, mask, **options)
    other = theirs.generate(input_ids=ids, attention_mask=mask, **options)[:, 7:]
    # PEFT counts a prompt's positions through the padding, as if it were text: its other row is another
    rows = slice(None) if kind is PrefixTuning else slice(1)
    assert torch.equal(new[rows], other[rows])
    for row in (0, 1):  # the same as one call for each token of the row alone, without its padding
        text = ids[row : row + 1, mask[row] == 1]
        for token in new[row]:
            assert ours(text).logits[0, -1].argmax() == token
            text = torch.cat([text, token[None, None]], dim=1)
            if token == 0:
                break
    detailed = ours.generate(ids, mask, return_dict_in_generate=True, **options)
    assert torch.equal(detailed.sequences, new)
    beams = ours.generate(ids[:1], num_beams=3, num_return_sequences=2, **options)
    whole = theirs.generate(input_ids=ids[:1], num_beams=3, num_return_sequences=2, **options)
    assert beams.shape[0] == 2 and torch.equal(beams, whole[:, 7:])


def test_prefix_projection_parity_with_peft() -> None:
    model, (ids, mask) = gpt2(), batch()
    ours = PrefixTuning(copy.deepcopy(model), 3, projection_size=20).eval()
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=20
    )
    theirs = in_peft(model, config, ours.prefix.detach())
    assert ours.projection is not None
    theirs.prompt_encoder["default"].transform.load_state_dict(ours.projection.state_dict())
    out = ours(ids, mask).logits
    torch.testing.assert_close(out, theirs(input_ids=ids, attention_mask=mask).logits)
    out.backward(torch.randn_like(out))
    assert all(p.grad is not None for p in ours.prompt_parameters().values())
    ours.fold_()
    assert ours.projection is None and list(ours.prompt_parameters()) == ["prefix"]
    torch.testing.assert_close(ours(ids, mask).logits, out)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_prefix_in_an_encoder(implementation: str) -> None:
    """In BERT: every layer's attention, written down, and PEFT's model."""
    model, (ids, mask) = bert(), batch()
    model.set_attn_implementation(implementation)
    ours = PrefixTuning(copy.deepcopy(model), 3, modules_to_save=["classifier"]).eval()
    out = ours(ids, mask).logits
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    theirs = in_peft(model, config, ours.prefix.detach())
    torch.testing.assert_close(out, theirs(input_ids=ids, attention_mask=mask).logits, rtol=1e-4, atol=1e-5)

    network, prefix = model.bert, ours.virtual_prefix()
    hidden = network.embeddings(input_ids=ids, position_ids=torch.arange(3, 10)[None])
    seen = torch.cat([torch.ones(2, 3), mask], dim=1).bool()[:, None, None, :]
    for layer, (key, value) in zip(network.encoder.layer, prefix, strict=True):
        attention = layer.attention.self
        q, k, v = (
            project(hidden).view(2, 7, 4, 8).transpose(1, 2)
            for project in (attention.query, attention.key, attention.value)
        )
        k, v = torch.cat([key.expand(2, -1, -1, -1), k], 2), torch.cat([value.expand(2, -1, -1, -1), v], 2)
        scores = (q @ k.mT / 8**0.5).masked_fill(~seen, -torch.inf)
        context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 32)
        attended = layer.attention.output(context, hidden)
        hidden = layer.output(layer.intermediate(attended), attended)
    torch.testing.assert_close(out, model.classifier(network.pooler(hidden)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, ours(ids).logits, atol=1e-3)  # the mask matters
    assert not torch.allclose(out, model(ids, attention_mask=mask).logits, atol=1e-3)  # and so does the prefix
    out.backward(torch.randn_like(out))
    trained = {name for name, p in ours.named_parameters() if p.grad is not None}
    assert trained == {"prefix", "model.classifier.weight", "model.classifier.bias"}


def test_prompt_in_an_encoder() -> None:
    model, (ids, mask) = bert(), batch()
    ours = PromptTuning(copy.deepcopy(model), 4, init="vocab").eval()
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    theirs = in_peft(model, config, ours.prompt.detach())
    labels = torch.tensor([2, 0])
    out, ref = (m(input_ids=ids, attention_mask=mask, labels=labels) for m in (ours, theirs))
    torch.testing.assert_close(out.logits, ref.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, ref.loss)
    typed = ours(ids, mask, token_type_ids=torch.ones_like(ids)).logits
    types = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    embeds = torch.cat([ours.prompt.expand(2, -1, -1), model.get_input_embeddings()(ids)], dim=1)
    full = torch.cat([torch.ones(2, 4, dtype=torch.long), mask], 1)
    want = model(inputs_embeds=embeds, attention_mask=full, token_type_ids=types).logits
    torch.testing.assert_close(typed, want)


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_p_tuning_parity_with_peft(kind: str) -> None:
    model, (ids, mask) = gpt2(), batch()
    ours = PromptTuning(copy.deepcopy(model), 3, encoder=kind, encoder_hidden_size=20).eval()
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_reparameterization_type=kind.upper(),
        encoder_hidden_size=20, encoder_num_layers=2, encoder_dropout=0.0,
    )  # fmt: skip
    theirs = in_peft(model, config, ours.prompt.detach())
    encoder = theirs.prompt_encoder["default"]
    encoder.mlp_head.load_state_dict(ours.encoder.mlp.state_dict())  # type: ignore[union-attr]
    if kind == "lstm":
        encoder.lstm_head.load_state_dict(ours.encoder.lstm.state_dict())  # type: ignore[union-attr]
    torch.testing.assert_close(
        ours(ids, mask).logits, theirs(input_ids=ids, attention_mask=mask).logits, rtol=1e-4, atol=1e-5
    )


def test_prompt_initial_values() -> None:
    model = gpt2()
    table = model.get_input_embeddings().weight
    text = PromptTuning(model, 5, init=torch.tensor([7, 3]))
    assert torch.equal(text.prompt, table[[7, 3, 7, 3, 7]])
    assert torch.equal(PromptTuning(model, 2, init=torch.tensor([4, 5, 6])).prompt, table[[4, 5]])
    vocab = PromptTuning(model, 6, init="vocab").prompt
    assert bool((vocab[:, None] == table).all(-1).any(-1).all())
    first, second = (
        PromptTuning(model, 400, generator=torch.Generator().manual_seed(5)).prompt.detach() for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.std().item() == pytest.approx(table.std().item(), rel=0.05)
    given = torch.randn(2, 32)
    assert torch.equal(PromptTuning(model, 2, init=given).prompt, given)


@pytest.mark.parametrize("kind", [PromptTuning, PrefixTuning])
def test_prompts_learn_and_leave_the_model_alone(kind: Any) -> None:
    model, (ids, mask) = gpt2(), batch()
    model.lm_head.weight.requires_grad_(False)  # tied to the embeddings
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    prompted = kind(model, 4)
    optimizer = torch.optim.Adam(prompted.prompt_parameters().values(), lr=0.1)
    losses = []
    for _ in range(12):
        loss = prompted(ids, mask, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert prompted.restore() is model
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_prefix_positions_and_half_precision() -> None:
    model, (ids, _) = gpt2(), batch()
    prompted = PrefixTuning(model, 3).eval()
    positions = torch.arange(7)[None].expand(2, -1)
    torch.testing.assert_close(prompted(ids, position_ids=positions).logits, prompted(ids).logits)
    low = PrefixTuning(llama().bfloat16(), 3)
    assert low.prefix.dtype == torch.float32
    out = low(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert low.prefix.grad is not None and bool(torch.isfinite(low.prefix.grad).all())


def test_prompts_wrong_calls() -> None:
    model, (ids, mask) = gpt2(), batch()
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    distilbert = transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    )
    for make, error, message in [
        (lambda: PromptTuning(nn.Linear(2, 2), 3), TypeError, "model is a Linear; expected a model of transformers"),
        (lambda: PromptTuning(model, 0), ValueError, "num_virtual_tokens is 0; expected 1 or more"),
        (lambda: PromptTuning(model, 2, modules_to_save="h"), TypeError, "modules_to_save is 'h'"),
        (lambda: PromptTuning(model, 2, modules_to_save=["x"]), ValueError, "modules_to_save has 'x', which is no"),
        (lambda: PromptTuning(model, 2, init="zeros"), ValueError, "init is 'zeros'; expected 'random', 'vocab'"),
        (lambda: PromptTuning(model, 2, init=torch.tensor([40])), ValueError, "all from 0 to 39"),
        (
            lambda: PromptTuning(model, 2, init=torch.ones(2, 3)),
            ValueError,
            r"init has shape \(2, 3\); expected \(2, 32",
        ),
        (lambda: PromptTuning(model, 2, encoder="gru"), ValueError, "encoder is 'gru'; expected 'mlp', 'lstm'"),
        (lambda: PromptTuning(t5, 2), ValueError, "model is an encoder-decoder"),
        (lambda: PrefixTuning(t5, 2), ValueError, "model is an encoder-decoder"),
        (lambda: PrefixTuning(distilbert, 2), ValueError, "DistilBertModel takes no past_key_values"),
        (lambda: PrefixTuning(model, 2, projection_size=0), ValueError, "projection_size is 0; expected 1 or more"),
    ]:
        with pytest.raises(error, match=message):
            make()
    assert all(p.requires_grad for p in model.parameters())
    prompted, prefixed = PromptTuning(model, 2), PrefixTuning(gpt2(), 2)
    for call, message in [
        (lambda: prompted(), "expected input_ids or inputs_embeds, and not both"),
        (lambda: prompted(ids, mask[:, 1:]), r"attention_mask has shape \(2, 6\); expected \(2, 7\), like the input"),
        (lambda: prompted(ids, position_ids=ids), "position_ids is given; expected None"),
        (lambda: prefixed(ids, past_key_values=prefixed.cache(2)), "past_key_values is given; expected None"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="model is a BertForSequenceClassification; expected a causal language model"):
        PromptTuning(bert(), 2).generate(ids)
    prefixed.model.gradient_checkpointing_enable()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="gradient checkpointing"):
        prefixed.train()(ids)


# ---- BitFit and LN-tuning -------------------------------------------------------------------------------------------


def test_bitfit_is_what_peft_trains_with_all_biases() -> None:
    model = bert()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["query"], bias="all"))
    want = {
        name.removeprefix("base_model.model.").replace("base_layer.", "")
        for name, p in theirs.named_parameters() if p.requires_grad and "lora_" not in name
    }  # fmt: skip
    selection = bitfit(model)
    assert set(selection.names) == want and len(want) > 10
    assert {name for name, p in model.named_parameters() if p.requires_grad} == want
    assert selection.trainable == sum(model.get_parameter(name).numel() for name in want)
    assert selection.report().startswith(f"{selection.trainable} of {selection.total} weights train")
    assert "2 x query.bias: 64" in selection.report()


def test_bitfit_of_a_linear_model_in_closed_form() -> None:
    """One step of the length of the curvature's inverse: the bias becomes the mean of the residuals."""
    model = nn.Linear(5, 2).double()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    selection = bitfit(model)
    weight = model.weight.detach().clone()
    ((model(x) - y).square().sum(1).mean() / 2).backward()
    torch.optim.SGD(selection.parameters(), lr=1.0).step()
    torch.testing.assert_close(model.bias.detach(), (y - x @ weight.T).mean(0))
    assert torch.equal(model.weight, weight) and model.weight.grad is None


def test_bitfit_subset_and_state() -> None:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    selection = bitfit(model, ["query", "intermediate.dense"], modules_to_save=["classifier"])
    kinds = {name.split(".", 4)[-1] if "layer" in name else name for name in selection.names}
    assert kinds == {
        "attention.self.query.bias", "intermediate.dense.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip
    for p in selection.parameters():
        p.data.add_(1.0)
    task = {name: value.clone() for name, value in selection.state_dict().items()}
    assert task.keys() == set(selection.names)
    selection.reset()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    selection.load_state_dict(task)
    assert torch.equal(model.classifier.bias, before["classifier.bias"] + 1)
    with pytest.raises(ValueError, match=r"classifier\.bias has shape \(1,\); expected \(3,\)"):
        selection.load_state_dict({**task, "classifier.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="extra is in the state or selected, not both"):
        selection.load_state_dict({**task, "extra": torch.zeros(1)})
    selection.restore()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_ln_tuning_trains_as_peft_does() -> None:
    model, (ids, mask) = bert(), batch()
    config = peft.LNTuningConfig(target_modules=["LayerNorm"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    selection = ln_tuning(model)
    assert selection.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    labels = torch.tensor([0, 2])
    for net, parameters in (
        (model, selection.parameters()),
        (theirs.eval(), [p for p in theirs.parameters() if p.requires_grad]),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            optimizer.step()
    out = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(out, theirs(input_ids=ids, attention_mask=mask).logits)
    selection.reset()
    assert not torch.allclose(out, model(ids, attention_mask=mask).logits, atol=1e-3)


def test_ln_tuning_finds_norms_of_other_classes() -> None:
    model = llama()
    assert len(ln_tuning(model).names) == 5 and all("norm" in name for name in ln_tuning(model).names)
    mixed = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.RMSNorm(4))
    assert ln_tuning(mixed, bias=False).names == ("0.weight", "2.weight", "3.weight")
    assert ln_tuning(mixed, ["2"]).names == ("2.weight", "2.bias")


def test_selection_wrong_calls() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    for call, error, message in [
        (lambda: bitfit("model"), TypeError, "bitfit: model is a str"),  # type: ignore[arg-type]
        (lambda: bitfit(model, "query"), TypeError, "subset is 'query'; expected a sequence of patterns"),
        (lambda: bitfit(model, ["query"]), ValueError, "subset has 'query', which matches no bias of the model"),
        (lambda: ln_tuning(model, ["0"]), ValueError, "subset has '0', which matches no norm of the model"),
        (lambda: ln_tuning(nn.Linear(2, 2)), ValueError, r"subset has '\*', which matches no norm"),
        (lambda: bitfit(model, modules_to_save=["head"]), ValueError, "modules_to_save has 'head', which matches no"),
        (lambda: bitfit(model, []), ValueError, "nothing is selected"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert all(p.requires_grad for p in model.parameters())


# ---- random subspaces -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 8, 64, 128, 1024])
def test_fast_walsh_hadamard(n: int) -> None:
    x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
    h = torch.from_numpy(scipy.linalg.hadamard(n)).double()
    y = fast_walsh_hadamard(x)
    torch.testing.assert_close(y, x @ h.T)
    torch.testing.assert_close(fast_walsh_hadamard(y), n * x)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ h)


@pytest.mark.parametrize(("d", "size"), [(5, 13), (16, 16), (20, 7), (1, 1), (3, 64)])
def test_fastfood_is_its_dense_matrix(d: int, size: int) -> None:
    fastfood = Fastfood(d, size, seed=3)
    n = len(fastfood.signs)
    assert n >= max(d, size) > n // 2
    h = torch.from_numpy(scipy.linalg.hadamard(n)).double()
    pi = torch.eye(n, dtype=torch.float64)[fastfood.permutation.long()]
    g, b = torch.diag(fastfood.gaussian.double()), torch.diag(fastfood.signs.double())
    p = (h @ g @ pi @ h @ b)[:size, :d] / (size * n) ** 0.5
    x = torch.randn(4, d, dtype=torch.float64, requires_grad=True)
    y = fastfood(x)
    torch.testing.assert_close(y, x @ p.T)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ p)
    if size == n:
        torch.testing.assert_close(p.norm(dim=0), torch.ones(d, dtype=torch.float64), rtol=1e-6, atol=0)
    assert set(fastfood.signs.tolist()) <= {-1, 1} and sorted(fastfood.permutation.tolist()) == list(range(n))
    assert not fastfood.state_dict()


def test_fastfood_is_orthonormal_in_expectation() -> None:
    d, size, draws = 4, 24, 800
    mean = torch.zeros(d, d, dtype=torch.float64)
    for seed in range(draws):
        p = Fastfood(d, size, seed=seed)(torch.eye(d, dtype=torch.float64)).T
        mean += p.T @ p / draws
    # An entry of P'P has a standard deviation of about sqrt(2 / size); five of their mean's
    bound = 5 * (2 / size) ** 0.5 / draws**0.5
    torch.testing.assert_close(mean, torch.eye(d, dtype=torch.float64), rtol=0, atol=bound)


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("structure_aware", [False, True])
def test_intrinsic_gradient_is_the_projected_one(structure_aware: bool) -> None:
    plain = small_model()
    x, grad = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    plain(x).backward(grad)
    full = {name: p.grad.flatten() for name, p in plain.named_parameters() if p.grad is not None}
    start = copy.deepcopy(plain.state_dict())
    model = IntrinsicModel(plain, 12, structure_aware=structure_aware, seed=4).double()
    assert torch.equal(model(x), plain(x))  # theta_d is zero
    model(x).backward(grad)
    blocks = {
        name: f(torch.eye(len(model.theta), dtype=torch.float64)).T * (full[name].numel() / 83) ** 0.5
        for name, f in zip(full, model.projections, strict=True)
    }
    want = sum((block.T @ full[name] for name, block in blocks.items()), torch.zeros(()))
    torch.testing.assert_close(model.theta.grad, want)
    assert len(model.theta) == (10 if structure_aware else 12)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12
    with torch.no_grad():
        model.theta.normal_()
        if model.layer_scale is not None:
            model.layer_scale.copy_(torch.tensor([0.5, -2.0]))
    scale = {"0": 0.5, "2": -2.0} if structure_aware else {"0": 1.0, "2": 1.0}
    for name, delta in model.deltas().items():
        torch.testing.assert_close(delta.flatten(), scale[name[0]] * blocks[name] @ model.theta)
    out = model(x)
    assert not torch.allclose(out, plain(x), atol=1e-3)
    model.zero_grad()
    out.backward(grad)
    if model.layer_scale is not None:  # its gradient: that of the weights along each layer's step
        moved = copy.deepcopy(plain).requires_grad_(True)
        for name, delta in model.deltas().items():
            moved.get_parameter(name).data.add_(delta.detach())
        moved(x).backward(grad)
        along = [
            sum((moved.get_parameter(n).grad.flatten() @ blocks[n] @ model.theta).item()  # type: ignore[union-attr]
                for n in blocks if n.startswith(layer))
            for layer in ("0", "2")
        ]  # fmt: skip
        torch.testing.assert_close(model.layer_scale.grad, torch.tensor(along, dtype=torch.float64))
    assert all(torch.equal(start[name], value) for name, value in plain.state_dict().items())
    merged = model.merge()
    assert merged is plain and all(p.requires_grad for p in plain.parameters())
    torch.testing.assert_close(plain(x), out)
    torch.testing.assert_close(model(x), out)  # from here on


def test_intrinsic_whole_matrix_is_near_orthonormal() -> None:
    model = IntrinsicModel(nn.Sequential(nn.Linear(60, 70), nn.Linear(70, 10)), 3, seed=1)
    columns = []
    for i in range(3):
        with torch.no_grad():
            model.theta.zero_()[i] = 1.0
        columns.append(torch.cat([delta.flatten() for delta in model.deltas().values()]).detach())
    p = torch.stack(columns, 1)
    torch.testing.assert_close(p.T @ p, torch.eye(3), rtol=0, atol=0.1)


def test_intrinsic_reaches_the_optimum_of_its_subspace() -> None:
    """Least squares in the subspace, against the normal equations."""
    linear = nn.Linear(7, 1, bias=False).double()
    x, y = torch.randn(40, 7, dtype=torch.float64), torch.randn(40, 1, dtype=torch.float64)
    start = linear.weight.detach().clone()
    model = IntrinsicModel(nn.Sequential(linear), 3, seed=2).double()
    p = model.projections[0](torch.eye(3, dtype=torch.float64)).T
    best = torch.linalg.lstsq(x @ p, y - x @ start.T).solution.flatten()
    optimizer = torch.optim.LBFGS([model.theta], lr=1.0, max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(model.theta.detach(), best, rtol=1e-5, atol=1e-7)


def test_intrinsic_modules_to_save_and_tied_weights() -> None:
    model = IntrinsicModel(bert(), 20, modules_to_save=["classifier"])
    ids, mask = batch()
    model(ids, attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"theta", "model.classifier.weight", "model.classifier.bias"}
    tied = IntrinsicModel(gpt2(), 5)
    with torch.no_grad():
        tied.theta.normal_()
    out = tied(ids).logits
    tied.merge()
    torch.testing.assert_close(tied.model(ids).logits, out, rtol=1e-3, atol=1e-4)


def test_intrinsic_wrong_calls() -> None:
    with pytest.raises(ValueError, match="x has 6 elements in its last dimension; expected a power of two"):
        fast_walsh_hadamard(torch.zeros(6))
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        fast_walsh_hadamard(torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="Fastfood: in_features is 0; expected >= 1"):
        Fastfood(0, 4)
    with pytest.raises(ValueError, match="Fastfood: input has 3 features; expected 2"):
        Fastfood(2, 4)(torch.zeros(3))
    model = small_model()
    for fields, message in [
        ({"dimension": 0}, "dimension is 0; expected 1 to 83"),
        ({"dimension": 84}, "dimension is 84; expected 1 to 83"),
        ({"dimension": 2, "structure_aware": True}, "dimension is 2; expected 3 to 85, 2 of them for the layers'"),
        ({"dimension": 2, "modules_to_save": ["x"]}, "modules_to_save has 'x', which matches no parameter"),
        ({"dimension": 2, "modules_to_save": ["*"]}, "no parameter is left to project"),
    ]:
        with pytest.raises(ValueError, match=message):
            IntrinsicModel(model, **fields)  # type: ignore[arg-type]
    assert all(p.requires_grad for p in model.parameters())


# ---- AdaLoRA --------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


SCHEDULE: dict[str, Any] = {"target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "beta1": 0.8, "beta2": 0.9}


def test_adalora_trains_as_peft_does() -> None:
    """The same losses, masks and factors, in each of 12 steps, before, while and after the budget falls."""
    ours = Two()
    config = peft.AdaLoraConfig(
        target_modules=["first", "second"], init_r=4, lora_alpha=8, total_step=12, orth_reg_weight=0.1, **SCHEDULE
    )
    theirs = peft.get_peft_model(copy.deepcopy(ours), config)
    apply(ours, AdaLoRAConfig(target_modules=["first", "second"], init_r=4, lora_alpha=8.0))
    factors = [
        (ours.get_parameter(f"{layer}.lora_{f}"), theirs.get_parameter(f"base_model.model.{layer}.lora_{f}.default"))
        for layer in ("first", "second") for f in "AEB"
    ]  # fmt: skip
    for p, q in factors:
        q.data.copy_(p)
    allocator = RankAllocator(ours, total_steps=12, **SCHEDULE)
    optimizers = [torch.optim.Adam([pair[i] for pair in factors], lr=0.05) for i in range(2)]
    kept = []
    for step in range(1, 13):
        x, y = torch.randn(10, 12), torch.randn(10, 8)
        losses = [(model(x) - y).square().mean() for model in (ours, theirs)]
        penalties = [
            orthogonality_penalty(ours, squared=False),
            sum(
                torch.norm((q @ q.T if q.shape[0] == 4 else q.T @ q) - torch.eye(4))
                for q in (factors[i][1] for i in (0, 2, 3, 5))
            ) / 4,
        ]  # fmt: skip
        torch.testing.assert_close(*penalties)
        for loss, penalty, optimizer in zip(losses, penalties, optimizers, strict=True):
            (loss + 0.1 * penalty).backward()
            optimizer.step()
        budget = allocator.step()
        theirs.base_model.update_and_allocate(step)
        assert budget == theirs.base_model.rankallocator.budget_schedule(step)[0]
        for p, q in factors:
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
            assert torch.equal(p == 0, q == 0)
        kept.append(sum(allocator.ranks().values()))
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert kept[0] == 8 and kept[-1] == 4 and sorted(kept, reverse=True) == kept and len(set(kept)) > 2


def test_adalora_layer_equation_and_merge() -> None:
    layer = AdaLoRALinear(nn.Linear(10, 6), 3, lora_alpha=6.0).double()
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer.lora_E, torch.zeros(3, 1))
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    for p in (layer.lora_A, layer.lora_E, layer.lora_B):
        p.data.normal_()
    want = layer.base_layer(x) + 2.0 * x @ (layer.lora_B @ torch.diag(layer.lora_E[:, 0]) @ layer.lora_A).T
    out = layer(x)
    torch.testing.assert_close(out, want)
    wrt, grad = [x, layer.lora_A, layer.lora_E, layer.lora_B], torch.randn_like(out)
    for got, ref in zip(torch.autograd.grad(out, wrt, grad), torch.autograd.grad(want, wrt, grad), strict=True):
        torch.testing.assert_close(got, ref)
    model = nn.Sequential(layer)
    merge(model)
    torch.testing.assert_close(model(x), out)
    unmerge(model)
    torch.testing.assert_close(model(x), out)


def test_adalora_scores_budget_and_penalty() -> None:
    model = Two()
    apply(model, AdaLoRAConfig(target_modules=["first", "second"], init_r=3))
    layer = model.first
    assert isinstance(layer, AdaLoRALinear)
    allocator = RankAllocator(model, target_r=1, total_steps=20, tinit=5, tfinal=5, beta1=0.7, beta2=0.6)
    assert [allocator.budget(t) for t in (1, 5, 6, 10, 15, 16, 20)] == [6, 6, int(2 + 4 * 0.9**3), 2, 2, 2, 2]
    averages: list[tuple[Tensor, Tensor]] = [(torch.zeros(()), torch.zeros(()))] * 3
    for _ in range(3):
        factors = (layer.lora_A, layer.lora_E, layer.lora_B)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_()
                p.grad = torch.randn_like(p)
        for i, p in enumerate(factors):
            assert p.grad is not None
            now = (p * p.grad).abs().detach()
            mean = 0.7 * averages[i][0] + 0.3 * now
            averages[i] = (mean, 0.6 * averages[i][1] + 0.4 * (now - mean).abs())
        allocator.step()
    s = [mean * spread for mean, spread in averages]
    torch.testing.assert_close(allocator.scores()["first"], s[1][:, 0] + s[2].mean(0) + s[0].mean(1))
    want = sum(
        ((f @ f.T) - torch.eye(3)).square().sum()
        for m in (model.first, model.second) for f in (m.lora_A, m.lora_B.T)  # type: ignore[union-attr,operator]
    )  # fmt: skip
    torch.testing.assert_close(orthogonality_penalty(model), want)


def test_adalora_resume() -> None:
    def train(allocator: RankAllocator, model: nn.Module, steps: int) -> None:
        for _ in range(steps):
            torch.manual_seed(allocator.step_count)
            for p in model.parameters():
                if p.requires_grad:
                    p.data.add_(0.1 * torch.randn_like(p))
                    p.grad = torch.randn_like(p)
            allocator.step()

    model = Two()
    apply(model, AdaLoRAConfig(target_modules=["first", "second"], init_r=4))
    allocator = RankAllocator(model, total_steps=12, **SCHEDULE)
    train(allocator, model, 6)
    other = copy.deepcopy(model)
    resumed = RankAllocator(other, total_steps=12, **SCHEDULE)
    resumed.load_state_dict(copy.deepcopy(allocator.state_dict()))
    train(allocator, model, 6)
    train(resumed, other, 6)
    assert resumed.ranks() == allocator.ranks() and sum(allocator.ranks().values()) == 4
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="the state is of other layers"):
        lone = nn.Sequential(AdaLoRALinear(nn.Linear(5, 5), 2))
        RankAllocator(lone, target_r=1, total_steps=2).load_state_dict(allocator.state_dict())


def test_adalora_wrong_calls() -> None:
    with pytest.raises(ValueError, match="model has no AdaLoRA layers"):
        RankAllocator(Two(), target_r=1, total_steps=5)
    model = Two()
    apply(model, AdaLoRAConfig(target_modules=["first", "second"], init_r=4))
    for fields, message in [
        ({"target_r": 5, "total_steps": 5}, "target_r is 5; expected 1 to 4, the initial rank"),
        ({"target_r": 1, "total_steps": 5, "tinit": 3, "tfinal": 2}, "are 3, 2 and 5; expected"),
        ({"target_r": 1, "total_steps": 5, "deltaT": 0}, "deltaT is 0; expected 1 or more"),
        ({"target_r": 1, "total_steps": 5, "beta2": 1.0}, "beta2 is 1.0; expected 0 < beta2 < 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            RankAllocator(model, **fields)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="a factor has no gradient; expected a call after backward"):
        RankAllocator(model, target_r=1, total_steps=5).step()
    with pytest.raises(ValueError, match="AdaLoRAConfig: init_r is 0; expected 1 or more"):
        apply(Two(), AdaLoRAConfig(init_r=0))
    with pytest.raises(ValueError, match="AdaLoRAConfig: second: AdaLoRALinear: rank is 9; expected 1 to"):
        apply(Two(), AdaLoRAConfig(init_r=9, target_modules=["second"]))


# ---- optimizers -----------------------------------------------------------------------------------------------------


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.norm, self.head = (
            nn.Embedding(20, 8),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.fc(self.table(x))))


def test_loraplus_groups_are_those_of_peft() -> None:
    fields: dict[str, Any] = {"r": 2, "target_modules": ["table", "fc"], "modules_to_save": ["head", "norm"]}
    theirs = peft.get_peft_model(Embedded(), peft.LoraConfig(**fields))
    numbers = {"loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 3e-5}
    reference = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, **numbers)

    def described(groups: list[dict[str, Any]]) -> list[Any]:
        return sorted((tuple(p.shape), group["lr"], group["weight_decay"]) for group in groups for p in group["params"])

    for model in (theirs, Embedded()):  # PEFT's model and this library's
        if model is not theirs:
            apply(model, LoRAConfig(**fields))
        groups = loraplus_groups(model, 1e-3, 8.0, lr_embedding=3e-5, weight_decay=0.1)
        assert described(groups) == described(reference.param_groups)
        assert [group["name"] for group in groups] == ["lora_a", "embedding", "lora_b", "no_decay"]
        torch.optim.AdamW(groups)


def test_loraplus_wrong_calls() -> None:
    with pytest.raises(ValueError, match="lr_ratio is 0; expected more than 0"):
        loraplus_groups(Two(), 1e-3, 0)
    with pytest.raises(ValueError, match="weight_decay is -1; expected 0 or more"):
        loraplus_groups(Two(), 1e-3, weight_decay=-1)
    with pytest.raises(ValueError, match="no parameter of model requires gradients"):
        loraplus_groups(Two().requires_grad_(False), 1e-3)


def trained(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"bits": 32}, "torch.optim.AdamW"),
        ({"bits": 8}, "bitsandbytes.optim.AdamW8bit"),
        ({"bits": 8, "library": "torchao"}, "torchao.optim.AdamW8bit"),
        ({"bits": 4}, "torchao.optim.AdamW4bit"),
    ],
)
def test_qlora_optimizer_steps_as_adamw_does(options: dict[str, Any], name: str) -> None:
    start = torch.randn(128, 64)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    picked = qlora_optimizer([p], 1e-2, weight_decay=0.1, **options)
    assert picked.name == name and f"{options['bits']} bits" in picked.reason
    assert type(picked.optimizer).__name__ == name.rsplit(".", 1)[1]
    with torch.compiler.set_stance("force_eager"):  # torchao's step; compiling it takes ten seconds
        got = trained(picked.optimizer, p)
    want = trained(torch.optim.AdamW([q], 1e-2, weight_decay=0.1), q)
    step = (want - start).norm()
    assert (got - want).norm() < {32: 1e-6, 8: 0.03, 4: 0.3}[options["bits"]] * step
    state = sum(
        t.element_size() * t.numel() if options["bits"] == 32 else t.untyped_storage().nbytes()
        for t in picked.optimizer.state[p].values()
        if isinstance(t, Tensor) and t.dim() and name.startswith(("torch.", "bitsandbytes"))
    )
    if state:
        assert state < {32: 8.1, 8: 2.4}[options["bits"]] * p.numel()


def test_qlora_optimizer_takes_modules_and_groups() -> None:
    model = Two()
    model.first.requires_grad_(False)
    picked = qlora_optimizer(model, bits=32)
    assert sum(len(group["params"]) for group in picked.optimizer.param_groups) == 2
    apply(other := Two(), LoRAConfig(r=2))
    groups = qlora_optimizer(loraplus_groups(other, 1e-3, 10.0), bits=8).optimizer.param_groups
    assert [group["lr"] for group in groups] == [1e-3, 1e-2]


def test_qlora_optimizer_without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.zeros(4, 4))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    picked = qlora_optimizer([p], bits=8)
    assert picked.name == "torchao.optim.AdamW8bit" and picked.reason.endswith("bitsandbytes is not installed")
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(
        ImportError, match="bits=8, paged=False needs bitsandbytes or torchao: pip install bitsandbytes"
    ):
        qlora_optimizer([p], bits=8)
    with pytest.raises(ImportError, match="bits=4, paged=False needs torchao: pip install torchao"):
        qlora_optimizer([p], bits=4)


def test_qlora_optimizer_wrong_calls() -> None:
    p = nn.Parameter(torch.zeros(4, 4))
    meta = nn.Parameter(torch.zeros(4, 4, device="meta"))
    for params, options, error, message in [
        ([p], {"bits": 2}, ValueError, "bits is 2; expected 8, 4 or 32"),
        ([p], {"lr": 0.0}, ValueError, r"lr is 0\.0; expected more than 0"),
        ([p], {"library": "apex"}, ValueError, "library is 'apex'; expected 'bitsandbytes'"),
        ([p], {"library": "torch"}, ValueError, "torch has no AdamW with bits=8, paged=False"),
        ([p], {"paged": True}, ValueError, "paged is True for parameters on cpu; expected a CUDA device"),
        ([p, meta], {}, ValueError, "the parameters are on cpu and meta; expected one kind of device"),
        ([], {}, ValueError, "params is empty"),
        ([p, {"params": [p]}], {}, TypeError, "params mixes groups and parameters"),
    ]:
        with pytest.raises(error, match=message):
            qlora_optimizer(params, **options)  # type: ignore[arg-type]
