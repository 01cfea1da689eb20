"""``python -m bench --family nf4 --device cpu``: measure, print, and write what was measured."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from bench import harness, registry, report, roofline
from bench.registry import Selection

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks of one family; the exit status is 1 where one of our own results is wrong."""
    options = _parser().parse_args(argv)
    family, device = registry.load(options.family), torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda, but this torch sees no CUDA GPU", file=sys.stderr)
        return 2
    selection = _selection(options)
    if unknown := set(selection.ops or ()) - set(family.ops):
        print(f"bench: --op {', '.join(sorted(unknown))}; expected some of {', '.join(family.ops)}", file=sys.stderr)
        return 2
    out = Path(options.out) if options.out else None
    result = run(family, device, selection, options.threads, options.max_minutes, out)
    if options.write_docs:
        report.write_docs(result, ROOT / "docs")
    wrong = [row for row in result.rows if row.ours and not row.right]
    for row in wrong:
        print(f"bench: {row.provider}, {row.op} {row.shape} {row.dtype}: {row.note}", file=sys.stderr)
    return 1 if wrong else 0


def run(
    family: registry.Family,
    device: torch.device,
    selection: Selection,
    threads: tuple[int, ...],
    max_minutes: float | None = None,
    out: Path | None = None,
) -> report.Report:
    """Measure everything selected; the JSON file is rewritten after every case, so a stopped run keeps its rows."""
    deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
    quick = selection.quick
    effort = harness.CUDA if device.type == "cuda" else harness.QUICK if quick else harness.FULL
    path = out or ROOT / "bench" / "results" / f"{device.type}-{family.name}{'-quick' if quick else ''}.json"
    result = report.Report(family.name, device.type, report.machine(device), [], [], family.missing(device))
    before = torch.get_num_threads()
    progress = report.Progress()
    load = result.machine["load at the start"]
    if isinstance(load, float) and load > 0.5 * result.machine["cores"]:
        progress.note(
            f"bench: the machine is busy (load {load}); threads wait for each other and the times mean little"
        )
    try:
        for count in threads or (before,):
            torch.set_num_threads(count)
            ceilings = roofline.measure(device, count, quick)
            result.ceilings.append(ceilings)
            progress.note(report.describe_ceilings(ceilings))
            cases = family.cases(selection)
            for index, case in enumerate(cases):
                if time.monotonic() > deadline:
                    result.missing.append(f"{len(cases) - index} cases, from {case.label} on: the time was up")
                    break
                progress.step(index, len(cases), case.label)
                problem = family.problem(case, device)
                providers = [p for p in family.providers(device) if registry.wanted(p, selection)]
                rows = harness.run_case(problem, providers, ceilings, effort, device)
                result.rows += rows
                result.save(path)
                progress.rows(rows)
    finally:
        torch.set_num_threads(before)
    progress.note("".join(f"missing: {line}\n" for line in result.missing) + f"written: {path}")
    return result


def _selection(options: argparse.Namespace) -> Selection:
    dtypes = tuple(getattr(torch, name) for name in options.dtypes) if options.dtypes else None
    shapes = tuple(tuple(int(n) for n in shape.split("x")) for shape in options.shapes) if options.shapes else None
    return Selection(options.quick, options.op, shapes, options.rows, dtypes, options.providers)


def _parser() -> argparse.ArgumentParser:
    def words(text: str) -> tuple[str, ...]:
        return tuple(word for word in text.split(",") if word)

    def numbers(text: str) -> tuple[int, ...]:
        values = tuple(int(word) for word in words(text))
        if any(value < 1 for value in values):
            raise argparse.ArgumentTypeError(f"{text!r}: expected numbers from 1 up, separated by commas")
        return values

    def shapes(text: str) -> tuple[str, ...]:
        for shape in words(text):
            sides = shape.split("x")
            if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
                raise argparse.ArgumentTypeError(f"{shape!r}: expected OUTxIN, e.g. 4096x4096")
        return words(text)

    def dtypes(text: str) -> tuple[str, ...]:
        for name in words(text):
            if name not in ("float32", "bfloat16", "float16"):
                raise argparse.ArgumentTypeError(f"{name!r}: expected float32, bfloat16 or float16")
        return words(text)

    parser = argparse.ArgumentParser("bench", description="Microbenchmarks of tlkernels against its peers.")
    parser.add_argument("--family", choices=registry.FAMILIES, default="nf4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one small shape: does it run, is it right")
    parser.add_argument("--op", type=words, help="only these ops, separated by commas")
    parser.add_argument("--shapes", type=shapes, help="these shapes instead of the listed ones: 1024x1024,4096x4096")
    parser.add_argument("--rows", type=numbers, help="these numbers of rows instead of the listed ones")
    parser.add_argument("--dtypes", type=dtypes, help="only these: float32,bfloat16,float16")
    parser.add_argument("--providers", type=words, help="only providers whose name contains one of these")
    parser.add_argument("--threads", type=numbers, default=(), help="run for each of these (default: torch's number)")
    parser.add_argument("--max-minutes", type=float, help="start no case after so many minutes; say what was left out")
    parser.add_argument("--out", help="the JSON file (default: bench/results/<device>-<family>.json)")
    parser.add_argument("--write-docs", action="store_true", help="write the table and plots into docs/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
