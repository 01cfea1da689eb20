"""open_clip's losses from here against open_clip's own, in one process and in two."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # one of the processes of a test below
    sys.path.insert(0, str(ROOT))

from bench.peers import submodule  # noqa: E402
from tlkernels.integrations import open_clip as ours  # noqa: E402

NAMES = ["ClipLoss", "SigLipLoss", "CoCaLoss", "DistillClipLoss"]
SCALE, BIAS, TEACHERS_SCALE = (torch.tensor(v, dtype=torch.float64) for v in (13.1, -8.7, 21.0))


@pytest.fixture(scope="module")
def theirs() -> Any:
    try:
        return submodule("open_clip.loss")
    except ImportError as error:
        pytest.skip(str(error))


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def batch(kind: str, rows: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """What open_clip's models return in training, by name."""
    out = {"image_features": draw(rows, 12, seed=seed), "text_features": draw(rows, 12, seed=seed + 1)}
    out["logit_scale"] = SCALE
    if kind == "SigLipLoss":
        out["logit_bias"] = BIAS
    if kind == "CoCaLoss":
        out["logits"] = 3 * draw(rows, 5, 7, seed=seed + 2)
        out["labels"] = torch.randint(0, 7, (rows, 5), generator=torch.Generator().manual_seed(seed))
    if kind == "DistillClipLoss":
        out |= {
            "dist_image_features": draw(rows, 20, seed=seed + 3),
            "dist_text_features": draw(rows, 20, seed=seed + 4),
        }
        out["dist_logit_scale"] = TEACHERS_SCALE
    return out


def answer(loss: Callable[..., Any], given: dict[str, Any]) -> dict[str, Tensor]:
    """Every loss, and the gradients of their weighed sum."""
    given = {
        name: t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in given.items()
    }
    losses = loss(**given, output_dict=True)
    sum((0.7 + 0.4 * k) * one for k, one in enumerate(losses.values())).backward()  # type: ignore[union-attr]
    gradients = {f"d {name}": t.grad for name, t in given.items() if isinstance(t, Tensor) and t.requires_grad}
    assert all(g is not None for g in gradients.values())
    return {name: t.detach() for name, t in (losses | gradients).items()}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of any loss or gradient; some are 0 but for rounding."""
    assert found.keys() == expected.keys()
    return max(float((found[k] - expected[k]).norm() / expected[k].norm().clamp(min=0.1)) for k in found)


# ---- one process ----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {"CoCaLoss": {"caption_loss_weight": 2.0, "clip_loss_weight": 0.6, "pad_id": 3}}


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("name", NAMES)
def test_one_process(theirs: Any, name: str, rows: int) -> None:
    options, given = OPTIONS.get(name, {}), batch(name, rows)
    found = answer(getattr(ours, name)(**options), given)
    assert error(found, answer(getattr(theirs, name)(**options), given)) < 1e-12


def test_a_clip_loss_with_a_bias_and_without_a_dict(theirs: Any) -> None:
    x, y = batch("ClipLoss")["image_features"], batch("ClipLoss")["text_features"]
    for name in ("ClipLoss", "SigLipLoss"):
        for bias in (BIAS, None):
            found = getattr(ours, name)()(x, y, SCALE, bias)
            torch.testing.assert_close(found, getattr(theirs, name)()(x, y, SCALE, bias), rtol=1e-12, atol=0)
    given = batch("DistillClipLoss")
    for name, arguments in (("DistillClipLoss", given), ("CoCaLoss", batch("CoCaLoss"))):
        options = OPTIONS.get(name, {})
        pair = zip(
            getattr(ours, name)(**options)(**arguments), getattr(theirs, name)(**options)(**arguments), strict=True
        )
        for a, b in pair:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_caption_alone(theirs: Any) -> None:
    given = batch("CoCaLoss")
    found = ours.CoCaLoss(2.0, 0.0)(**given, output_dict=True)
    expected = theirs.CoCaLoss(2.0, 0.0)(**given, output_dict=True)
    assert found["contrastive_loss"] == expected["contrastive_loss"] == 0
    torch.testing.assert_close(found["caption_loss"], expected["caption_loss"])


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_open_clips(theirs: Any, name: str) -> None:
    for method in ("__init__", "forward"):
        known = inspect.signature(getattr(getattr(theirs, name), method)).parameters
        mine = inspect.signature(getattr(getattr(ours, name), method)).parameters
        positional = [p for p, parameter in mine.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        assert positional == list(known)
        for argument, parameter in known.items():
            assert parameter.default is parameter.empty or mine[argument].default == parameter.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_distilled_loss_in_other_dtypes(dtype: torch.dtype) -> None:
    given = {k: t.to(dtype if t.dim() else torch.float32) for k, t in batch("DistillClipLoss", 40).items()}
    found = answer(ours.DistillClipLoss(), given)
    exact = answer(ours.DistillClipLoss(), {k: t.double() for k, t in given.items()})
    assert found["distill_loss"].dtype == torch.float32 and found["d image_features"].dtype == dtype
    for name, t in found.items():
        limit = 1e-5 if t.dtype == torch.float32 else 1e-2
        assert float((t.double() - exact[name]).norm() / exact[name].norm()) < limit, name


def test_a_distilled_loss_keeps_no_matrix() -> None:
    rows, kept = 300, []
    given = {k: t.float() for k, t in batch("DistillClipLoss", rows).items()}
    given["image_features"].requires_grad_()

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sum(ours.DistillClipLoss()(**given)).backward()  # type: ignore[union-attr]
    assert kept and max(kept) <= rows * 20


# ---- create_loss ----------------------------------------------------------------------------------------------------


def arguments(**changes: Any) -> argparse.Namespace:
    """The training script's defaults."""
    return argparse.Namespace(
        **{
            "model": "RN50", "distill": False, "siglip": False, "local_loss": False, "gather_with_grad": False,
            "rank": 0, "world_size": 1, "horovod": False, "loss_dist_impl": None, "coca_caption_loss_weight": 2.0,
            "coca_contrastive_loss_weight": 1.0, **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "ClipLoss"),
        ({"horovod": True, "local_loss": True, "gather_with_grad": True}, "ClipLoss"),
        ({"siglip": True}, "SigLipLoss"),
        ({"siglip": True, "loss_dist_impl": "gather"}, "SigLipLoss"),
        ({"model": "CoCa_ViT-B-32"}, "CoCaLoss"),
        ({"model": "coca_roberta", "siglip": True, "coca_caption_loss_weight": 0.5}, "CoCaLoss"),
        ({"distill": True, "model": "coca_base"}, "DistillClipLoss"),
    ],
)
def test_create_loss_chooses_as_open_clip_does(theirs: Any, changes: dict[str, Any], name: str) -> None:
    args = arguments(**changes)
    loss = ours.create_loss(args)
    assert type(loss) is getattr(ours, name)
    for option in ("local_loss", "gather_with_grad", "rank", "world_size", "use_horovod"):
        if name != "SigLipLoss" or option in ("rank", "world_size"):
            assert getattr(loss, option) == getattr(args, option.removeprefix("use_"))
    model: Any = getattr(theirs, name)
    if name == "CoCaLoss":
        expected = model(args.coca_caption_loss_weight, args.coca_contrastive_loss_weight)
    else:
        expected = model()
    assert error(answer(loss, batch(name)), answer(expected, batch(name))) < 1e-12


def test_create_loss_of_an_older_script() -> None:
    args = arguments()
    del args.siglip, args.loss_dist_impl
    assert type(ours.create_loss(args)) is ours.ClipLoss


def test_the_training_step_under_amp() -> None:
    """What the script does with the loss: named outputs, a sum of the values of a dict, a scaled backward pass."""
    given = {k: t.float().requires_grad_() for k, t in batch("ClipLoss").items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = ours.create_loss(arguments())(**given, output_dict=True)
        total = sum(losses.values())
    (128 * total).backward()
    rounded = {k: t.detach().bfloat16().double() if t.dim() else t.detach().double() for k, t in given.items()}
    expected = answer(ours.ClipLoss(), rounded)
    torch.testing.assert_close(total.double(), expected["contrastive_loss"], rtol=1e-6, atol=0)
    assert given["image_features"].grad is not None
    found = given["image_features"].grad.double() / 128
    assert (found - expected["d image_features"] / 0.7).norm() < 6e-3 * found.norm()


# ---- two processes --------------------------------------------------------------------------------------------------

Case = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]


def cases() -> dict[str, Case]:
    """Name of the class, options of both, of this library's, of open_clip's."""
    found: dict[str, Case] = {}
    for local in (False, True):
        for grad in (False, True):
            for exchange in ("gather", "ring"):
                mode = {"local_loss": local, "gather_with_grad": grad}
                # the mode that is not reproduced
                model = {"gather_with_grad": True} if local else {}
                found[f"ClipLoss {mode} {exchange}"] = ("ClipLoss", mode, {"exchange": exchange}, model)
    for impl in (None, "bidir", "shift", "reduce", "gather"):
        found[f"SigLipLoss {impl}"] = ("SigLipLoss", {"dist_impl": impl}, {}, {})
    coca = OPTIONS["CoCaLoss"] | {"local_loss": True, "gather_with_grad": True}
    found["CoCaLoss"] = ("CoCaLoss", coca, {}, {})
    return found


def worker(rank: int, folder: Path) -> None:
    """One process: the errors of all cases, written as JSON."""
    model = submodule("open_clip.loss")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    place = {"rank": rank, "world_size": 2}
    report: dict[str, Any] = {}
    for case, (name, options, mine, their) in cases().items():
        given = batch(name, seed=100 * rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = getattr(ours, name)(**options, **mine, **place)
        found, expected = (answer(one, given) for one in (loss, getattr(model, name)(**{**options, **their}, **place)))
        for answers in (found, expected):  # as DDP does with the gradients of parameters
            for scalar in ("d logit_scale", "d logit_bias"):
                if scalar in answers:
                    torch.distributed.all_reduce(answers[scalar])
        report[case] = {"error": error(found, expected), "warnings": [str(w.message) for w in caught]}
    refusals = {
        "horovod": lambda: ours.ClipLoss(use_horovod=True, **place),
        "wrong rank": lambda: ours.ClipLoss(rank=1 - rank, world_size=2),
        "wrong size": lambda: ours.SigLipLoss(rank=rank, world_size=3),
    }
    for case, call in refusals.items():
        with pytest.raises(ValueError) as refused:
            call()
        report[case] = str(refused.value)
    # one process is wrong: the other is told, and does not wait for the group's timeout
    for case, loss in (
        ("ClipLoss", ours.ClipLoss(**place)),
        ("ClipLoss ring", ours.ClipLoss(local_loss=True, gather_with_grad=True, exchange="ring", **place)),
        ("SigLipLoss", ours.SigLipLoss(**place)),
    ):
        x = draw(3, 4, seed=rank)
        for wrong in (x[:2], x.long(), [1.0]):
            with pytest.raises((TypeError, ValueError, RuntimeError)) as refused:
                loss(x, wrong if rank == 0 else x, 2.0)
            report.setdefault(f"wrong {case}", []).append(str(refused.value))
    (folder / f"{rank}.json").write_text(json.dumps(report))
    torch.distributed.barrier()  # the other has its answer
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch.distributed has no gloo here")
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    yield [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", cases())
def test_two_processes(two_processes: list[dict[str, Any]], case: str) -> None:
    _, options, _, _ = cases()[case]
    for report in two_processes:
        assert report[case]["error"] < 1e-12
        inexact = options.get("local_loss", False) and not options["gather_with_grad"]
        told = [text for text in report[case]["warnings"] if "no exact gradient; it is computed with it" in text]
        assert bool(told) == inexact


def test_two_processes_that_do_not_fit(two_processes: list[dict[str, Any]]) -> None:
    for rank, report in enumerate(two_processes):
        assert report["horovod"] == "ClipLoss: use_horovod is True in 2 processes; expected torch.distributed"
        assert report["wrong rank"].startswith(f"ClipLoss: rank is {1 - rank} and world_size 2; expected {rank} and 2")
        assert report["wrong size"].startswith(f"SigLipLoss: rank is {rank} and world_size 3; expected {rank} and 2")


@pytest.mark.parametrize("name", ["ClipLoss", "ClipLoss ring", "SigLipLoss"])
def test_one_of_two_processes_is_wrong(two_processes: list[dict[str, Any]], name: str) -> None:
    says = ("text_features has 2 rows; expected 3", "text_features has dtype int64", "text_features is list; expected")
    for own, told, words in zip(*(r[f"wrong {name}"] for r in two_processes), says, strict=True):
        assert words in own and "rank 0 of the group refused its arguments" in told


# ---- wrong calls ----------------------------------------------------------------------------------------------------

X = torch.ones(4, 3)
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ours.ClipLoss(world_size=2), RuntimeError, "ClipLoss: world_size is 2, but torch.distributed is not init"),
    (lambda: ours.CoCaLoss(1, 1, world_size=2), RuntimeError, "CoCaLoss: world_size is 2, but torch.distributed is"),
    (lambda: ours.SigLipLoss(world_size=2), RuntimeError, "SigLipLoss: world_size is 2, but torch.distributed is not"),
    (lambda: ours.ClipLoss(rank=1), ValueError, "CLIPLoss: rank is 1 of world_size 1; expected 0"),
    (lambda: ours.SigLipLoss(dist_impl="tree"), ValueError, "dist_impl is 'tree'; expected 'bidir'"),
    (lambda: ours.ClipLoss()(X, X[:2], 1.0), ValueError, "ClipLoss: text_features has 2 rows; expected 4"),
    (lambda: ours.SigLipLoss()(X, X.half(), 1.0), TypeError, "SigLipLoss: text_features has dtype float16; expected f"),
    (
        lambda: ours.DistillClipLoss(world_size=2),
        ValueError,
        "rank is 0 and world_size 2; expected 0 and 1: in several processes use open_clip.loss.DistillClipLoss",
    ),
    (
        lambda: ours.DistillClipLoss()(X, X, 1.0, X[:2], X[:2], 1.0),
        ValueError,
        "DistillClipLoss: dist_image_features has 2 rows; expected 4, like image_features",
    ),
    (
        lambda: ours.DistillClipLoss()(X, X, 1.0, X, X[:2], 1.0),
        ValueError,
        "DistillClipLoss: dist_text_features has 2 rows; expected 4, like dist_image_features",
    ),
    (lambda: ours.ClipLoss()(X.tolist(), X, 1.0), TypeError, "ClipLoss: image_features is list; expected a tensor"),
    (
        lambda: ours.DistillClipLoss()(X, X, 1.0, X.to("meta"), X.to("meta"), 1.0),
        ValueError,
        "DistillClipLoss: dist_image_features is on meta; expected cpu",
    ),
    (
        lambda: ours.create_loss(arguments(siglip=True, horovod=True)),
        ValueError,
        "create_loss: horovod is True with siglip; expected torch.distributed",
    ),
]


@pytest.mark.parametrize(("call", "kind", "says"), WRONG, ids=[says[:50] for _, _, says in WRONG])
def test_wrong_calls(call: Callable[[], Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        call()


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads do not outlive the interpreter's shutdown in every order
