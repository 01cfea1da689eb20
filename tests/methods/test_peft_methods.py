"""Adapters, AdapterFusion, VeRA, OFT, IA3: against their closed forms and the PEFT library."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from tlkernels.methods.peft._dense import DenseTuner
from tlkernels.methods.peft._tuner import TunerConfig
from tlkernels.methods.peft.adapters import (
    Adapter,
    AdapterConfig,
    AdapterFusion,
    AdapterFusionConfig,
    AdapterFusionLayer,
    AdapterLayer,
    adapters_of,
    bottleneck,
)
from tlkernels.methods.peft.apply import apply, merge, remove, trainable_parameters, unmerge
from tlkernels.methods.peft.ia3 import IA3Config, IA3Linear
from tlkernels.methods.peft.oft import OFTConfig, OFTLinear, cayley
from tlkernels.methods.peft.vera import VeraConfig, VeraLinear, VeraProjection
from tlkernels.nn import NF4Linear

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda z: nn.functional.gelu(z, approximate="tanh"),
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def bert(**fields: Any) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, **fields,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2Model(config).eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    return transformers.LlamaModel(config).eval()


def ids() -> Tensor:
    return torch.randint(40, (2, 6))


class Two(nn.Module):
    """Two linear layers of unequal size, as PEFT and this library are to adapt them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


# ---- the fused bottleneck -------------------------------------------------------------------------------------------


def make_bottleneck(dtype: torch.dtype = torch.float64, out: int = 7) -> dict[str, Tensor]:
    shapes = {"h": (2, 3, 6), "w_down": (4, 6), "b_down": (4,), "w_up": (out, 4), "b_up": (out,)}
    return {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("residual", ["none", "another", "itself"])
def test_bottleneck_closed_form(activation: str, residual: str) -> None:
    t = make_bottleneck(out=6 if residual == "itself" else 7)
    h0 = {
        "none": None,
        "another": torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True),
        "itself": t["h"],
    }[residual]
    y = bottleneck(**t, residual=h0, activation=activation, scaling=-1.7)
    sigma = ACTIVATIONS[activation]
    ref = -1.7 * (sigma(t["h"] @ t["w_down"].T + t["b_down"]) @ t["w_up"].T + t["b_up"]) + (0 if h0 is None else h0)
    torch.testing.assert_close(y, ref, rtol=1e-13, atol=1e-13)
    wrt = [*t.values()] + ([h0] if h0 is not None and residual == "another" else [])
    grad = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad(y, wrt, grad), torch.autograd.grad(ref, wrt, grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "tanh"])
def test_bottleneck_gradcheck(activation: str) -> None:
    t = make_bottleneck(out=6)

    def serial(h: Tensor, *weights: Tensor) -> Tensor:
        return bottleneck(h, *weights, residual=h, activation=activation, scaling=0.6)

    assert torch.autograd.gradcheck(serial, tuple(t.values()))


def test_bottleneck_without_biases() -> None:
    t = make_bottleneck()
    y = bottleneck(t["h"], t["w_down"], None, t["w_up"], None, activation="silu")
    torch.testing.assert_close(y, nn.functional.silu(t["h"] @ t["w_down"].T) @ t["w_up"].T)
    y.backward(torch.randn_like(y))
    assert t["w_down"].grad is not None and t["b_down"].grad is None


def saved_bytes(function: Any) -> dict[int, int]:
    """What autograd keeps for the backward pass: the storages, by address, with their sizes."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function().sum()
        return {pointer: t.untyped_storage().nbytes() for pointer, t in kept.items()}


def test_bottleneck_saves_input_and_preactivation_only() -> None:
    rows, features, rank = 128, 96, 8
    h = torch.randn(rows, features, requires_grad=True)
    adapter = Adapter(features, rank, activation="gelu")
    nn.init.normal_(adapter.up.weight)
    held = {p.untyped_storage().data_ptr() for p in [h, *adapter.parameters()]}

    def extra(function: Any) -> int:
        return sum(size for pointer, size in saved_bytes(function).items() if pointer not in held)

    assert extra(lambda: adapter(h, residual=h)) == 4 * rows * rank  # beyond h itself and the weights: z alone
    composed = extra(lambda: h + 2.0 * adapter.up(nn.functional.gelu(adapter.down(h))))
    assert composed == 4 * 2 * rows * rank  # z and gelu(z)


def test_bottleneck_half_precision_and_autocast() -> None:
    t = {name: v.detach().float().requires_grad_() for name, v in make_bottleneck().items()}
    y = bottleneck(t["h"].bfloat16(), *list(t.values())[1:], activation="gelu")
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = bottleneck(*t.values(), activation="gelu")
    assert torch.equal(auto, y)
    auto.backward(torch.randn_like(auto))
    assert t["w_up"].grad is not None and t["w_up"].grad.dtype == torch.float32


def test_bottleneck_twice_differentiated_raises() -> None:
    t = make_bottleneck()
    (grad,) = torch.autograd.grad(bottleneck(**t).square().sum(), t["h"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bottleneck_wrong_calls() -> None:
    t = {name: v.detach() for name, v in make_bottleneck().items()}
    for change, error, message in [
        ({"h": t["h"].long()}, TypeError, "h has dtype torch.int64; expected a floating-point dtype"),
        ({"activation": "swish"}, ValueError, "activation is 'swish'; expected one of relu, gelu"),
        ({"w_down": t["w_down"].T}, ValueError, r"w_down has shape \(6, 4\); expected \(r, 6\)"),
        ({"w_up": t["w_up"].T}, ValueError, r"w_up has shape \(4, 7\); expected \(out, 4\)"),
        ({"b_up": t["b_down"]}, ValueError, r"b_up has shape \(4,\); expected \(7,\)"),
        ({"residual": t["h"]}, ValueError, r"residual has shape \(2, 3, 6\); expected \(2, 3, 7\)"),
        ({"residual": torch.zeros(2, 3, 7)}, TypeError, "residual has dtype torch.float32; expected torch.float64"),
    ]:
        with pytest.raises(error, match=message):
            bottleneck(**{**t, **change})


# ---- adapters in models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_norm", ["none", "before", "after"])
@pytest.mark.parametrize("scaling", [0.5, "learned"])
def test_adapter_equation(layer_norm: str, scaling: float | str) -> None:
    adapter = Adapter(10, 3, activation="silu", init="kaiming", scaling=scaling, layer_norm=layer_norm).double()
    if adapter.norm is not None:
        nn.init.normal_(adapter.norm.weight)
    h = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    norm = adapter.norm or nn.Identity()
    a = norm(h) if layer_norm == "before" else h
    a = adapter.up(nn.functional.silu(adapter.down(a)))
    a = norm(a) if layer_norm == "after" else a
    ref = h + (0.5 if adapter.scale is None else adapter.scale) * a
    out = adapter(h, residual=h)
    torch.testing.assert_close(out, ref)
    wrt = [h, *adapter.parameters()]
    grad = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad(out, wrt, grad), torch.autograd.grad(ref, wrt, grad), strict=True):
        torch.testing.assert_close(got, want)


def test_adapter_initial_values() -> None:
    h = torch.randn(5, 64)
    assert torch.equal(Adapter(64, 8)(h, residual=h), h)
    small = Adapter(64, 8, init="small")
    difference = (small(h, residual=h) - h).abs().max()
    assert 0 < difference < 0.1 and small.down.weight.abs().max() <= 0.02 and not small.down.bias.any()
    kaiming = Adapter(64, 8, init="kaiming")
    assert kaiming.up.weight.abs().max() > 0.1
    learned = Adapter(64, 8, scaling="learned")
    assert learned.scale is not None and learned.scale.item() == 1.0


def test_adapter_dropout_is_of_the_bottleneck_alone() -> None:
    adapter = Adapter(50, 4, init="kaiming", dropout=0.5)
    h = torch.randn(200, 50)
    dropped = adapter(h, residual=h) - h
    whole = adapter.eval()(h, residual=h) - h
    zero = dropped == 0
    assert 0.45 < zero.float().mean() < 0.55
    torch.testing.assert_close(dropped[~zero], 2 * whole[~zero], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "config", "where"),
    [
        (bert, AdapterConfig.houlsby(rank=4), ["attention.output.dense", "output.dense"]),
        (bert, AdapterConfig.pfeiffer(reduction_factor=8), ["output.dense"]),
        (gpt2, AdapterConfig.houlsby(), ["attn.c_proj", "mlp.c_proj"]),
        (llama, AdapterConfig.pfeiffer(), ["mlp.down_proj"]),
        (gpt2, AdapterConfig.parallel_to_feedforward(32, rank=5), ["mlp"]),
        (llama, AdapterConfig.parallel_to_feedforward(32, rank=5), ["mlp"]),
    ],
)
def test_adapter_config_in_models(model: Any, config: AdapterConfig, where: list[str]) -> None:
    net, tokens = model(), ids()
    before = net(tokens).last_hidden_state
    names = [name for name, _ in net.named_parameters()]
    applied = apply(net, config)
    assert len(applied.targets) == 2 * len(where)
    ends = {".".join(name.split(".")[-len(end.split(".")) :]) for name in applied.targets for end in where}
    assert set(where) <= ends
    if where == ["output.dense"]:
        assert not any("attention" in name for name in applied.targets)
    assert torch.equal(net(tokens).last_hidden_state, before)  # near-identity, here exactly
    layers = [m for m in net.modules() if isinstance(m, AdapterLayer)]
    rank = layers[0].adapter.rank
    assert rank == {4: 4, None: max(1, int(32 / config.reduction_factor)), 5: 5}[config.rank]
    assert trainable_parameters(net).trainable == len(layers) * (2 * 32 * rank + rank + 32)
    for layer in layers:
        nn.init.normal_(layer.adapter.up.weight)
    assert not torch.allclose(net(tokens).last_hidden_state, before)
    net.train()
    net(tokens).last_hidden_state.square().sum().backward()
    trained = {name for name, p in net.named_parameters() if p.grad is not None}
    assert trained and all(".adapter." in name for name in trained)
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        merge(net)
    remove(net).eval()
    assert [name for name, _ in net.named_parameters()] == names
    assert torch.equal(net(tokens).last_hidden_state, before)


def other_models() -> dict[str, nn.Module]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}
    image = {"image_size": 32, "patch_size": 16}
    small = {"n_embd": 16, "n_layer": 3, "n_head": 2, "rotary_dim": 4}
    with torch.device("meta"):
        return {
            "vit": transformers.ViTModel(transformers.ViTConfig(**sizes, **image)),
            "clip": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, **image)),
            "neox": transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**sizes, **ids)),
            "gptj": transformers.GPTJModel(transformers.GPTJConfig(**small, **ids)),
            "bloom": transformers.BloomModel(transformers.BloomConfig(hidden_size=16, n_layer=3, n_head=2, **ids)),
            "opt": transformers.OPTModel(
                transformers.OPTConfig(hidden_size=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=2, **ids)
            ),
            "distilbert": transformers.DistilBertModel(
                transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=3, n_heads=2, hidden_dim=32)
            ),
        }


def test_places_in_other_models() -> None:
    """One place after each attention and each feed-forward, and all of them before a residual connection."""
    for name, model in other_models().items():
        both, second = AdapterConfig.houlsby().targets(model), AdapterConfig.pfeiffer().targets(model)
        assert (len(both), len(second)) == (6, 3) and set(second) < set(both), name
        assert all(isinstance(module, nn.Linear) and module.out_features == model.config.hidden_size  # type: ignore
                   for module in both.values()), name  # fmt: skip
        assert not any("att" in place for place in second), name


def test_adapters_take_over_the_mode() -> None:
    for training in (False, True):
        net = Two().train(training)
        apply(net, AdapterConfig(target_modules=["first"], rank=2, dropout=0.5))
        assert all(module.training == training for module in net.modules())


def test_serial_adapter_is_after_the_projection_and_before_the_residual() -> None:
    net = bert()
    hidden, states = torch.randn(2, 5, 32), torch.randn(2, 5, 64)
    output = net.encoder.layer[0].output  # type: ignore[union-attr,index]
    dense, norm = output.dense, output.LayerNorm
    apply(net, AdapterConfig.pfeiffer(rank=3, activation="tanh", init="kaiming"))
    adapter = output.dense.adapter
    f = dense(states)
    want = norm(f + adapter.up(torch.tanh(adapter.down(f))) + hidden)
    torch.testing.assert_close(output(states, hidden), want)


def test_parallel_adapter_reads_the_input() -> None:
    base = nn.Linear(6, 4)
    layer = AdapterLayer(base, Adapter(6, 2, 4, init="kaiming", scaling=4.0), parallel=True)
    x = torch.randn(3, 6)
    want = base(x) + 4.0 * layer.adapter.up(torch.relu(layer.adapter.down(x)))
    torch.testing.assert_close(layer(x), want)


def test_adapter_of_a_module_that_returns_a_tuple() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return 2 * x, "rest"

    layer = AdapterLayer(Block(), Adapter(6, 2, init="kaiming"))
    x = torch.randn(3, 6)
    hidden, rest = layer(x)
    assert rest == "rest"
    torch.testing.assert_close(hidden, 2 * x + layer.adapter(2 * x))


def test_adapters_work_in_torch_transformer_layers() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 16)
    apply(net, AdapterConfig(target_modules=["linear2"], rank=2, init="kaiming"))
    with torch.inference_mode():
        fast = net(x)
    torch.testing.assert_close(fast, net.train().eval()(x), rtol=1e-5, atol=1e-5)
    net.requires_grad_(True)
    torch.testing.assert_close(fast, net(x).detach(), rtol=1e-5, atol=1e-5)


def test_adapter_wrong_calls() -> None:
    for fields, message in [
        ({"rank": 0}, "rank is 0; expected 1 or more"),
        ({"init": "ones"}, "init is 'ones'; expected one of zero, small, kaiming"),
        ({"scaling": "free"}, "scaling is 'free'; expected a number, or 'learned'"),
        ({"layer_norm": True}, "layer_norm is True; expected one of none, before, after"),
        ({"dropout": 1.0}, "dropout is 1.0; expected 0 <= dropout < 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Adapter(8, **{"rank": 2, **fields})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"AdapterConfig: {message}"):
            apply(Two(), AdapterConfig(target_modules=["first"], **fields))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction_factor is 0; expected more than 0"):
        apply(Two(), AdapterConfig(reduction_factor=0))
    with pytest.raises(TypeError, match=r"AdapterConfig: embeddings.*BertEmbeddings; expected a linear layer, or feat"):
        apply(bert(), AdapterConfig(target_modules=["embeddings"]))
    with pytest.raises(ValueError, match="adapter goes from 8 to 8 features; expected 40 to 40"):
        AdapterLayer(Two().first, Adapter(8, 2))


# ---- AdapterFusion --------------------------------------------------------------------------------------------------


def test_fusion_closed_form() -> None:
    fusion = AdapterFusion(6).double()
    nn.init.normal_(fusion.value.weight)
    h, z = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (2, 3, 4, 6)))
    q, k, v = fusion.query(h), fusion.key(z), fusion.value(z)
    alpha = torch.softmax(torch.einsum("bsd,bsnd->bsn", q, k), dim=-1)
    want = torch.einsum("bsn,bsnd->bsd", alpha, v)
    out = fusion(h, z)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(fusion.weights(h, z), alpha)
    wrt, grad = [h, z, *fusion.parameters()], torch.randn_like(out)
    for got, ref in zip(torch.autograd.grad(out, wrt, grad), torch.autograd.grad(want, wrt, grad), strict=True):
        torch.testing.assert_close(got, ref)
    # torch's own attention, one query to four keys, without its scaling
    sdpa = nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, scale=1.0)[:, :, 0]
    torch.testing.assert_close(out, sdpa)


def test_fusion_starts_with_an_average_of_the_adapters() -> None:
    fusion = AdapterFusion(5)
    z = torch.randn(7, 1, 5).expand(7, 3, 5)  # all adapters say the same
    torch.testing.assert_close(fusion(torch.randn(7, 5), z), z[:, 0])
    assert fusion.value_penalty().item() == 0.0
    with torch.no_grad():
        fusion.value.weight.mul_(3.0)
    assert fusion.value_penalty().item() == pytest.approx(4.0 * 5)


def test_fusion_of_two_tasks_in_bert() -> None:
    tokens, tasks = ids(), []
    for seed in (1, 2):
        torch.manual_seed(0)
        net = bert()
        torch.manual_seed(seed)
        apply(net, AdapterConfig.pfeiffer(rank=3, init="kaiming"))
        tasks.append(adapters_of(net))
    torch.manual_seed(0)
    net = bert()
    apply(net, AdapterFusionConfig(target_modules=list(tasks[0]), adapters=tasks))
    layers = [m for m in net.modules() if isinstance(m, AdapterFusionLayer)]
    assert len(layers) == 2
    assert trainable_parameters(net).trainable == 2 * (3 * 32 * 32 + 32)
    states = torch.randn(1, 4, 64)
    f = layers[0].base_layer(states)
    name = next(iter(tasks[0]))
    outputs = torch.stack([task[name](f, residual=f) for task in tasks], dim=-2)
    torch.testing.assert_close(layers[0](states), layers[0].fusion(f, outputs))
    net(tokens).last_hidden_state.square().sum().backward()
    assert all(
        ("fusion." in name) == (p.grad is not None) for name, p in net.named_parameters() if "pooler" not in name
    )


def test_fusion_wrong_calls() -> None:
    with pytest.raises(ValueError, match="adapters is empty; expected the adapters of one task"):
        apply(Two(), AdapterFusionConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match=r"adapters\[0\] has none for second; expected one"):
        apply(Two(), AdapterFusionConfig(target_modules=["second"], adapters=[{"first": Adapter(40, 2)}]))
    with pytest.raises(ValueError, match="adapter 1 goes from 4 to 4 features; expected 40, like fusion"):
        AdapterFusionLayer(Two().first, [Adapter(40, 2), Adapter(4, 2)], AdapterFusion(40))
    with pytest.raises(ValueError, match="model has no serial adapters"):
        adapters_of(Two())


# ---- VeRA, OFT, IA3: parity with PEFT -------------------------------------------------------------------------------


def peft_vera(model: nn.Module) -> Any:
    return peft.get_peft_model(
        model, peft.VeraConfig(r=5, target_modules=["first", "second"], projection_prng_key=42, save_projection=False)
    )


def peft_oft(model: nn.Module) -> Any:
    config = peft.OFTConfig(
        r=0, oft_block_size=4, target_modules=["first", "second"], use_cayley_neumann=False, module_dropout=0.0
    )
    return peft.get_peft_model(model, config)


def peft_oft_shared(model: nn.Module) -> Any:
    config = peft.OFTConfig(
        r=0, oft_block_size=8, target_modules=["first", "second"], use_cayley_neumann=False, block_share=True
    )
    return peft.get_peft_model(model, config)


def peft_ia3(model: nn.Module) -> Any:
    config = peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"])
    return peft.get_peft_model(model, config)


PEFT: dict[str, tuple[Any, TunerConfig, dict[str, str], float]] = {
    # name: PEFT's model, our config, our parameters' names in PEFT's layers, how far from their start
    "vera": (
        peft_vera, VeraConfig(r=5, target_modules=["first", "second"], projection_prng_key=42),
        {"scale_d": "vera_lambda_d.default", "scale_b": "vera_lambda_b.default"}, 1.0,
    ),
    "oft": (
        peft_oft, OFTConfig(oft_block_size=4, target_modules=["first", "second"]),
        {"rotation": "oft_R.default.weight"}, 0.4,
    ),
    "oft shared": (
        peft_oft_shared, OFTConfig(oft_block_size=8, target_modules=["first", "second"], block_share=True),
        {"rotation": "oft_R.default.weight"}, 0.4,
    ),
    "ia3": (
        peft_ia3, IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
        {"scale": "ia3_l.default"}, 0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", list(PEFT))
def test_parity_with_peft(method: str) -> None:
    build, config, names, spread = PEFT[method]
    ours = Two()
    theirs = build(copy.deepcopy(ours))
    apply(ours, config)
    x = torch.randn(3, 5, 24)
    plain = Two.forward(ours, x)
    torch.testing.assert_close(plain, theirs(x))  # both start at the frozen model
    own = dict(ours.named_parameters())
    pairs = [
        (own[f"{layer}.{name}"], theirs.get_parameter(f"base_model.model.{layer}.{other}"))
        for layer in ("first", "second") for name, other in names.items()
    ]  # fmt: skip
    with torch.no_grad():
        for p, q in pairs:
            p.add_(torch.randn_like(p), alpha=spread)
            q.copy_(p.view_as(q))
    out, ref = ours(x), theirs(x)
    assert not torch.allclose(out, plain, atol=1e-3)
    torch.testing.assert_close(out, ref, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(out)
    out.backward(grad)
    ref.backward(grad)
    for p, q in pairs:
        assert p.grad is not None and q.grad is not None and p.grad.abs().max() > 1e-3
        torch.testing.assert_close(p.grad, q.grad.view_as(p.grad), rtol=1e-4, atol=1e-5)
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == {
        f"{layer}.{name}" for layer in ("first", "second") for name in names
    }
    before = {name: p.detach().clone() for name, p in ours.named_parameters() if "base_layer" in name}
    merge(ours)
    theirs.merge_adapter()
    torch.testing.assert_close(ours(x), out, rtol=1e-4, atol=1e-5)
    for layer in ("first", "second"):
        got, want = ours.get_submodule(f"{layer}.base_layer"), theirs.get_submodule(f"base_model.model.{layer}")
        torch.testing.assert_close(got.weight, want.base_layer.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.bias, want.base_layer.bias, rtol=1e-5, atol=1e-6)
    unmerge(ours)
    assert all(torch.equal(before[name], p) for name, p in ours.named_parameters() if name in before)
    torch.testing.assert_close(ours(x), out)


@pytest.mark.parametrize("method", ["vera", "oft", "ia3"])
def test_conv1d_is_the_linear_layer_with_its_weight_transposed(method: str) -> None:
    conv1d = transformers.pytorch_utils.Conv1D(12, 8)  # type: ignore[attr-defined]
    nn.init.normal_(conv1d.bias)
    linear = nn.Linear(8, 12)
    with torch.no_grad():
        linear.weight.copy_(conv1d.weight.T)
        linear.bias.copy_(conv1d.bias)
    make = {
        "vera": lambda m: VeraLinear(m, VeraProjection(3, 8, 12)),
        "oft": lambda m: OFTLinear(m, block_size=4),
        "ia3": IA3Linear,
    }[method]
    one, other = make(conv1d), make(linear)
    for p, q in zip(dict(one.adapter_parameters()).values(), dict(other.adapter_parameters()).values(), strict=True):
        p.data.normal_()
        q.data.copy_(p)
    x = torch.randn(4, 8)
    out = one(x)
    torch.testing.assert_close(out, other(x))
    one.merge()
    torch.testing.assert_close(one(x), out, rtol=1e-4, atol=1e-5)
    assert conv1d.weight.shape == (8, 12)


@pytest.mark.parametrize("config", [VeraConfig(r=4), OFTConfig(oft_block_size=8), IA3Config()])
def test_on_a_4bit_base(config: TunerConfig) -> None:
    model = nn.Sequential(NF4Linear.from_linear(nn.Linear(64, 32)))
    apply(model, config)
    layer = model[0]
    assert isinstance(layer, DenseTuner)
    for _, p in layer.adapter_parameters():
        p.data.normal_()
    x = torch.randn(3, 64, requires_grad=True)
    dense = nn.Linear(64, 32)
    dense.weight.data.copy_(layer.base_layer.dequantize())  # type: ignore[operator]
    dense.bias.data.copy_(layer.base_layer.bias.data)  # type: ignore[union-attr]
    other = config.wrap("0", dense)
    other.load_state_dict(dict(layer.adapter_parameters()), strict=False)
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match=r"merge: 0: .*NF4Linear; merging needs a layer with a dense weight"):
        merge(model)


def test_merge_of_values_that_are_not_finite_changes_nothing() -> None:
    model = Two()
    apply(model, IA3Config(target_modules=["first", "second"]))
    before = copy.deepcopy(model.state_dict())
    model.second.scale.data[1] = torch.inf  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="merge: second: IA3Linear: scale has values that are not finite"):
        merge(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if "second.scale" not in k)
    assert not any(m.merged for m in model.modules() if isinstance(m, DenseTuner))


def test_ia3_merges_a_zero_and_takes_it_out_again() -> None:
    layer = IA3Linear(nn.Linear(4, 3))
    weight = layer.base_layer.weight.detach().clone()  # type: ignore[operator]
    layer.scale.data[0] = 0.0
    x = torch.randn(2, 4)
    out = layer(x)
    layer.merge()
    layer.merge()  # the second one does nothing
    torch.testing.assert_close(layer(x), out)
    with pytest.raises(RuntimeError, match="the update is merged; unmerge before loading"):
        layer.load_state_dict(layer.state_dict())
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)  # type: ignore[arg-type]


# ---- what each of the three promises beyond parity ------------------------------------------------------------------


def test_vera_projection_is_shared_and_sliced() -> None:
    model = Two()
    apply(model, VeraConfig(r=6, target_modules=["first", "second"], projection_prng_key=3))
    first, second = model.first, model.second
    assert isinstance(first, VeraLinear) and isinstance(second, VeraLinear)
    assert first.projection is second.projection
    assert first.projection.a.shape == (6, 40) and first.projection.b.shape == (40, 6)
    assert trainable_parameters(model).trainable == (6 + 40) + (6 + 8)
    assert not any("projection" in name for name in model.state_dict())
    assert first.projection.a.abs().max() <= (6 / 40) ** 0.5
    twin = copy.deepcopy(model)
    assert twin.first.projection is twin.second.projection  # type: ignore[union-attr]


def test_vera_gradcheck_and_saved_memory() -> None:
    layer = VeraLinear(nn.Linear(6, 5), VeraProjection(3, 8, 9)).double()
    layer.scale_b.data.normal_()
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, d: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"scale_d": d, "scale_b": b}, (x,))

    assert torch.autograd.gradcheck(call, (x, layer.scale_d, layer.scale_b))
    big = VeraLinear(nn.Linear(64, 96), VeraProjection(4, 64, 96))
    h = torch.randn(128, 64)
    held = {t.untyped_storage().data_ptr() for t in [h, *big.parameters(), *big.buffers()]}
    kept = saved_bytes(lambda: big(h))
    assert sum(size for pointer, size in kept.items() if pointer not in held) == 4 * 128 * 4


def test_vera_wrong_calls() -> None:
    with pytest.raises(
        ValueError, match="projection is for up to 10 inputs and 40 outputs; expected at least 24 and 40"
    ):
        VeraLinear(Two().first, VeraProjection(2, 10, 40))
    with pytest.raises(ValueError, match="VeraConfig: r is 0; expected 1 or more"):
        apply(Two(), VeraConfig(r=0))
    with pytest.raises(ValueError, match="VeraConfig: vera_dropout is 1"):
        apply(Two(), VeraConfig(vera_dropout=1.0))
    with pytest.raises(TypeError, match="VeraConfig: embeddings: the module is a BertEmbeddings; expected a linear"):
        apply(bert(), VeraConfig(target_modules=["embeddings"]))


@pytest.mark.parametrize("b", [2, 3, 8, 32])
def test_cayley_is_orthogonal_with_determinant_one(b: int) -> None:
    u = 3 * torch.randn(4, b * (b - 1) // 2, dtype=torch.float64)
    r = cayley(u)
    eye = torch.eye(b, dtype=torch.float64).expand(4, b, b)
    torch.testing.assert_close(r @ r.mT, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(4, dtype=torch.float64))
    q = torch.zeros(4, b, b, dtype=torch.float64)
    rows, cols = torch.triu_indices(b, b, 1)
    q[:, rows, cols] = u
    q = q - q.mT
    torch.testing.assert_close(r, (eye + q) @ torch.linalg.inv(eye - q))
    half_angle = torch.tensor([0.3], dtype=torch.float64)
    c, s = torch.cos(2 * half_angle), torch.sin(2 * half_angle)
    want = torch.stack([torch.cat([c, s]), torch.cat([-s, c])])
    torch.testing.assert_close(cayley(torch.tan(half_angle)), want)


def test_oft_keeps_angles_and_lengths_of_rows() -> None:
    layer = OFTLinear(nn.Linear(24, 10), block_size=6).double()
    layer.rotation.data.normal_()
    w = layer.base_layer.weight.detach().clone()  # type: ignore[operator]
    x = torch.randn(5, 24, dtype=torch.float64)
    want = x @ (w @ torch.block_diag(*layer.rotations())).T + layer.base_layer.bias  # type: ignore[operator]
    torch.testing.assert_close(layer(x), want)
    layer.merge()
    turned = layer.base_layer.weight
    assert not torch.allclose(turned, w)  # type: ignore[arg-type]
    torch.testing.assert_close(turned @ turned.T, w @ w.T)  # type: ignore[operator,union-attr]


def test_oft_wrong_calls() -> None:
    with pytest.raises(
        ValueError, match=r"OFTConfig: first: OFTLinear: block_size is 7; .* divisor of in_features = 24"
    ):
        apply(Two(), OFTConfig(oft_block_size=7, target_modules=["first"]))
    with pytest.raises(ValueError, match="oft_block_size is 1; expected 2 or more"):
        apply(Two(), OFTConfig(oft_block_size=1))
    with pytest.raises(ValueError, match=r"upper has 5 elements in its last dimension; expected b \(b - 1\) / 2"):
        cayley(torch.zeros(5))
    with pytest.raises(TypeError, match=r"upper has dtype torch\.int64"):
        cayley(torch.zeros(3, dtype=torch.long))


def test_ia3_in_bert_matches_peft() -> None:
    net = bert()
    fields: dict[str, Any] = {
        "target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"],
    }  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.IA3Config(**fields)).eval()
    apply(net, IA3Config(**fields))
    for name, p in net.named_parameters():
        if p.requires_grad:
            p.data.uniform_(0.5, 1.5)
            q = theirs.get_parameter(f"base_model.model.{name.removesuffix('scale')}ia3_l.default")
            q.data.copy_(p.view_as(q))
    assert trainable_parameters(net).trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    tokens = ids()
    torch.testing.assert_close(net(tokens).last_hidden_state, theirs(tokens).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_ia3_wrong_calls() -> None:
    with pytest.raises(ValueError, match=r"feedforward_modules is .* 'fc' is not among them"):
        apply(Two(), IA3Config(target_modules=["first"], feedforward_modules=["fc"]))
    with pytest.raises(TypeError, match="IA3Config: embeddings: IA3Linear: the module is a BertEmbeddings; expected"):
        apply(bert(), IA3Config(target_modules=["embeddings"]))


def test_half_precision_models() -> None:
    for config in (VeraConfig(r=4), OFTConfig(oft_block_size=8), IA3Config(), AdapterConfig(rank=2, init="kaiming")):
        model = Two().bfloat16()
        apply(model, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for p in trained)
        out = model(torch.randn(3, 24, dtype=torch.bfloat16))
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in trained)


def test_autocast() -> None:
    x = torch.randn(3, 24)
    for config in (VeraConfig(r=4), OFTConfig(oft_block_size=8), IA3Config(), AdapterConfig(rank=2, init="kaiming")):
        model = Two()
        apply(model, config)
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(0.1)
        whole = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), whole, rtol=0.05, atol=0.05)
        out.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_compile() -> None:
    """In one graph, with the same values and gradients."""
    x = torch.randn(3, 24)
    for config in (
        VeraConfig(r=4),
        AdapterConfig(rank=2, init="kaiming"),
        AdapterConfig(target_modules=["first"], rank=2, init="kaiming", parallel=True, activation="gelu"),
    ):
        model = Two()
        apply(model, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.data.add_(0.1)
        grad = torch.randn(3, 8)
        plain = [model(x)]
        plain += torch.autograd.grad(plain[0], trained, grad)
        compiled = [torch.compile(model, backend="aot_eager", fullgraph=True)(x)]
        compiled += torch.autograd.grad(compiled[0], trained, grad)
        torch.testing.assert_close(compiled, plain)
        torch.compiler.reset()
