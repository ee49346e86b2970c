"""`ckpt export` and `ckpt diff --values` of files that are not those that were written, and look as if they were."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from command_line import Shell, step_in
from support import options
from test_load_steps import save_as_ranks
from test_verify import flip

import ckpt
from ckpt.dcp import DcpCheckpointer


def save(directory: Path, value: float) -> Path:
    """A step with a sharded state."""
    state = {"w": torch.full((500_000,), value), "epoch": int(value)}
    with ckpt.Checkpointer(directory, options=options()) as checkpointer:
        checkpointer.save(1, sharded=state).result()
    return step_in(directory, 1)


def save_by_torch(directory: Path, state: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no ranks talk to each other is known
        dcp.save(state, checkpoint_id=directory, no_dist=True)


def refusals(shell: Shell, path: str | Path, tmp_path: Path, *more: str) -> str:
    """What export and diff say to it; nothing is written."""
    out = tmp_path / "out.pt"
    said = [shell("export", path, "-o", out, "--format", "pt", *more), shell("diff", path, path, "--values", *more)]
    assert [each.code for each in said] == [1, 1] and not out.exists(), said
    return said[0].err + said[1].err


def exported(shell: Shell, path: Path, tmp_path: Path) -> dict[str, Any]:
    assert shell("export", path, "-o", tmp_path / "out.pt", "--format", "pt").code == 0
    found: dict[str, Any] = torch.load(tmp_path / "out.pt", weights_only=True)
    return found


def test_files_of_ranks_that_were_exchanged(shell: Shell, tmp_path: Path) -> None:
    step = save_as_ranks(tmp_path / "run", [{"own": torch.full((900,), float(rank))} for rank in (0, 1)])
    assert shell("export", step, "-o", tmp_path / "out.pt", "--format", "pt", "--rank", "1").code == 0
    (tmp_path / "out.pt").unlink()
    first, second = step / "rank-00000.pt", step / "rank-00001.pt"
    first.rename(step / "aside")
    second.rename(first)
    (step / "aside").rename(second)
    assert "rank-00001.pt' fails the CRC-32 of its manifest" in refusals(shell, step, tmp_path, "--rank", "1")
    assert "rank-00000.pt' fails the CRC-32" in refusals(shell, f"{step}:rank-00000.pt", tmp_path)


@pytest.mark.parametrize("what", ["data", "metadata", "no checksums"])
def test_a_sharded_state_of_another_save(what: str, shell: Shell, tmp_path: Path) -> None:
    """Whose own checksums fit."""
    step, other = save(tmp_path / "run", 1.0), save(tmp_path / "other", 2.0)
    assert torch.equal(exported(shell, step, tmp_path)["w"], torch.full((500_000,), 1.0))
    (tmp_path / "out.pt").unlink()
    if what == "data":
        for name in ("__0_0.distcp", "__0_0.crc32"):
            shutil.copy(other / name, step / name)
    if what == "metadata":  # of the same bytes in another shape
        with ckpt.Checkpointer(tmp_path / "shape", options=options()) as checkpointer:
            checkpointer.save(1, sharded={"w": torch.full((250_000, 2), 1.0), "epoch": 1}).result()
        shutil.copy(step_in(tmp_path / "shape", 1) / ".metadata", step / ".metadata")
    if what == "no checksums":
        (step / "__0_0.crc32").unlink()
    said = refusals(shell, step, tmp_path)
    wanted = {
        "data": "__0_0.crc32' fails the CRC-32 of its manifest",
        "metadata": ".metadata' fails the CRC-32 of its manifest",
    }
    assert wanted.get(what, "__0_0.crc32' is gone") in said


@pytest.mark.parametrize("count", [3_000, 2_000_000], ids=["small", "large"])
def test_a_part_that_torch_has_written_is_verified_by_its_own_checksums(count: int, shell: Shell, tmp_path: Path) -> None:
    """Which torch does not look at."""
    save_by_torch(tmp_path / "d", {"w": torch.ones(count)})
    assert torch.equal(exported(shell, tmp_path / "d", tmp_path)["w"], torch.ones(count))
    (tmp_path / "out.pt").unlink()
    (path,) = (tmp_path / "d").glob("*.distcp")
    flip(path, path.stat().st_size // 2)
    assert "data/0'" in refusals(shell, tmp_path / "d", tmp_path)


def test_what_torch_has_written_without_checksums_is_read(shell: Shell, tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save_by_torch(tmp_path / "d", {"w": torch.ones(300), "epoch": 5})
    finally:
        torch.serialization.set_crc32_options(before)
    found = exported(shell, tmp_path / "d", tmp_path)
    assert torch.equal(found["w"], torch.ones(300)) and found["epoch"] == 5


def test_where_torch_has_saved_since_it_is_read_as_torch_reads_it(shell: Shell, tmp_path: Path) -> None:
    """It leaves our manifest and our checksums as they were."""
    with DcpCheckpointer(options=options()) as checkpointer:
        checkpointer.save(tmp_path / "d", {"w": torch.zeros(3_000)}).result()
    assert torch.equal(exported(shell, tmp_path / "d", tmp_path)["w"], torch.zeros(3_000))
    save_by_torch(tmp_path / "d", {"w": torch.ones(3_000)})
    assert torch.equal(exported(shell, tmp_path / "d", tmp_path)["w"], torch.ones(3_000))
