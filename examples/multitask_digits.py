"""Four tasks on one trunk: handwritten digits, by uniform weights, learned weights and gradient surgery.

scikit-learn's 8 x 8 digits. The heads say which *digit* it is, whether it is even (*parity*), how many strokes it is
made of (*strokes*: four classes by the most separate runs of ink along a row and a column), and give the image
back (*reconstruction*). All share a trunk of two layers. Uniform weights, uncertainty weights and GradNorm change the
losses; PCGrad, CAGrad, MGDA and UPGrad the gradients on the trunk (`tlkernels.methods.multitask.backward`).

Printed are means and spreads over five seeds on test images, delta-m against one network for each task, and how often
two tasks' gradients conflicted. The program checks that each surgery method's direction on recorded gradients is its
oracle's (the definition, by brute force in float64), and ends with status 1 otherwise.

    python examples/multitask_digits.py            # about 2 minutes on 2 cores
    python examples/multitask_digits.py --short
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tlkernels import ops
from tlkernels.methods import multitask

HERE = Path(__file__).resolve().parent
TASKS = ("digit", "parity", "strokes", "reconstruction")
SURGERY = ("pcgrad", "cagrad", "mgda", "upgrad")
WEIGHTINGS = ("uniform", "uncertainty", "gradnorm")
NAMES = {"pcgrad": "PCGrad", "cagrad": "CAGrad", "mgda": "MGDA", "upgrad": "UPGrad", "gradnorm": "GradNorm"}


@dataclass(frozen=True)
class Size:
    """How much is done."""

    seeds: int = 5
    epochs: int = 30
    hidden: int = 48
    batch: int = 64
    methods: tuple[str, ...] = (*WEIGHTINGS, *SURGERY)


SHORT_SIZE = Size(seeds=1, epochs=3, methods=("uniform", "gradnorm", "pcgrad"))


def strokes_of(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The most runs of ink along any row and any column together, less two: 0 to 3."""
    ink = images.reshape(-1, 8, 8) > 7

    def runs(lines: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        starts = lines & ~np.pad(lines, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]
        return np.asarray(starts.sum(2).max(1))

    return np.clip(runs(ink) + runs(ink.transpose(0, 2, 1)) - 2, 0, 3)


@dataclass(frozen=True)
class Data:
    """Images and what each task asks of them."""

    x: Tensor
    digit: Tensor
    strokes: Tensor

    def rows(self, index: Tensor) -> Data:
        return Data(self.x[index], self.digit[index], self.strokes[index])


def load(seed: int) -> tuple[Data, Data]:
    """Training and test images."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    every = Data(
        torch.tensor(digits.data / 16, dtype=torch.float32),
        torch.tensor(digits.target),
        torch.tensor(strokes_of(digits.data)),
    )
    index = np.arange(len(digits.target))
    train, test = train_test_split(index, test_size=0.3, random_state=seed, stratify=digits.target)
    return every.rows(torch.tensor(train)), every.rows(torch.tensor(test))


class Network(nn.Module):
    """A trunk and heads of unequal size."""

    def __init__(self, hidden: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.heads = nn.ModuleDict({
            "digit": nn.Linear(hidden, 10), "parity": nn.Linear(hidden, 2), "strokes": nn.Linear(hidden, 4),
            "reconstruction": nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, 64)),
        })  # fmt: skip

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {name: head(z) for name, head in self.heads.items()}


def losses_of(out: dict[str, Tensor], data: Data) -> list[Tensor]:
    """One for each task, in their order."""
    return [
        functional.cross_entropy(out["digit"], data.digit),
        functional.cross_entropy(out["parity"], data.digit % 2),
        functional.cross_entropy(out["strokes"], data.strokes),
        functional.mse_loss(out["reconstruction"], data.x) * 10,  # of the size of the others
    ]


@torch.no_grad()
def scores_of(model: Network, data: Data) -> dict[str, float]:
    """Accuracies, and the root mean square error of the reconstruction."""
    out = model(data.x)
    right = {"digit": data.digit, "parity": data.digit % 2, "strokes": data.strokes}
    scores = {name: float((out[name].argmax(1) == y).float().mean()) for name, y in right.items()}
    return {**scores, "reconstruction": float((out["reconstruction"] - data.x).square().mean().sqrt())}


@dataclass
class Run:
    """One method, one seed."""

    method: str
    seed: int
    scores: dict[str, float]
    rates: list[float]  # of conflicts, by epoch


def learn(method: str, seed: int, size: Size, only: int | None = None) -> Run:
    """Train by one method; with `only`, on that task alone."""
    torch.set_num_threads(1)
    train, test = load(seed)
    model = Network(size.hidden, seed)
    shared = list(model.trunk.parameters())
    weighting: multitask.Weighting | None = {
        "uniform": lambda: multitask.Uniform(4),
        "uncertainty": lambda: multitask.Uncertainty(4),
        "gradnorm": lambda: multitask.GradNorm(4, [model.trunk[2].weight], alpha=0.5),
    }.get(method, lambda: None)()
    surgery = multitask.METHODS[method]() if method in SURGERY else None
    learned = [] if weighting is None else list(weighting.parameters())
    optimizer = torch.optim.Adam([*model.parameters(), *learned], lr=2e-3)
    generator, rates = torch.Generator().manual_seed(seed), []
    torch.manual_seed(seed)
    for _ in range(size.epochs):
        found = []
        for step, index in enumerate(torch.randperm(len(train.x), generator=generator).split(size.batch)):
            losses = losses_of(model(train.x[index]), train.rows(index))
            optimizer.zero_grad()
            if only is not None:
                losses[only].backward()
            elif surgery is not None:
                gram = multitask.backward(losses, shared, surgery).gram
                found.append(multitask.conflict_rate(gram))
            else:
                if step % 4 == 0:  # the others need no gradient of each task: looked at now and then
                    grads = [list(torch.autograd.grad(loss, shared, retain_graph=True)) for loss in losses]
                    found.append(multitask.conflict_rate(ops.task_gram(grads)))
                assert weighting is not None
                weighting(losses).backward()
            optimizer.step()
        rates.append(float(np.mean(found)) if found else float("nan"))
    return Run(method if only is None else f"{TASKS[only]} alone", seed, scores_of(model, test), rates)


def _job(job: tuple[str, int, Size, int | None]) -> Run:
    return learn(*job)


def measure(size: Size, workers: int) -> list[Run]:
    """All methods and seeds, and each task alone."""
    seeds = range(size.seeds)
    jobs: list[tuple[str, int, Size, int | None]] = [(m, s, size, None) for m in size.methods for s in seeds]
    jobs += [("uniform", s, size, task) for task in range(4) for s in seeds]
    if workers == 1:
        return [_job(job) for job in jobs]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_job, jobs))


# ---- directions against their oracles -------------------------------------------------------------------------------


def recorded(seed: int = 0, steps: int = 20) -> list[Tensor]:
    """The tasks' gradients on the trunk, ``[4, P]`` in float64, during training by uniform weights."""
    train, _ = load(seed)
    model = Network(48, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    found = []
    for step in range(steps):
        index = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(step))[:64]
        losses = losses_of(model(train.x[index]), train.rows(index))
        grads = [torch.autograd.grad(loss, list(model.trunk.parameters()), retain_graph=True) for loss in losses]
        if step % 5 == 4:
            found.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in grads]).double())
        optimizer.zero_grad()
        sum(losses).backward()  # type: ignore[union-attr]
        optimizer.step()
    return found


def oracle_errors(jacobians: Sequence[Tensor]) -> dict[str, float]:
    """The worst relative distance of each surgery method's direction from what defines it."""
    worst = dict.fromkeys(SURGERY, 0.0)
    for J in jacobians:
        gram = J @ J.T
        orders = [list(np.random.default_rng(t).permutation(4)) for t in range(4)]
        expected = {"pcgrad": _pcgrad(J, orders), "cagrad": _cagrad(J, 0.4), "mgda": _mgda(J), "upgrad": _upgrad(J)}
        ours = {
            "pcgrad": ops.pcgrad_weights(gram, orders=orders), "cagrad": ops.cagrad_weights(gram, 0.4),
            "mgda": ops.mgda_weights(gram), "upgrad": ops.upgrad_weights(gram),
        }  # fmt: skip
        for name, want in expected.items():
            got = ours[name] @ J
            worst[name] = max(worst[name], float((got - want).norm() / want.norm()))
    return worst


def _pcgrad(J: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """Algorithm 1 of Yu et al. on the gradients themselves."""
    rows = []
    for t, order in enumerate(orders):
        g = J[t].clone()
        for u in order:
            if u != t and g @ J[u] < 0:
                g -= (g @ J[u]) / (J[u] @ J[u]) * J[u]
        rows.append(g)
    return torch.stack(rows).sum(0)


def _faces(J: Tensor) -> list[tuple[int, ...]]:
    return [f for n in range(1, len(J) + 1) for f in itertools.combinations(range(len(J)), n)]


def _mgda(J: Tensor) -> Tensor:
    """The shortest point of the gradients' hull: the best of all faces' shortest points that lie in the face."""
    best = None
    for face in _faces(J):
        rows = J[list(face)]
        n = len(face)
        system = torch.zeros(n + 1, n + 1, dtype=J.dtype)
        system[:n, :n], system[n, :n], system[:n, n] = rows @ rows.T, 1, 1
        right = torch.zeros(n + 1, dtype=J.dtype)
        right[n] = 1
        w = torch.linalg.lstsq(system, right[:, None]).solution[:n, 0]
        if (w >= -1e-12).all() and (best is None or (w @ rows).norm() < best.norm()):
            best = w @ rows
    assert best is not None
    return best


def _upgrad(J: Tensor) -> Tensor:
    """The mean of each gradient's projection on the cone {d: J d >= 0}, by the best of all faces of the cone."""
    rows = []
    for t in range(len(J)):
        best, distance = None, float("inf")
        for face in [(), *_faces(J)]:
            normals = J[list(face)]
            g = J[t]
            d = (
                g - normals.T @ torch.linalg.lstsq(normals @ normals.T, (normals @ g)[:, None]).solution[:, 0]
                if face
                else g
            )
            if bool((J @ d >= -1e-9 * J.norm(dim=1) * g.norm()).all()) and float((d - g).norm()) < distance:
                best, distance = d, float((d - g).norm())
        assert best is not None
        rows.append(best)
    return torch.stack(rows).mean(0)


def _cagrad(J: Tensor, c: float) -> Tensor:
    """The dual of Liu et al. over the simplex by SLSQP from several starts."""
    from scipy.optimize import minimize

    G = (J @ J.T).numpy()
    T = len(G)
    mean = np.full(T, 1 / T)
    phi = c * np.sqrt(mean @ G @ mean)
    scale = G.trace() / T

    def objective(w: np.ndarray[Any, Any]) -> float:
        return float((w @ G @ mean + phi * np.sqrt(max(w @ G @ w, 0))) / scale)

    starts = [mean, *np.eye(T)]
    found = [
        minimize(objective, s, method="SLSQP", bounds=[(0, 1)] * T, tol=1e-15,
                 constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"maxiter": 500}) for s in starts
    ]  # fmt: skip
    w = min(found, key=lambda r: r.fun).x
    combined = torch.tensor(w) @ J
    return J.mean(0) + phi / combined.norm() * combined


LIMITS = {"pcgrad": 1e-10, "mgda": 1e-8, "upgrad": 1e-8, "cagrad": 1e-6}  # SLSQP is an iteration


# ---- what is shown --------------------------------------------------------------------------------------------------


def of_method(runs: Sequence[Run], method: str, task: str) -> np.ndarray[Any, Any]:
    """A task's scores over the seeds."""
    return np.array([run.scores[task] for run in runs if run.method == method])


def delta(runs: Sequence[Run], method: str) -> np.ndarray[Any, Any]:
    """Delta-m of each seed against one network a task, in percent."""
    alone = np.stack([of_method(runs, f"{task} alone", task) for task in TASKS], 1)
    mine = np.stack([of_method(runs, method, task) for task in TASKS], 1)
    better = [True, True, True, False]
    return np.array([multitask.delta_m(m, b, better) for m, b in zip(mine, alone, strict=True)])


def show(runs: Sequence[Run], errors: dict[str, float]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    methods = [m for m in dict.fromkeys(run.method for run in runs) if not m.endswith("alone")]
    seeds = sum(run.method == methods[0] for run in runs)
    table = Table(title=f"four tasks on handwritten digits, {seeds} seeds, mean ± spread")
    for head in ("method", *(f"{t} %" for t in TASKS[:3]), "rms error", "delta-m %", "conflicts", "from its oracle"):
        table.add_column(head, justify="left" if head == "method" else "right", no_wrap=True)

    def cell(values: np.ndarray[Any, Any], factor: float = 100, digits: int = 1) -> str:
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        return f"{factor * values.mean():.{digits}f} ± {factor * spread:.{digits}f}"

    for m in methods:
        rates = [r for run in runs if run.method == m for r in run.rates]
        table.add_row(
            NAMES.get(m, m), *(cell(of_method(runs, m, t)) for t in TASKS[:3]),
            cell(of_method(runs, m, "reconstruction"), 1, 3), cell(delta(runs, m), 1),
            f"{100 * float(np.mean(rates)):.0f} %", f"{errors[m]:.0e}" if m in errors else "",
        )  # fmt: skip
    table.add_row(
        "one network a task", *(cell(of_method(runs, f"{t} alone", t)) for t in TASKS[:3]),
        cell(of_method(runs, "reconstruction alone", "reconstruction"), 1, 3), "0", "", "",
    )  # fmt: skip
    Console(width=140).print(table)


def plot(runs: Sequence[Run], path: Path) -> None:
    """Conflict rate by epoch, mean over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for m in dict.fromkeys(run.method for run in runs):
        if not m.endswith("alone"):
            rates = np.array([run.rates for run in runs if run.method == m]).mean(0)
            ax.plot(range(1, len(rates) + 1), 100 * rates, label=NAMES.get(m, m))
    ax.set(xlabel="epoch", ylabel="pairs of tasks in conflict (%)", ylim=(0, 100))
    ax.set_title("conflicts on the shared trunk")
    ax.legend(ncols=2)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, show, and say whether every direction is its oracle's."""
    parser = argparse.ArgumentParser(description="Multi-task learning on handwritten digits.")
    parser.add_argument("--short", action="store_true", help="one seed, three methods, few epochs")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--output", type=Path, default=HERE.parent / "multitask_digits.png", help="the plot")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    options = parser.parse_args(argv)
    for name in ("seeds", "workers"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: expected 1 or more")
    size = SHORT_SIZE if options.short else Size()
    if options.seeds is not None:
        size = replace(size, seeds=options.seeds)
    runs = measure(size, options.workers)
    errors = oracle_errors(recorded())
    show(runs, errors)
    plot(runs, options.output)
    print(f"written: {options.output}")
    if options.json:
        options.json.write_text(json.dumps({"runs": [vars(run) for run in runs], "oracles": errors}) + "\n")
    found = [
        f"{NAMES[m]} is {e:.1e} from its oracle; expected {LIMITS[m]:.0e}" for m, e in errors.items() if e > LIMITS[m]
    ]
    for line in found:
        print(f"multitask_digits: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
