"""The Python blocks of a page of docs/, one after the other, are a program that runs."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
PAGES = {page.name: page for page in sorted((ROOT / "docs").glob("*.md")) if "```python" in page.read_text()}

#: processes of the group that a page is written for; the others need none
PROCESSES = {"distributed.md": 2}


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set; its own processes abort now and then when they end, whatever they have run."""
    place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, "OMP_NUM_THREADS": "1", **({k: str(v) for k, v in place.items()} if world > 1 else {})}


@pytest.mark.parametrize("name", PAGES)
def test_blocks_run(name: str, tmp_path: Path) -> None:
    world = PROCESSES.get(name, 1)
    if world > 1 and not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGES[name].read_text(), re.DOTALL | re.MULTILINE)
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)], cwd=tmp_path, env=environment(rank, world, port), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n".join([name, *said])


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[name].read_text()):
        assert (PAGES[name].parent / target).exists(), f"{name} links to {target}"
