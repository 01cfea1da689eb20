"""Pre-training without labels on real handwritten digits: what a few labels are worth with it, and without.

SimCLR: two random views of an image are to be found among all views of the batch (`tlkernels.nn.NTXentLoss`). Then the
encoder is frozen, and a linear probe is fitted to 1, 5 or 10 labelled images of each digit. Against it stand the same
encoder trained from scratch with these labels and the same augmentations, and logistic regression on the pixels. All
of it over several seeds, which change the weights, the batches, the views, and which images have labels.

    python examples/simclr_digits.py            # two to three minutes on two cores
    python examples/simclr_digits.py --short    # seconds: one seed, a short pre-training

The 1797 images of 8 x 8 pixels come with scikit-learn (UCI's optical recognition of handwritten digits); nothing is
downloaded. The exit status is 1 where pre-training does not beat training from scratch with 1 and with 5 labels of
each digit. With 10 it is shown, not judged: both come out alike, since a hundred images and views of them are enough
for an encoder this small.

The augmentations are chosen for digits so small: shifts, small rotations and scalings, erased patches, noise. No
flips: they make other digits, or none. The recipe was chosen on the validation images; the test images had no say.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import tlkernels.nn

HERE = Path(__file__).resolve().parent
CLASSES = 10
LABELS = (1, 5, 10)  # of each digit
JUDGED = (1, 5)  # where pre-training has to win; with 10 both come out alike
WIDTH, PROJECTED = 128, 64
BATCH, TEMPERATURE, LEARNING_RATE, WEIGHT_DECAY = 250, 0.5, 2e-3, 1e-4

PRETRAINED, SCRATCH, PIXELS = "SimCLR, linear probe", "from scratch", "pixels, logistic regression"


@dataclass(frozen=True)
class Size:
    """How much work it is."""

    epochs: int = 60  # of pre-training, four steps each
    steps: int = 200  # from scratch
    seeds: int = 5


FULL_SIZE, SHORT_SIZE = Size(), Size(epochs=25, steps=60, seeds=1)


@dataclass
class Result:
    """Accuracies by the number of labels of each digit, one for each seed."""

    name: str
    accuracies: dict[int, list[float]] = field(default_factory=dict)

    def mean(self, labels: int) -> float:
        return statistics.fmean(self.accuracies[labels])

    def spread(self, labels: int) -> float:
        found = self.accuracies[labels]
        return statistics.stdev(found) if len(found) > 1 else math.nan


# ---- the data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    images: Tensor  # [n, 1, 8, 8], from 0 to 1
    labels: Tensor  # [n]


@dataclass(frozen=True)
class Data:
    train: Split
    validation: Split
    test: Split


def load() -> Data:
    """1000 images to train on, 200 for validation, 597 for the test, each digit in proportion; always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    rest, test = train_test_split(range(len(labels)), test_size=597, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=200, stratify=labels[rest], random_state=0)
    return Data(*(Split(images[part], labels[part]) for part in (train, validation, test)))


def few(split: Split, labels: int, seed: int) -> Split:
    """So many random images of each digit."""
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    rows = [order[split.labels[order] == digit][:labels] for digit in range(CLASSES)]
    if any(len(found) < labels for found in rows):
        raise ValueError(f"few: labels is {labels}; expected at most {min(map(len, rows))}, there are no more images")
    chosen = torch.cat(rows)
    return Split(split.images[chosen], split.labels[chosen])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random view of each image: shifted, turned, scaled, a patch erased, in another contrast, with noise."""
    n, _, height, width = images.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape).uniform_(low, high, generator=generator)

    angle, scale = uniform(-0.22, 0.22), uniform(0.9, 1.1)  # 12 degrees
    shift = uniform(-1.0, 1.0, 2) * 2 / width  # pixels, in coordinates from -1 to 1
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = functional.affine_grid(matrix, [n, 1, height, width], align_corners=False)
    views = functional.grid_sample(images, grid, align_corners=False)
    place = torch.arange(height)
    top, left = uniform(-2.0, height), uniform(-2.0, width)  # a patch of 2 x 2, half outside for some
    rows = (place >= top[:, None]) & (place < top[:, None] + 2)
    columns = (place >= left[:, None]) & (place < left[:, None] + 2)
    views = views * ~(rows[:, None, :, None] & columns[:, None, None, :])
    views = views * uniform(0.7, 1.3, 1, 1, 1)
    return views + 0.05 * torch.randn(views.shape, generator=generator)


# ---- the models -----------------------------------------------------------------------------------------------------


class Encoder(nn.Sequential):
    """Images [n, 1, 8, 8] to features [n, 128]."""

    def __init__(self) -> None:
        def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        super().__init__(
            *block(1, 32, 1), *block(32, 64, 2), *block(64, WIDTH, 1), nn.Flatten(), nn.Linear(16 * WIDTH, WIDTH)
        )


def pretrain(
    images: Tensor, *, epochs: int, seed: int, tick: Callable[[float], None] = lambda _: None
) -> tuple[Encoder, list[float]]:
    """The encoder, in eval mode, and the loss of every step. Labels are not among the arguments."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder()
    head = nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, PROJECTED))
    criterion = tlkernels.nn.NTXentLoss(TEMPERATURE)  # it normalizes
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches = max(1, len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches)
    losses: list[float] = []
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order.chunk(batches):
            views = torch.cat([augment(images[rows], generator), augment(images[rows], generator)])
            loss = criterion(*head(encoder(views)).chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            tick(len(losses) / (epochs * batches))
    return encoder.eval(), losses


@torch.no_grad()
def features(encoder: nn.Module, images: Tensor) -> Tensor:
    return encoder.eval()(images)


def probe(train_x: Tensor, train_y: Tensor, x: Tensor, y: Tensor) -> float:
    """The accuracy of logistic regression with scikit-learn's defaults, on standardized features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(train_x.flatten(1).numpy(), train_y.numpy())
    return float(model.score(x.flatten(1).numpy(), y.numpy()))


def from_scratch(labelled: Split, scored: Split, *, steps: int, seed: int) -> float:
    """The accuracy of the same encoder with a linear layer, trained with the labels alone, on augmented images."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(Encoder(), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(steps):
        loss = functional.cross_entropy(model(augment(labelled.images, generator)), labelled.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return float((model(scored.images).argmax(1) == scored.labels).float().mean())


# ---- the comparison -------------------------------------------------------------------------------------------------


def measure(size: Size, split: str = "test", say: Callable[[str], None] = print) -> tuple[list[Result], list[float]]:
    """All providers at every seed, and the mean losses of pre-training of the first."""
    data = load()
    scored: Split = getattr(data, split)
    results = [Result(name, {n: [] for n in LABELS}) for name in (PRETRAINED, SCRATCH, PIXELS)]
    pretrained, scratch, pixels = results
    curve: list[float] = []
    for seed in range(size.seeds):
        start = time.perf_counter()
        encoder, losses = pretrain(data.train.images, epochs=size.epochs, seed=seed)
        curve = curve or losses
        taken = time.perf_counter() - start
        known = features(encoder, scored.images)
        for labels in LABELS:
            chosen = few(data.train, labels, seed)
            args = (chosen.labels, known, scored.labels)
            pretrained.accuracies[labels].append(probe(features(encoder, chosen.images), *args))
            scratch.accuracies[labels].append(from_scratch(chosen, scored, steps=size.steps, seed=seed))
            pixels.accuracies[labels].append(probe(chosen.images, chosen.labels, scored.images, scored.labels))
        numbers = ", ".join(f"{pretrained.accuracies[n][-1]:.3f} / {scratch.accuracies[n][-1]:.3f}" for n in LABELS)
        say(
            f"seed {seed}: pre-training {taken:.1f} s, loss {losses[0]:.2f} to {losses[-1]:.2f}; "
            f"SimCLR / scratch: {numbers}"
        )
    return results, curve


def complaints(results: Sequence[Result], curve: Sequence[float]) -> list[str]:
    """What is not as it should be; empty when all is well."""
    by_name = {result.name: result for result in results}
    found = []
    for labels in JUDGED:
        ours, other = by_name[PRETRAINED].mean(labels), by_name[SCRATCH].mean(labels)
        if not ours > other:
            found.append(f"{labels} labels of each digit: pre-training has {ours:.3f}, scratch {other:.3f}")
    if not statistics.fmean(curve[-4:]) < statistics.fmean(curve[:4]):
        found.append(f"the loss of pre-training went from {curve[0]:.3f} to {curve[-1]:.3f}; expected less")
    return found


def show(results: Sequence[Result], size: Size, split: str) -> None:
    """The table, by rich where it is installed."""
    heads = ["", *(f"{n} label{'s' if n > 1 else ''} of each digit" for n in LABELS)]
    rows = []
    for result in results:
        cells = [
            f"{100 * result.mean(n):.1f}" + (f" ± {100 * result.spread(n):.1f}" if size.seeds > 1 else "")
            for n in LABELS
        ]
        rows.append([result.name, *(f"{cell} %" for cell in cells)])
    title = f"Accuracy on the {split} images; mean and standard deviation of {size.seeds} seeds"
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for row in [heads, *rows]:
            print("  ".join(f"{cell:>28}" for cell in row))
        return
    table = Table(title=title)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row, style="bold cyan" if row[0] == PRETRAINED else None)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def plot(results: Sequence[Result], curve: Sequence[float], path: Path) -> None:
    """Accuracy against labels with every seed's, the loss, and some views."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13.5, 4.2), width_ratios=(1.3, 1, 0.9))
    for result, colour, marker in zip(results, ("#0072B2", "#D55E00", "#777777"), "osD", strict=True):
        places = range(len(LABELS))
        left.plot(places, [result.mean(n) for n in LABELS], color=colour, marker=marker, label=result.name)
        for place, n in zip(places, LABELS, strict=True):
            seeds = result.accuracies[n]
            left.scatter([place] * len(seeds), seeds, color=colour, marker=marker, s=14, alpha=0.35)
    left.set_xticks(range(len(LABELS)), list(map(str, LABELS)))
    left.set(xlabel="labels of each digit", ylabel="accuracy", title="A few labels")
    left.legend(frameon=False)
    middle.plot(curve, color="#0072B2", linewidth=1)
    middle.set(xlabel="step", ylabel="NT-Xent", title="Pre-training, seed 0")
    for axis in (left, middle):
        axis.grid(True, color="#dddddd", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
    images = load().train.images[:5]
    generator = torch.Generator().manual_seed(0)
    columns = [images, *(augment(images, generator) for _ in range(4))]
    framed = [functional.pad(column[:, 0].clamp(0, 1), (1, 1, 1, 1), value=0.5) for column in columns]
    mosaic = torch.cat([torch.cat(list(column), 0) for column in framed], 1)
    right.imshow(mosaic.numpy(), cmap="gray_r", vmin=0, vmax=1)
    right.set(title="Images, and four views of each", xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="SimCLR on handwritten digits, against training from scratch.")
    parser.add_argument("--short", action="store_true", help="one seed and a short pre-training")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="what is scored")
    parser.add_argument("--output", type=Path, default=HERE.parent / "simclr_digits.png", help="the plot")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    options = parser.parse_args(argv)
    size = SHORT_SIZE if options.short else FULL_SIZE
    if options.seeds is not None:
        if options.seeds < 1:
            parser.error(f"--seeds {options.seeds}: expected 1 or more")
        size = Size(**{**asdict(size), "seeds": options.seeds})
    results, curve = measure(size, options.split)
    show(results, size, options.split)
    plot(results, curve, options.output)
    print(f"written: {options.output}")
    if options.json:
        record = {"size": asdict(size), "split": options.split, "results": [asdict(r) for r in results], "loss": curve}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    for line in (found := complaints(results, curve)):
        print(f"simclr_digits: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
