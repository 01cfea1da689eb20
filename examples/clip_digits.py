"""Contrastive learning of images and text on real handwritten digits, and the memory of its loss.

An image tower and a text tower are trained together, so that a scanned digit lies close to its descriptions: "a
handwritten three", "the digit 3", "two plus one". Then digits are recognized by descriptions alone: on images that were
held out, with the descriptions of the training, with wordings that never occurred in it, and with sums that never
occurred in it. It is asked the other way round as well: which digit does a description mean, going by the images?

    python examples/clip_digits.py            # two to three minutes on two cores
    python examples/clip_digits.py --short    # seconds: one seed, few steps, small batches

A batch holds each digit many times. The loss of CLIP takes every other pair for a negative, also one that fits, and so
does SigLIP's. Three losses are compared:

- CLIP (`tlkernels.nn.CLIPLoss`) as it is. With about k pairs of a digit in the batch its best value is log k, not 0,
  where all of them are equally close: fitting pairs that did not come together are pushed away and pulled back alike.
- CLIP with digits as positives (`tlkernels.ops.sup_con` from each side to the other): all texts of an image's digit are
  its positives. It needs the labels, which pairs from the web do not have.
- SigLIP (`tlkernels.nn.SigLIPLoss`) as it is: a fitting pair that did not come together counts as negative, so that its
  best probability of a fitting pair is 1 / k.

The 1797 images of 8 x 8 pixels come with scikit-learn (UCI's optical recognition of handwritten digits), the
descriptions are made here; nothing is downloaded. Descriptions name the digit, so this is supervision by words, not a
discovery of classes: logistic regression on the pixels, with labels, is the yardstick. The recipe was chosen on the
validation images. The memory of the loss is measured in processes of their own, against the formula in torch, which
stores the logits of both directions.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import tlkernels.nn
from tlkernels import ops

HERE = Path(__file__).resolve().parent
CLASSES, WIDTH = 10, 64
BATCH, LEARNING_RATE, WEIGHT_DECAY, WORD_DROPOUT = 250, 8e-3, 1e-3, 0.1

CLIP, POSITIVES, SIGLIP = "CLIP", "CLIP, digits as positives", "SigLIP"
LOSSES = (CLIP, POSITIVES, SIGLIP)
KINDS = KNOWN, WORDING, SUMS = "known texts", "new wordings", "new sums"
OURS, EAGER = "tlkernels", "the formula in torch"

# What may go wrong by chance must not: over five seeds no run came near these.
LEAST_ACCURACY, MOST_DIFFERENCE = 0.8, 1e-4


@dataclass(frozen=True)
class Size:
    """How much work it is."""

    epochs: int = 60  # four steps each
    seeds: int = 5
    batches: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)  # whose memory is measured


FULL_SIZE, SHORT_SIZE = Size(), Size(epochs=25, seeds=1, batches=(512, 1024, 2048))


@dataclass
class Result:
    """What a loss reached, one number for each seed."""

    name: str
    images: dict[str, list[float]] = field(default_factory=dict)  # accuracy of images, by the texts they meet
    texts: dict[str, list[float]] = field(default_factory=dict)  # accuracy of texts, by their kind
    losses: list[float] = field(default_factory=list)  # of the first seed, step by step
    seconds: list[float] = field(default_factory=list)


# ---- the texts ------------------------------------------------------------------------------------------------------

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORDINGS = (
    "{x}", "a handwritten {x}", "the digit {x}", "the number {x}", "a photo of the digit {x}", "someone wrote {x}",
    "this is {x}", "a scan of the number {x}", "a small gray {x}", "an image of {x}", "the figure {x}", "a blurry {x}",
    "what you see is {x}", "a {x} drawn by hand",
)  # fmt: skip
#: Never trained on, and not all of their words: "sketch", "numeral", "scribbled" and others are unknown.
NEW_WORDINGS = (
    "the numeral {x}",
    "a photo of a handwritten {x}",
    "a sketch of the number {x}",
    "somebody scribbled {x}",
)
#: With the number below (p) or above (n). A quarter is held out for each digit, for every digit others.
SUMMED = (
    "the number after {p}", "the number before {n}", "{p} plus one", "{n} minus one", "one more than {p}",
    "one less than {n}", "what follows {p}", "what precedes {n}",
)  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Descriptions of each digit, by kind."""

    train: list[list[str]]
    held_out: dict[str, list[list[str]]]


def describe(seed: int = 0) -> Texts:
    """All descriptions, each number as a word and as a numeral. A sum that is held out is so in both."""
    chance = random.Random(seed)
    train: list[list[str]] = []
    wording: list[list[str]] = []
    sums: list[list[str]] = []
    for digit in range(CLASSES):
        names = (NUMBERS[digit], str(digit))
        train.append([text.format(x=name) for text in WORDINGS for name in names])
        wording.append([text.format(x=name) for text in NEW_WORDINGS for name in names])
        made = []
        for text in SUMMED:
            other = digit + (1 if "{n}" in text else -1)
            if other >= 0:
                made.append([text.format(p=name, n=name) for name in (NUMBERS[other], str(other))])
        chance.shuffle(made)
        held = len(made) // 4
        sums.append([text for pair in made[:held] for text in pair])
        train[-1] += [text for pair in made[held:] for text in pair]
    return Texts(train, {WORDING: wording, SUMS: sums})


class Vocabulary:
    """Words to numbers: 0 is padding, 1 any unknown word."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.index = {word: i + 2 for i, word in enumerate(sorted({w for text in texts for w in text.split()}))}

    def __len__(self) -> int:
        return len(self.index) + 2

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[n, words of the longest], padded with 0."""
        rows = [torch.tensor([self.index.get(word, 1) for word in text.split()]) for text in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)


# ---- the images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    images: Tensor  # [n, 1, 8, 8], from 0 to 1
    labels: Tensor  # [n]


def load() -> tuple[Split, Split, Split]:
    """1000 images to train on, 200 for validation, 597 for the test, each digit in proportion; always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    rest, test = train_test_split(range(len(labels)), test_size=597, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=200, stratify=labels[rest], random_state=0)
    a, b, c = (Split(images[part], labels[part]) for part in (train, validation, test))
    return a, b, c


def yardstick(train: Split, scored: Split) -> float:
    """The accuracy of logistic regression on the pixels, with the labels."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=5000).fit(train.images.flatten(1).numpy(), train.labels.numpy())
    return float(model.score(scored.images.flatten(1).numpy(), scored.labels.numpy()))


# ---- the model ------------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    """Images and texts to unit vectors, with a scale and a bias for their products."""

    def __init__(self, words: int, bias: bool = False) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 16, WIDTH),
        )  # fmt: skip
        self.words = nn.Embedding(words, WIDTH, padding_idx=0)
        self.reader = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.text = nn.Linear(WIDTH, WIDTH)
        # where CLIP and SigLIP start
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0 if bias else 1 / 0.07)))
        self.bias = nn.Parameter(torch.tensor(-10.0)) if bias else None

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=100.0)

    def encode_image(self, images: Tensor) -> Tensor:
        return functional.normalize(self.image(images), dim=1)

    def encode_text(self, ids: Tensor) -> Tensor:
        if self.training:  # words that are unknown now and then: there will be some
            ids = torch.where((torch.rand(ids.shape) < WORD_DROPOUT) & (ids > 0), 1, ids)
        states, _ = self.reader(self.words(ids))
        mask = (ids > 0).unsqueeze(2)
        return functional.normalize(self.text((states * mask).sum(1) / mask.sum(1)), dim=1)


def loss_of(name: str, model: Towers, x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    """The loss of that name for unit features of images and texts. The labels serve `POSITIVES` alone."""
    if name == CLIP:
        return tlkernels.nn.CLIPLoss()(x, y, model.scale)
    if name == SIGLIP:
        assert model.bias is not None
        return tlkernels.nn.SigLIPLoss()(x, y, model.scale, model.bias)
    temperature = 1.0 / model.scale
    to_texts = ops.sup_con(x, labels, y, labels, temperature=temperature)
    return 0.5 * (to_texts + ops.sup_con(y, labels, x, labels, temperature=temperature))


def formula(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss as it is written down: the logits of both directions are stored."""
    target = torch.arange(len(x))
    of_images = functional.cross_entropy(scale * x @ y.T, target)
    return 0.5 * (of_images + functional.cross_entropy(scale * y @ x.T, target))


def train(name: str, images: Split, texts: Texts, *, epochs: int, seed: int) -> tuple[Towers, Vocabulary, list[float]]:
    """Both towers, and the loss of every step. Each image meets a random description of its digit, each time anew."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = Vocabulary([text for of_digit in texts.train for text in of_digit])
    ids = vocabulary.encode([text for of_digit in texts.train for text in of_digit])
    counts = torch.tensor([len(of_digit) for of_digit in texts.train])
    starts = counts.cumsum(0) - counts
    model = Towers(len(vocabulary), bias=name == SIGLIP).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches = max(1, len(images.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches)
    losses: list[float] = []
    for _ in range(epochs):
        for rows in torch.randperm(len(images.labels), generator=generator).chunk(batches):
            labels = images.labels[rows]
            chosen = starts[labels] + (torch.rand(len(rows), generator=generator) * counts[labels]).long()
            x, y = model.encode_image(images.images[rows]), model.encode_text(ids[chosen])
            loss = loss_of(name, model, x, y, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return model.eval(), vocabulary, losses


@torch.no_grad()
def score(
    model: Towers, vocabulary: Vocabulary, images: Split, known: Split, texts: Texts
) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracies of images by kind of text, and of texts by kind.

    An image is the digit whose mean text is the closest; a text means the digit whose mean training image is.
    """
    features = model.encode_image(images.images)
    training = model.encode_image(known.images)
    prototypes = torch.stack([training[known.labels == digit].mean(0) for digit in range(CLASSES)])
    prototypes = functional.normalize(prototypes, dim=1)
    of_images, of_texts = {}, {}
    for kind, digits in {KNOWN: texts.train, **texts.held_out}.items():
        encoded = [model.encode_text(vocabulary.encode(of_digit)) for of_digit in digits]
        classes = functional.normalize(torch.stack([e.mean(0) for e in encoded]), dim=1)
        of_images[kind] = float(((features @ classes.T).argmax(1) == images.labels).float().mean())
        right = torch.cat([(e @ prototypes.T).argmax(1) == digit for digit, e in enumerate(encoded)])
        of_texts[kind] = float(right.float().mean())
    return of_images, of_texts


# ---- the loss itself: the same as the formula, with less memory -----------------------------------------------------


def difference(rows: int = 300, seed: int = 0) -> float:
    """The largest relative difference between `tlkernels.nn.CLIPLoss` and the formula: loss and gradients."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    x, y = (functional.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1) for _ in range(2))
    for loss in (tlkernels.nn.CLIPLoss(), formula):
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(14.0, requires_grad=True)]
        value = loss(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))


def peak_memory(name: str, batch: int) -> int | None:
    """Bytes that the loss and its gradients take beyond features and gradients; measured in a new process.

    None where the system has no counter of a process's peak.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).resolve()),
        "--memory-of",
        name,
        "--batch",
        str(batch),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the memory of {name!r} could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.strip().splitlines()[-1])


def _memory_of(name: str, batch: int) -> int:
    """`peak_memory`, in the process made for it. A small batch goes first, through all libraries."""
    loss: Callable[..., Tensor] = tlkernels.nn.CLIPLoss() if name == OURS else formula

    def call(rows: int) -> tuple[int, int]:
        x, y = (functional.normalize(torch.randn(rows, WIDTH), dim=1).requires_grad_() for _ in range(2))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as counter:
            counter.write("5")  # the peak counter starts again
        before = _resident("VmRSS")
        loss(x, y, torch.tensor(14.0, requires_grad=True)).backward()
        return _resident("VmHWM") - before, 2 * x.numel() * x.element_size()

    call(64)
    peak, gradients = call(batch)
    return max(peak - gradients, 0)


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


# ---- the comparison -------------------------------------------------------------------------------------------------


def measure(size: Size, split: str = "test", say: Callable[[str], None] = print) -> tuple[list[Result], float]:
    """All losses at every seed, and the yardstick."""
    images, validation, test = load()
    scored = validation if split == "validation" else test
    results = [Result(name) for name in LOSSES]
    for seed in range(size.seeds):
        texts = describe(seed)
        for result in results:
            start = time.perf_counter()
            model, vocabulary, losses = train(result.name, images, texts, epochs=size.epochs, seed=seed)
            result.seconds.append(time.perf_counter() - start)
            result.losses = result.losses or losses
            of_images, of_texts = score(model, vocabulary, scored, images, texts)
            for kind, accuracy in of_images.items():
                result.images.setdefault(kind, []).append(accuracy)
            for kind, accuracy in of_texts.items():
                result.texts.setdefault(kind, []).append(accuracy)
            say(
                f"seed {seed}, {result.name}: {result.seconds[-1]:.1f} s, loss {losses[0]:.2f} to {losses[-1]:.2f}, "
                f"images {of_images[KNOWN]:.3f}, texts {of_texts[WORDING]:.3f} and {of_texts[SUMS]:.3f}"
            )
    return results, yardstick(images, scored)


Memory = dict[str, dict[int, int]]


def measure_memory(batches: Sequence[int]) -> Memory:
    """Name of the loss -> batch -> bytes; empty where it cannot be measured."""
    found: Memory = {}
    for name in (OURS, EAGER):
        for batch in batches:
            if (peak := peak_memory(name, batch)) is not None:
                found.setdefault(name, {})[batch] = peak
    return found


def complaints(results: Sequence[Result], memory: Memory, differs: float) -> list[str]:
    """What is not as it should be; empty when all is well. Sums are shown, not judged: nothing promises them."""
    found = []
    for result in results:
        for kind in (KNOWN, WORDING):
            if not statistics.fmean(result.images[kind]) >= LEAST_ACCURACY:
                found.append(
                    f"{result.name}: {statistics.fmean(result.images[kind]):.3f} of the images by {kind}; "
                    f"expected {LEAST_ACCURACY}"
                )
    if not differs <= MOST_DIFFERENCE:
        found.append(f"CLIPLoss differs from the formula by {differs:.1e}; expected at most {MOST_DIFFERENCE:.0e}")
    if memory:
        largest = max(memory[OURS])
        if not memory[OURS][largest] < memory[EAGER][largest]:
            found.append(f"batch {largest}: {memory[OURS][largest]} bytes; the formula takes {memory[EAGER][largest]}")
    return found


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def show(results: Sequence[Result], straight: float, memory: Memory, size: Size, split: str) -> None:
    """Two tables, by rich where it is installed."""

    def cell(values: Sequence[float]) -> str:
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{100 * statistics.fmean(values):.1f}{spread} %"

    heads = ["", *(f"images by {kind}" for kind in KINDS), *(f"meaning of {kind}" for kind in KINDS)]
    rows = [[r.name, *(cell(found[kind]) for found in (r.images, r.texts) for kind in KINDS)] for r in results]
    title = f"Accuracy on {split} images and held-out texts; mean and standard deviation, seeds: {size.seeds}"
    _table(title, heads, rows)
    print(f"Logistic regression on the pixels, with labels: {100 * straight:.1f} %. Chance: 10 %.")
    if memory:
        batches = sorted(memory[OURS])
        rows = [[name, *(_mib(memory[name][n]) for n in batches)] for name in memory]
        _table(
            f"Peak memory of CLIP's loss and its gradients beyond features and gradients, dimension {WIDTH}",
            ["batch", *map(str, batches)],
            rows,
        )


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for row in [heads, *rows]:
            print("  ".join(f"{text:>26}" for text in row))
        return
    table = Table(title=title)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def plot(results: Sequence[Result], memory: Memory, path: Path) -> None:
    """Accuracies, losses, and memory against the batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14.5, 4.4), width_ratios=(1.35, 1, 1))
    colours = ("#0072B2", "#009E73", "#E69F00")
    heads = [f"{what}\n" + kind.replace(" ", "\n") for what in ("images by", "meaning of") for kind in KINDS]
    for i, (result, colour) in enumerate(zip(results, colours, strict=True)):
        every = [found[kind] for found in (result.images, result.texts) for kind in KINDS]
        places = [place + (i - 1) * 0.27 for place in range(len(every))]
        left.bar(places, [statistics.fmean(values) for values in every], 0.25, color=colour, label=result.name)
        for place, values in zip(places, every, strict=True):
            left.scatter([place] * len(values), values, color="black", s=5, zorder=3)
        middle.plot(result.losses, color=colour, linewidth=1, label=result.name)
    left.set_xticks(range(len(heads)), heads, fontsize=8)
    left.set(ylim=(0, 1.05), title="Accuracy, by what is held out")
    left.axhline(0.1, color="#777777", linestyle=":", linewidth=1)
    middle.legend(frameon=False)
    middle.set(xlabel="step", title="Loss, seed 0")
    for name, marker, colour in ((OURS, "o", "#0072B2"), (EAGER, "s", "#D55E00")):
        if name in memory:
            points = sorted(memory[name].items())
            right.plot(
                [n for n, _ in points], [max(b, 4096) for _, b in points], marker=marker, color=colour, label=name
            )
    right.set(title="Peak memory of CLIP's loss", xlabel="batch")
    if memory:
        right.set_xscale("log", base=2)
        right.set_yscale("log", base=4)
        right.set_xticks(sorted(memory[OURS]), [f"{n:,}" for n in sorted(memory[OURS])])
        right.xaxis.set_minor_locator(NullLocator())
        right.yaxis.set_minor_locator(NullLocator())
        right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _mib(round(y))))
        right.legend(frameon=False)
    for axis in (left, middle, right):
        axis.grid(True, color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="CLIP on handwritten digits and descriptions of them.")
    parser.add_argument("--short", action="store_true", help="one seed, few steps, small batches")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="the images that are scored")
    parser.add_argument("--output", type=Path, default=HERE.parent / "clip_digits.png", help="the plot")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    parser.add_argument("--memory-of", choices=(OURS, EAGER), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.memory_of:
        print(_memory_of(options.memory_of, options.batch))
        return 0
    size = SHORT_SIZE if options.short else FULL_SIZE
    if options.seeds is not None:
        if options.seeds < 1:
            parser.error(f"--seeds {options.seeds}: expected 1 or more")
        size = Size(**{**asdict(size), "seeds": options.seeds})
    differs = difference()
    print(f"CLIPLoss and the formula in torch: loss and gradients within {differs:.1e}")
    results, straight = measure(size, options.split)
    memory = measure_memory(size.batches)
    show(results, straight, memory, size, options.split)
    plot(results, memory, options.output)
    print(f"written: {options.output}")
    if options.json:
        record = {
            "size": asdict(size), "split": options.split, "pixels": straight, "difference": differs, "memory": memory,
            "results": [asdict(result) for result in results],
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    for line in (found := complaints(results, memory, differs)):
        print(f"clip_digits: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
