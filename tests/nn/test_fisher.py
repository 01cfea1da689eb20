"""The diagonal Fisher against a loop over samples in float64, on models of every shape, and against other libraries."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import tlkernels.nn.fisher.diagonal
from tlkernels.nn import LoRALinear
from tlkernels.nn.fisher import FisherDiagonal, diagonal

Batch = tuple[Tensor, Tensor]


def correlated(n: int, *shape: int, seed: int = 0) -> Tensor:
    """Samples whose tokens are much alike, so that a sum of tokens' squares is far from the square of their sum."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, *([1] * (len(shape) - 1)), shape[-1], generator=generator, dtype=torch.float64)
    return common + 0.3 * torch.randn(n, *shape, generator=generator, dtype=torch.float64)


def labels(*shape: int, classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def token_sum(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="sum")


def loop(
    model: nn.Module, data: Iterable[Any], loss: Callable[[Tensor, Tensor], Tensor] = token_sum
) -> dict[str, Tensor]:
    """The definition: one backward pass per sample, in eval mode."""
    model = copy.deepcopy(model).double().eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    count = 0
    for x, y in data:
        for i in range(len(y)):
            row = x[i : i + 1]
            value = loss(model(row.double() if row.is_floating_point() else row), y[i : i + 1])
            for p in parameters.values():
                p.grad = None
            value.backward()
            count += 1
            for name, p in parameters.items():
                if p.grad is not None:
                    total[name] += p.grad.square()
    return {name: t / count for name, t in total.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-10) -> None:
    assert list(found) == list(expected)
    rounding = (limit * max(float(t.max()) for t in expected.values()) ** 0.5) ** 2  # of gradients that are zero
    for name, want in expected.items():
        assert found[name].shape == want.shape, name
        error = float((found[name].double() - want).abs().max())
        assert error <= limit * float(want.abs().max()) + rounding, f"{name}: {error}"


def fisher(model: nn.Module, data: Iterable[Any], **options: Any) -> FisherDiagonal:
    return FisherDiagonal(model, progress=False, **options).accumulate(data)


def routes(estimate: FisherDiagonal) -> dict[str, str]:
    return {route.name: route.route for route in estimate.report()}


# ---- models ---------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two linear layers with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Twice(nn.Module):
    """A linear layer, a norm, an embedding and convolutions that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.lin = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.conv, self.line = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv1d(4, 4, 2, padding="same")
        self.group = nn.GroupNorm(2, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + 0.5 * self.embed(x.flip(1))
        h = self.norm(self.lin(torch.tanh(self.lin(self.norm(h)))))
        h = self.line(torch.tanh(self.line(h.mT))).mT
        picture = h.mT.unflatten(2, (2, -1))
        picture = self.group(self.conv(torch.tanh(self.group(self.conv(picture)))))
        return self.out(picture.flatten(2).mT)


class LanguageModel(nn.Module):
    """Position embeddings are shared by the samples; blocks may be checkpointed."""

    def __init__(self, positions: str = "shared", mode: str | None = None) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(7, 6, padding_idx=0), nn.Embedding(5, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(6, 7, bias=False)
        self.positions, self.mode = positions, mode

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1])
        h = self.embed(x) + self.position(index if self.positions == "shared" else index[None])
        for block in self.blocks:
            h = h + (block(h) if self.mode is None else checkpoint(block, h, use_reentrant=self.mode == "reentrant"))
        return self.head(h)


class TiedLanguageModel(LanguageModel):
    """The output layer has the embedding's weight, and a bias; the row of padding has a gradient as an output only."""

    def __init__(self, mode: str | None = None) -> None:
        super().__init__(mode=mode)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embed.weight


class Flattened(nn.Module):
    """Samples and tokens in one dimension, and then tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return self.out(torch.tanh(self.b(h.transpose(0, 1))).transpose(0, 1))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding="same", padding_mode="reflect", dilation=2), nn.InstanceNorm2d(6, affine=True),
        nn.ReLU(inplace=True), nn.Flatten(2), nn.Conv1d(6, 4, 3, padding=2, padding_mode="circular"),
        nn.BatchNorm1d(4, affine=True), nn.Flatten(), nn.Linear(4 * 38, 5), nn.RMSNorm(5), nn.Linear(5, 3),
    )  # fmt: skip


def images(n: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, 12, 12, generator=generator, dtype=torch.float64), labels(n, seed=seed)


def tokens(n: int, t: int = 5, classes: int = 7, seed: int = 0) -> Batch:
    return labels(n, t, classes=7, seed=seed), labels(n, t, classes=classes, seed=seed + 1)


def build(make: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    model = make().to(dtype)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.LayerNorm(6), nn.Linear(6, 3))


KERNEL_MODELS: dict[str, tuple[Callable[[], nn.Module], list[Batch]]] = {
    "mlp": (mlp, [(correlated(5, 4), labels(5)), (correlated(2, 4, seed=1), labels(2, seed=1))]),
    "tokens": (mlp, [(correlated(4, 6, 4), labels(4, 6)), (correlated(1, 6, 4, seed=1), labels(1, 6, seed=1))]),
    "two token dimensions": (mlp, [(correlated(3, 2, 5, 4), labels(3, 2, 5))]),
    "conv": (conv_net, [images(4), images(1, seed=1)]),
    "tied weights": (Tied, [(correlated(4, 5, 4), labels(4, 5))]),
    "used twice": (
        Twice,
        [(labels(4, 6, classes=9), labels(4, 6)), (labels(3, 6, classes=9, seed=2), labels(3, 6, seed=2))],
    ),
    "positions [T]": (LanguageModel, [tokens(4), tokens(2, seed=3), tokens(5, seed=4), tokens(1, seed=5)]),
    "positions [1, T]": (lambda: LanguageModel("broadcast"), [tokens(4), tokens(1, seed=3)]),
    "as many positions as samples": (LanguageModel, [tokens(4, t=2), tokens(5, t=5)]),
    "tied embedding": (TiedLanguageModel, [tokens(4), tokens(1, seed=2)]),
    "tied embedding, checkpoints": (lambda: TiedLanguageModel("reentrant"), [tokens(4)]),
    "checkpoint": (lambda: LanguageModel(mode="saved"), [tokens(4)]),
    "reentrant checkpoint": (lambda: LanguageModel(mode="reentrant"), [tokens(4)]),
    "flat and time-first": (Flattened, [(correlated(4, 6, 4), labels(4, 6)), (correlated(6, 6, 4), labels(6, 6))]),
}


@pytest.mark.parametrize("name", KERNEL_MODELS)
def test_exact(backend: str, name: str) -> None:
    make, data = KERNEL_MODELS[name]
    model = build(make)
    found = fisher(model, data)
    assert set(routes(found).values()) == {"kernel"}, str(found.report())
    assert found.count == sum(len(y) for _, y in data)
    assert_equal(found.diagonal(), loop(model, data))


class Checkpointed(nn.Module):
    """A block that uses its layer twice, and is used twice, in checkpoints, maybe within another one."""

    def __init__(self, mode: str | None, nested: bool = False) -> None:
        super().__init__()
        self.first, self.lin, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.mode, self.nested = mode, nested

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return function(x) if self.mode is None else checkpoint(function, x, use_reentrant=self.mode == "reentrant")

    def block(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.lin(torch.relu_(self.lin(x))))

    def twice(self, x: Tensor) -> Tensor:
        return self.run(self.block, self.run(self.block, x))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.out(self.run(self.twice, h) if self.nested else self.twice(h))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("mode", ["saved", "reentrant"])
def test_checkpoints(mode: str, nested: bool, verify: bool) -> None:
    """Also where nothing before the checkpoint is asked for, or trainable."""
    data = [(correlated(4, 5, 4), labels(4, 5))]
    expected = loop(build(lambda: Checkpointed(None)), data)
    model = build(lambda: Checkpointed(mode, nested))
    found = fisher(model, data, verify=verify)
    assert_equal(found.diagonal(), expected)
    assert set(routes(found).values()) == {"kernel"}
    some = fisher(model, data, verify=verify, parameters=["lin.bias"])
    assert_equal(some.diagonal(), {"lin.bias": expected["lin.bias"]})
    model.first.requires_grad_(False)
    frozen = fisher(model, data, verify=verify, kind="exact").diagonal()
    plain = fisher(build(lambda: Checkpointed(None)), data, verify=verify, kind="exact").diagonal()
    assert_equal(frozen, {name: plain[name] for name in frozen})


def test_first_batch_of_one_sample() -> None:
    """One sample tells little of layouts; the first batch of two decides again."""
    model = build(LanguageModel)
    data = [tokens(1), tokens(4, seed=1), tokens(1, seed=2)]
    found = fisher(model, data)
    assert set(routes(found).values()) == {"kernel"}
    assert_equal(found.diagonal(), loop(model, data))


def test_float32_and_memory_format(backend: str) -> None:
    model = build(conv_net, dtype=torch.float32).to(memory_format=torch.channels_last)
    data = [(x.float(), y) for x, y in (images(4), images(3, seed=1))]
    found = fisher(model, data)
    assert {t.dtype for t in found.diagonal().values()} == {torch.float32}
    assert_equal(found.diagonal(), loop(model, data), 1e-4)


def test_squares_of_tokens_or_batches_are_something_else() -> None:
    """The data tells right from wrong: the usual mistakes are far off."""
    model = build(mlp)
    data = [(correlated(4, 6, 4), labels(4, 1).expand(4, 6))]
    exact = fisher(model, data).diagonal()["0.weight"]
    by_token = loop(model, [(data[0][0].flatten(0, 1), data[0][1].flatten())])["0.weight"] * 6
    assert float((by_token / exact).nanmedian()) < 0.5
    token_sum(model(data[0][0]), data[0][1]).div(4).backward()
    batch_mean = next(iter(model.parameters())).grad.square()
    assert float((batch_mean / exact).nanmedian()) < 0.5


# ---- other routes ---------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out, self.batch_first = nn.Linear(4, 3), batch_first

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x if self.batch_first else x.transpose(0, 1))
        return self.out(h if self.batch_first else h.transpose(0, 1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder(batch_first: bool) -> None:
    model = build(lambda: Encoder(batch_first))
    data = [(correlated(3, 5, 4), labels(3, 5)), (correlated(5, 5, 4, seed=1), labels(5, 5, seed=1))]
    found = fisher(model, data)
    assert_equal(found.diagonal(), loop(model, data))
    attention = {name: route for name, route in routes(found).items() if "self_attn" in name}
    assert set(attention.values()) == {"vmap"} and len(attention) == 4
    assert {route for name, route in routes(found).items() if "self_attn" not in name} == {"kernel"}
    assert "used outside of the layer" in str(found.report())


class Odd(nn.Module):
    """A weight that is used as a function's argument besides its layer, a parameter of the model, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lin, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(4))
        self.norm, self.rms = nn.LayerNorm(4), nn.RMSNorm(4)
        self.rms.weight = self.norm.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rms(self.norm(self.lin(self.embed(x)) * self.scale))
        return self.head(torch.tanh(h) @ self.lin.weight)


@pytest.mark.parametrize("chunk_bytes", [256 << 20, 1])
def test_what_no_kernel_serves(chunk_bytes: int) -> None:
    model = build(Odd)
    data = [tokens(4), tokens(3, seed=1)]
    found = fisher(model, data, chunk_bytes=chunk_bytes)
    expected = loop(model, data)
    assert_equal(found.diagonal(), expected)
    assert not expected["unused.weight"].any()
    assert routes(found) == {
        "embed.weight": "kernel", "lin.weight": "vmap", "lin.bias": "vmap", "scale": "vmap", "head.bias": "kernel",
        "norm.weight": "vmap", "norm.bias": "kernel",
        "unused.weight": "kernel", "unused.bias": "kernel",
    }  # fmt: skip
    reasons = {route.name: route.reason for route in found.report()}
    assert reasons["norm.weight"] == "shared by LayerNorm.weight and RMSNorm.weight"
    assert "no kernel for Odd" in reasons["scale"]
    assert "not that of the layer's input" in reasons["lin.weight"]


class Branching(nn.Module):
    """What torch.func cannot do: a branch that depends on the data. Each layer sees some of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0] > 0
        out = torch.zeros(len(x), 3, dtype=x.dtype)
        for chosen, expert in ((first, self.a), (~first, self.b)):
            if bool(chosen.any()):
                out = out.index_put((chosen.nonzero()[:, 0],), expert(x[chosen] * self.scale))
        return out


@pytest.mark.parametrize("verify", [True, False])
def test_loop_is_the_last_resort(verify: bool) -> None:
    model = build(Branching)
    x = correlated(7, 4)
    x[:3, 0] = x[:3, 0].abs() + 0.1  # the other expert is first reached in the second batch
    data = [(x[:3], labels(3)), (x[3:], labels(4, seed=1))]
    data[1][0][:2, 0] = torch.tensor([1.0, -1.0], dtype=torch.float64)
    found = fisher(model, data, verify=verify)
    assert_equal(found.diagonal(), loop(model, data))
    assert set(routes(found).values()) == {"loop"}
    assert "torch.func" in str(found.report())


def test_parametrized_weights() -> None:
    def make() -> nn.Module:
        model = mlp()
        parametrizations.weight_norm(model[0])
        return model

    model, data = build(make), [(correlated(4, 6, 4), labels(4, 6))]
    found = fisher(model, data)
    assert_equal(found.diagonal(), loop(model, data))
    assert routes(found)["0.parametrizations.weight.original0"] == "vmap"
    assert routes(found)["3.weight"] == "kernel"


def test_lora_layer() -> None:
    def make() -> nn.Module:
        model = mlp()
        model[0] = LoRALinear(model[0], rank=2, lora_alpha=6, lora_bias=True, init_lora_weights=False)
        model[3] = LoRALinear(model[3], rank=2, init_lora_weights=False)
        nn.init.normal_(model[0].lora_bias)
        return model

    model, data = build(make), [(correlated(4, 6, 4), labels(4, 6))]
    found = fisher(model, data)
    expected = loop(model, data)
    assert set(expected) == {"0.lora_A", "0.lora_B", "0.lora_bias", "2.weight", "2.bias", "3.lora_A", "3.lora_B"}
    assert_equal(found.diagonal(), expected)
    assert set(routes(found).values()) == {"kernel"}
    model[0].merge()
    merged = fisher(model, data).diagonal()
    assert not merged["0.lora_A"].any() and merged["3.lora_A"].any()


def test_transformers_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=6, attn_pdrop=0.1)
    model = build(lambda: transformers.GPT2LMHeadModel(config))
    batch = {"input_ids": labels(4, 6, classes=11), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    target = labels(4, 6, classes=11, seed=1)
    target[1, 4:] = -100
    found = fisher(model, [{**batch, "labels": target}])
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    for i in range(4):
        logits = model(**{key: value[i : i + 1] for key, value in batch.items()}).logits
        grads = torch.autograd.grad(token_sum(logits, target[i : i + 1]), list(model.parameters()))
        for name, grad in zip(total, grads, strict=True):
            total[name] += grad.square() / 4
    assert_equal(found.diagonal(), total)
    assert set(routes(found).values()) == {"kernel"}, str(found.report())  # the tied output layer as well


def test_transformers_rms_norm() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = build(lambda: transformers.LlamaForCausalLM(config))
    ids, target = labels(3, 5, classes=11), labels(3, 5, classes=11, seed=1)
    found = fisher(model, [{"input_ids": ids, "labels": target}])
    assert set(routes(found).values()) == {"kernel"}, str(found.report())

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).logits

    expected = loop(Logits(), [(ids, target)])
    assert_equal(found.diagonal(), {name.removeprefix("model."): t for name, t in expected.items()}, 1e-6)


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_ignored_labels_and_token_mean() -> None:
    model = build(mlp)
    x, y = correlated(4, 6, 4), labels(4, 6)
    y[0, 2:], y[2] = -100, -100  # one sample has nothing left
    assert_equal(fisher(model, [(x, y)]).diagonal(), loop(model, [(x, y)]))

    def mean(output: Tensor, target: Tensor) -> Tensor:
        kept = max(int((target != -100).sum()), 1)
        return token_sum(output, target) / kept

    found = fisher(model, [(x, y)], token_reduction="mean")
    assert_equal(found.diagonal(), loop(model, [(x, y)], mean))
    y[y == -100] = 9
    assert_equal(fisher(model, [(x, y)], ignore_index=9, token_reduction="mean").diagonal(), found.diagonal())


def test_probabilities_as_labels() -> None:
    model = build(mlp)
    x, p = correlated(4, 4), correlated(4, 3, seed=4).softmax(-1)
    assert_equal(fisher(model, [(x, p)]).diagonal(), loop(model, [(x, p)], functional.cross_entropy))


@pytest.mark.parametrize("verify", [True, False])
def test_reductions_of_a_callable_are_undone(verify: bool) -> None:
    """Also for a short last batch: a mean over samples is N times the sum of other numbers than a mean over others."""
    model = build(mlp)
    data = [(correlated(5, 4), labels(5)), (correlated(2, 4, seed=1), labels(2, seed=1))]
    expected = loop(model, data)
    options = {"verify": verify}
    none = fisher(model, data, loss=lambda out, y: functional.cross_entropy(out, y, reduction="none"), **options)
    mean = fisher(model, data, loss=lambda out, y: functional.cross_entropy(out, y), reduction="mean", **options)
    total = fisher(model, data, loss=lambda out, y: token_sum(out, y), reduction="sum", **options)
    module = fisher(model, data, loss=nn.CrossEntropyLoss(), **options)
    for found in (none, mean, total, module):
        assert_equal(found.diagonal(), expected)


def test_losses_of_several_dimensions_are_summed() -> None:
    model, data = build(mlp), [(correlated(4, 6, 4), labels(4, 6))]
    found = fisher(
        model, data, loss=lambda out, y: functional.cross_entropy(out.mT, y, reduction="none")
    )  # fmt: skip
    assert_equal(found.diagonal(), loop(model, data))


def test_mse() -> None:
    model = build(mlp)
    data = [(correlated(4, 6, 4), correlated(4, 6, 3, seed=5))]
    expected = loop(model, data, lambda out, y: 0.5 * (out - y).square().sum())
    assert_equal(fisher(model, data, loss="mse").diagonal(), expected)


# ---- whose labels ---------------------------------------------------------------------------------------------------


def exact_by_enumeration(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The sum over all labels of all positions, times their probability."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in x.split(1):
        logits = model(row)
        positions = logits[..., 0].numel()
        for code in range(3**positions):
            y = torch.tensor([code // 3**i % 3 for i in range(positions)]).reshape(logits.shape[:-1])
            value = token_sum(logits, y)
            grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            for name, grad in zip(total, grads, strict=True):
                total[name] += (-value.detach()).exp() * grad.square() / len(x)
    return total


@pytest.mark.parametrize("shape", [(4, 4), (3, 2, 4)])
def test_exact_is_the_expectation_over_labels(shape: tuple[int, ...]) -> None:
    model = build(mlp)
    x = correlated(*shape)
    found = fisher(model, [(x,)], kind="exact")
    assert_equal(found.diagonal(), exact_by_enumeration(model, x))


def test_exact_with_checkpoints_and_other_routes() -> None:
    data = [tokens(3, t=2)]
    expected = fisher(build(LanguageModel), data, kind="exact").diagonal()
    for mode in ("saved", "reentrant"):
        assert_equal(fisher(build(lambda mode=mode: LanguageModel(mode=mode)), data, kind="exact").diagonal(), expected)
    model = build(Odd)
    found = fisher(model, data, kind="exact").diagonal()
    mean = dict.fromkeys(found, 0.0)
    for c in range(49):  # two positions of seven labels
        y = torch.tensor([[c % 7, c // 7]]).expand(3, 2)
        for i in range(3):
            row = data[0][0][i : i + 1]
            p = (-token_sum(model(row), y[:1])).exp().detach()
            for name, square in loop(model, [(row, y[:1])]).items():
                mean[name] += p * square / 3
    assert_equal(found, mean)


def test_exact_mse_is_the_sum_over_outputs() -> None:
    model = build(mlp)
    x = correlated(3, 2, 4)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in x.split(1):
        for unit in model(row).flatten():
            for name, grad in zip(total, torch.autograd.grad(unit, model.parameters(), retain_graph=True), strict=True):
                total[name] += grad.square() / 3
    assert_equal(fisher(model, [x], loss="mse", kind="exact").diagonal(), total)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_sampled_approaches_exact(loss: str) -> None:
    model = build(mlp)
    x = correlated(3, 2, 4)
    exact = fisher(model, [x], loss=loss, kind="exact").diagonal()
    found = fisher(model, [x], loss=loss, kind="sampled", samples=3000, verify=False)
    for name, want in exact.items():
        assert float((found.diagonal()[name] - want).norm() / want.norm()) < 0.12, name
    assert found.count == 3


def test_sampled_is_reproducible_and_keeps_what_is_ignored() -> None:
    model = build(mlp)
    x, y = correlated(4, 6, 4), labels(4, 6)
    y[:, 3:] = -100
    runs = [
        fisher(model, [(x, y)], kind="sampled", generator=torch.Generator().manual_seed(seed)).diagonal()
        for seed in (1, 1, 2)
    ]
    assert_equal(runs[0], runs[1], 0.0)
    assert not torch.equal(runs[0]["0.weight"], runs[2]["0.weight"])
    exact = fisher(model, [(x, y)], kind="exact").diagonal()
    assert_equal(exact, fisher(model, [(x[:, :3], y[:, :3])], kind="exact").diagonal())


# ---- precision ------------------------------------------------------------------------------------------------------


def test_many_small_terms_are_not_lost() -> None:
    """1e5 batches: a float32 sum would stall, or be off by the accumulated rounding."""
    sums = diagonal.Sums({"w": torch.zeros(3)})
    terms = torch.tensor([1e-12, 3e-9, 0.1]).double().float()
    expected = torch.zeros(3, dtype=torch.float64)
    naive = torch.zeros(3)
    for i in range(100_000):
        term = terms * (1 + (i % 7) * 0.01)
        sums.now["w"] += term
        sums.step()
        expected += term
        naive += term
    error = ((sums.sum("w") - expected) / expected).abs().max()
    assert float(error) < 1e-6 < 1e-5 < float(((naive - expected) / expected).abs().max())


def test_autocast_bfloat16(backend: str) -> None:
    model = build(lambda: nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3)), dtype=torch.float32)
    data = [(correlated(6, 5, 16), labels(6, 5))]
    with torch.autocast("cpu", torch.bfloat16):
        found = fisher(model, [(data[0][0].float(), data[0][1])])
    assert set(routes(found).values()) == {"kernel"}
    for name, want in loop(model, data).items():
        got = found.diagonal()[name]
        assert got.dtype == torch.float32
        assert float((got - want).norm() / want.norm()) < 0.03, name


def test_bfloat16_model(backend: str) -> None:
    model = build(LanguageModel, dtype=torch.bfloat16)
    found = fisher(model, [tokens(4)])
    assert set(routes(found).values()) == {"kernel"}
    for name, want in loop(model, [tokens(4)]).items():
        assert found.diagonal()[name].dtype == torch.float32
        assert float((found.diagonal()[name] - want).norm() / want.norm()) < 0.05, name


def test_nan_gradients_stay_nan() -> None:
    model = build(lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)))
    x = correlated(4, 4)
    x[1, 0] = float("nan")
    found = fisher(model, [(x, labels(4))]).diagonal()
    assert found["0.weight"][:, 0].isnan().all() and found["1.bias"].isnan().all()


def test_no_tensor_grows_with_samples_times_weights() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    model = build(lambda: nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 3)), dtype=torch.float32)
    seen = []
    for n in (16, 32):
        estimate = FisherDiagonal(model, progress=False)
        data = [(correlated(n, 2, 48).float(), labels(n, 2))]
        with Largest() as largest:
            estimate.accumulate(data)
        seen.append(largest.numel)
    assert max(seen) <= 48 * 48 + 2 * 32 * 48  # per-sample gradients would be 16 or 32 times 48 * 48


# ---- the model is given back ----------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> list[Any]:
    hooks = [
        len(getattr(m, kind))
        for m in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]
    grads = [
        (p.requires_grad, None if p.grad is None else (id(p.grad), p.grad.clone().tolist())) for p in model.parameters()
    ]
    return [hooks, grads, [m.training for m in model.modules()], torch.backends.mha.get_fastpath_enabled()]


class Interrupting(nn.Module):
    """Raises in the third forward pass, or in the backward pass after it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.lin, self.where, self.calls, self.armed = nn.Linear(4, 4), where, 0, False

    def forward(self, x: Tensor) -> Tensor:
        out = self.lin(x)
        if self.armed and self.where == "forward":
            raise KeyboardInterrupt
        if self.armed and self.where == "backward":
            out = out.clone()

            def stop(grad: Tensor) -> None:
                raise KeyboardInterrupt

            out.register_hook(stop)
        return out


@pytest.mark.parametrize("where", ["loader", "forward", "backward"])
def test_interruption_leaves_the_model_clean(where: str) -> None:
    model = build(lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(), Interrupting(where), nn.Linear(4, 3)))
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(4, 4, dtype=torch.float64)
    before = snapshot(model)
    good = [(correlated(4, 4), labels(4)), (correlated(3, 4, seed=1), labels(3, seed=1))]

    def loader() -> Iterator[Batch]:
        yield from good
        model[2].armed = True
        if where == "loader":
            raise KeyboardInterrupt
        yield good[0]

    with FisherDiagonal(model, progress=False) as estimate:
        with pytest.raises(KeyboardInterrupt):
            estimate.accumulate(loader())
        assert snapshot(model) == before
    model[2].armed = False
    expected = fisher(model, good).diagonal()
    if where == "backward":
        with pytest.raises(RuntimeError, match="interrupted in the middle of a batch"):
            estimate.diagonal()
        with pytest.raises(RuntimeError, match="interrupted"):
            estimate.accumulate(good)
        estimate.reset()
        estimate.accumulate(good)
    assert_equal(estimate.diagonal(), expected, 0.0)
    assert snapshot(model) == before and estimate.count == 7
    assert "0.bias" not in estimate.diagonal()


def test_dropout_batch_norm_and_modes() -> None:
    model = build(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))).train()
    data = [(correlated(4, 4), labels(4))]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert_equal(fisher(model, data).diagonal(), loop(model, data))
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(RuntimeError, match="FisherDiagonal: 1 is a batch norm that uses the batch's statistics"):
        fisher(model, data, eval_mode=False)
    with pytest.raises(RuntimeError, match="mixes samples or is random"):
        fisher(nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double(), data, eval_mode=False)


def test_a_model_that_mixes_samples_is_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x - 0.5 * x.mean(0))

    with pytest.raises(RuntimeError, match="is not the sum of their gradients, for lin"):
        fisher(build(Mixing), [(correlated(4, 4), labels(4))])
    # a mean over valid tokens is no mean over samples
    y = labels(4, 6)
    y[0, 1:] = -100
    with pytest.raises(RuntimeError, match="token_reduction"):
        fisher(
            build(mlp), [(correlated(4, 6, 4), y)], reduction="mean",
            loss=lambda out, target: functional.cross_entropy(out.flatten(0, 1), target.flatten()),
        )  # fmt: skip


def test_a_loss_with_parameters_gets_no_gradient() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))

        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            return functional.cross_entropy(out * self.weight, y, reduction="none")

    loss = Weighted()
    model, data = build(mlp), [(correlated(4, 4), labels(4))]
    found = fisher(model, data, loss=loss)
    assert loss.weight.grad is None and loss.weight.requires_grad
    expected = loop(model, data, lambda out, y: functional.cross_entropy(out * loss.weight.detach(), y))
    assert_equal(found.diagonal(), expected)


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["empirical", "sampled"])
def test_resumed_equals_uninterrupted(kind: str, tmp_path: Any) -> None:
    model = build(mlp, dtype=torch.float32)
    data = [(correlated(3, 4, seed=i).float(), labels(3, seed=i)) for i in range(40)]
    whole = fisher(model, data, kind=kind)
    first = fisher(model, data[:21], kind=kind)
    torch.save(first.state_dict(), tmp_path / "fisher.pt")
    second = FisherDiagonal(model, kind=kind, progress=False)
    second.load_state_dict(torch.load(tmp_path / "fisher.pt"))
    second.accumulate(data[21:])
    assert second.count == whole.count == 120
    assert_equal(second.diagonal(), {name: t.double() for name, t in whole.diagonal().items()}, 0.0)


def test_wrong_state_is_refused() -> None:
    model, data = build(mlp), [(correlated(4, 4), labels(4))]
    estimate = fisher(model, data)
    before = estimate.diagonal()
    other = fisher(build(lambda: nn.Linear(4, 3)), data).state_dict()
    with pytest.raises(ValueError, match="FisherDiagonal: state_dict lacks"):
        estimate.load_state_dict(other)
    with pytest.raises(ValueError, match="state_dict has kind 'exact'; expected 'empirical'"):
        estimate.load_state_dict({**estimate.state_dict(), "kind": "exact"})
    wrong = estimate.state_dict()
    wrong["sums"]["now"]["0.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"'0.weight' of shape \(2, 2\); expected \(6, 4\)"):
        estimate.load_state_dict(wrong)
    assert_equal(estimate.diagonal(), before, 0.0)


def test_all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one after the other: what all_reduce would add to this one's tensors is the other's."""
    from tlkernels.nn.fisher import diagonal

    model = build(mlp)
    data = [(correlated(4, 4), labels(4)), (correlated(3, 4, seed=1), labels(3, seed=1))]
    expected = fisher(model, data).diagonal()
    here, there = fisher(model, data[:1]), fisher(model, data[1:])
    there._sums.fold()
    queue = [*there._sums.total.values(), torch.tensor(float(there.count), dtype=torch.float64)]
    monkeypatch.setattr(diagonal, "processes", lambda op, group: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, group: t.add_(queue.pop(0)))
    here.all_reduce()
    assert here.count == 7 and not queue
    assert_equal(here.diagonal(), expected)
    with pytest.raises(RuntimeError, match="all_reduce was called already"):
        here.all_reduce()
    with pytest.raises(RuntimeError, match="count other processes twice"):
        here.accumulate(data)


def test_all_reduce_of_one_process() -> None:
    model, data = build(mlp), [(correlated(4, 4), labels(4))]
    assert_equal(fisher(model, data).all_reduce().diagonal(), fisher(model, data).diagonal(), 0.0)


# ---- what may come in -----------------------------------------------------------------------------------------------


def test_batches_of_other_shapes() -> None:
    model = build(mlp)
    x, y = correlated(4, 4), labels(4)
    expected = fisher(model, [(x, y)]).diagonal()

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, values: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.model(input=values if shift is None else values + shift)}

    for batch in ({"values": x, "labels": y}, ({"values": x}, y), [x, torch.zeros(4, 1).double(), y]):
        found = fisher(Keyword(), [batch]).diagonal()
        assert_equal({name.removeprefix("model."): t for name, t in found.items()}, expected)
    record = {"picture": x.T, "class": y, "size": 4}

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch["picture"]), batch["class"]

    found = fisher(model, [{**record, "picture": x}], forward=forward).diagonal()
    assert_equal(found, expected)
    assert_equal(fisher(model, [], verify=False).accumulate([(x, y)]).diagonal(), expected)
    assert_equal(fisher(model, [(x[:0], y[:0]), (x, y)]).diagonal(), expected)


def test_some_parameters() -> None:
    model, data = build(mlp), [(correlated(4, 4), labels(4))]
    model[3].weight.requires_grad_(False)
    expected = loop(model, data)
    assert "3.weight" not in expected and "3.bias" in expected
    assert_equal(fisher(model, data).diagonal(), expected)
    some = fisher(model, data, parameters=["0.bias", "2.weight"]).diagonal()
    assert_equal(some, {name: expected[name] for name in ("0.bias", "2.weight")})
    assert not model[3].weight.requires_grad and model[0].weight.requires_grad


BAD_CALLS: dict[str, tuple[Callable[[nn.Module, Batch], Any], type[Exception], str]] = {
    "model": (lambda m, b: FisherDiagonal("x"), TypeError, "model is a str"),
    "frozen": (lambda m, b: FisherDiagonal(m.requires_grad_(False)), ValueError, "no parameter that requires grad"),
    "loss": (lambda m, b: FisherDiagonal(m, "hinge"), ValueError, "loss is 'hinge'"),
    "loss type": (lambda m, b: FisherDiagonal(m, 3), TypeError, "loss is a int"),
    "kind": (lambda m, b: FisherDiagonal(m, kind="true"), ValueError, "kind is 'true'"),
    "callable": (lambda m, b: FisherDiagonal(m, token_sum, "exact"), ValueError, "no predictive distribution"),
    "samples": (lambda m, b: FisherDiagonal(m, kind="sampled", samples=0), ValueError, "samples is 0"),
    "samples kind": (lambda m, b: FisherDiagonal(m, samples=2), ValueError, "samples is 2 with kind 'empirical'"),
    "reduction": (lambda m, b: FisherDiagonal(m, token_sum, reduction="max"), ValueError, "reduction is 'max'"),
    "reduction name": (lambda m, b: FisherDiagonal(m, reduction="sum"), ValueError, "reduction is 'sum' with loss"),
    "token_reduction": (lambda m, b: FisherDiagonal(m, token_reduction="max"), ValueError, "token_reduction is 'max'"),
    "parameters": (lambda m, b: FisherDiagonal(m, parameters=["x"]), ValueError, "parameters has 'x'"),
    "chunk_bytes": (lambda m, b: FisherDiagonal(m, chunk_bytes=0), ValueError, "chunk_bytes is 0"),
    "loader": (lambda m, b: fisher(m, b[0]), TypeError, "loader is a Tensor"),
    "no tensor": (lambda m, b: fisher(m, ["abc"]), ValueError, "without a tensor"),
    "rows": (lambda m, b: fisher(m, [(b[0][:3], b[1])]), ValueError, "tensors of 3 and 4 rows"),
    "labels": (lambda m, b: fisher(m, [(b[0], b[1] + 3)]), ValueError, "labels hold [345]; expected 0 to 2"),
    "negative": (lambda m, b: fisher(m, [(b[0], b[1] - 3)]), ValueError, "labels hold -[123]; expected 0 to 2"),
    "label shape": (lambda m, b: fisher(m, [(b[0], b[1][:, None])]), ValueError, r"labels have shape \(\d, 1\)"),
    "no labels": (lambda m, b: fisher(m, [b[0]]), ValueError, "labels are missing"),
    "mse": (lambda m, b: fisher(m, [b], loss="mse"), ValueError, r"labels have shape \(\d,\); expected \(\d, 3\)"),
    "scalar": (lambda m, b: fisher(m, [b], loss=token_sum), ValueError, "loss returned a scalar"),
    "loss rows": (lambda m, b: fisher(m, [b], loss=lambda o, y: o[0]), ValueError, r"loss returned shape \(3,\)"),
    "no tensor of loss": (lambda m, b: fisher(m, [b], loss=lambda o, y: 1.0), TypeError, "loss returned a float"),
    "forward": (lambda m, b: fisher(m, [b], forward=lambda m, b: m(b[0])), TypeError, "forward returned a Tensor"),
    "output": (
        lambda m, b: fisher(m, [b], forward=lambda m, b: (m(b[0]).sum(0), b[1])), ValueError,
        r"output has shape \(3,\)",
    ),
    "empty": (lambda m, b: fisher(m, []).diagonal(), RuntimeError, "nothing was accumulated"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_wrong_input(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    model = build(mlp)
    with pytest.raises(error, match=message):
        call(model, (correlated(4, 4), labels(4)))
    assert not any(m._forward_hooks for m in model.modules())


def test_an_error_in_one_batch_leaves_the_others() -> None:
    model = build(mlp)
    good, bad = (correlated(4, 4), labels(4)), (correlated(4, 4), labels(4) + 7)
    estimate = FisherDiagonal(model, progress=False)
    with pytest.raises(ValueError, match="labels hold"):
        estimate.accumulate([good, bad])
    assert_equal(estimate.diagonal(), fisher(model, [good]).diagonal(), 0.0)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    model, data = build(mlp), [(correlated(4, 4), labels(4))]
    FisherDiagonal(model).accumulate(data, progress=True)
    assert "FisherDiagonal" in capsys.readouterr().err
    FisherDiagonal(model, progress=False).accumulate(data)
    assert capsys.readouterr().err == ""


def test_docstrings() -> None:
    assert doctest.testmod(tlkernels.nn.fisher.diagonal).failed == 0


# ---- other libraries ------------------------------------------------------------------------------------------------


def test_backpack() -> None:
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import SumGradSquared

    model = build(lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(300, 3)))
    x, y = images(5)
    found = fisher(model, [(x, y)]).diagonal()
    other = backpack.extend(copy.deepcopy(model))
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))(other(x), y)
    with backpack.backpack(SumGradSquared()):
        loss.backward()
    assert_equal(found, {name: p.sum_grad_squared / 5 for name, p in other.named_parameters()})


def test_nngeometry() -> None:
    pytest.importorskip("nngeometry")
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    model = build(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), dtype=torch.float32)
    x, y = correlated(6, 4).float(), labels(6)
    matrix = FIM(
        model=model, loader=DataLoader(TensorDataset(x, y), batch_size=3), representation=PMatDiag,
        variant="classif_logits",
    )  # fmt: skip
    found = fisher(model, [(x, y)], kind="exact").diagonal()
    flat = matrix.get_diag()
    assert flat.numel() == sum(t.numel() for t in found.values())
    # its layers give bias or weight first: the same numbers in any order
    ours = torch.cat([t.flatten() for t in found.values()])
    assert float((ours.sort().values - flat.sort().values).abs().max()) < 1e-6
