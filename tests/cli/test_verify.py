"""`ckpt verify`: the file and the record that are damaged are named."""

from __future__ import annotations

import os
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from command_line import Shell, step_in
from node_roots import Job
from safetensors.torch import save_file
from support import options, patience

import ckpt
from ckpt import dcp as sharding
from ckpt._native import RangeFile
from ckpt.upkeep import verifying


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def place_of(path: Path, record: str) -> int:
    """Where its bytes begin."""
    with zipfile.ZipFile(path) as archive:
        entry = next(each for each in archive.infolist() if each.filename.endswith(record))
    head = path.read_bytes()[entry.header_offset : entry.header_offset + 30]
    return entry.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")


def test_all_that_is_good(shell: Shell, three_steps: Path) -> None:
    document = shell.json("verify", three_steps)
    assert document["good"] and document["states"] == {"good": 3}
    said = shell("verify", step_in(three_steps, 2), step_in(three_steps, 3))
    assert said.code == 0 and said.out.count(": good") == 2 and said.out.splitlines()[-1].startswith("2 files: 2 good; ")


def test_bytes_are_told_while_a_file_is_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of each file at its end, whatever was wrong with it."""
    heard = threading.Event()

    class Slow:
        """A file that is not read to its end before something was told of it."""

        def __init__(self, path: bytes, direct: bool) -> None:
            self._file, self._looks = RangeFile(path, direct), 0
            self.size = self._file.size

        @property
        def bytes_read(self) -> int:
            self._looks += 1
            return 0 if self._looks == 1 else 100

        def read(self, *places: Any, **how: Any) -> list[int]:
            assert heard.wait(patience(60))
            return self._file.read(*places, **how)

    def tell(count: int) -> None:
        told.append(count)
        if count == 100:
            heard.set()

    told: list[int] = []
    flip(step_in(home, 2) / "state.pt", 200)
    sizes = [(step_in(home, step) / "state.pt").stat().st_size for step in (1, 2)]
    with monkeypatch.context() as patched:
        patched.setattr(verifying._native, "RangeFile", Slow)
        patched.setattr(verifying, "_LARGE", 1)
        states = [each.state for step in (1, 2) for each in verifying.verify(step_in(home, step), False, tell)]
    assert states == ["good", "damaged"] and sum(told) == sum(sizes) and told[0] == 100
    for path in (step_in(home, 1) / "state.pt", step_in(home, 1) / "missing.pt"):
        told.clear()
        monkeypatch.setattr(verifying, "_LARGE", 1)
        list(verifying.verify(path, False, tell))
        assert sum(told) == (path.stat().st_size if path.exists() else 0)


def test_a_flipped_bit_is_found_and_its_record_named(shell: Shell, home: Path) -> None:
    path = step_in(home, 2) / "state.pt"
    flip(path, place_of(path, "data/0") + 5)
    assert shell("verify", home, "--fast").code == 0, "no byte is read"
    document = shell.json("verify", home, code=1)
    bad = [file for file in document["files"] if file["state"] != "good"]
    assert [(file["file"], file["state"]) for file in bad] == [("state.pt", "damaged")] and "data/0" in bad[0]["problem"]
    said = shell("verify", home)
    assert said.code == 1 and str(step_in(home, 2)) in said.out and "data/0" in said.out


def test_what_is_missing_cut_off_or_has_no_manifest(shell: Shell, home: Path) -> None:
    (step_in(home, 1) / "state.pt").unlink()
    os.truncate(step_in(home, 2) / "state.pt", 99)
    (step_in(home, 3) / "manifest.json").write_text("{")
    document = shell.json("verify", home, "--fast", code=1)
    states = {Path(file["checkpoint"]).name[-1]: (file["state"], file["problem"]) for file in document["files"]}
    assert states["1"] == ("missing", "it is not there")
    assert states["2"][0] == "damaged" and "has 99 bytes" in states["2"][1] and "manifest" in states["3"][1]


def test_single_files(shell: Shell, tmp_path: Path) -> None:
    state = {"w": torch.arange(1000.0)}
    torch.save(state, tmp_path / "a.pt")
    ckpt.save(state, tmp_path / "b.pt").result()
    assert shell.json("verify", tmp_path / "a.pt", tmp_path / "b.pt")["states"] == {"good": 2}
    flip(tmp_path / "b.pt", place_of(tmp_path / "b.pt", "data/0") + 77)
    assert "data/0" in shell.json("verify", tmp_path / "b.pt", code=1)["files"][0]["problem"]
    save_file(state, tmp_path / "c.safetensors")
    torch.save(state, tmp_path / "d.pt", _use_new_zipfile_serialization=False)
    document = shell.json("verify", tmp_path / "c.safetensors", tmp_path / "d.pt")
    assert document["states"] == {"not verifiable": 2}, "that nothing was verified is not said to be good"
    os.truncate(tmp_path / "c.safetensors", 3000)
    assert shell("verify", tmp_path / "c.safetensors", "--fast").code == 1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_sharded_directories(shell: Shell, tmp_path: Path) -> None:
    state = {"w": torch.arange(5000.0)}
    dcp.save(state, checkpoint_id=tmp_path / "torch", no_dist=True)
    with sharding.DcpCheckpointer(options=options()) as checkpointer:
        checkpointer.save(tmp_path / "ours", state).result()
    assert shell("verify", tmp_path / "torch").code == shell("verify", tmp_path / "ours").code == 0
    for directory in ("torch", "ours"):
        path = next((tmp_path / directory).glob("*.distcp"))
        flip(path, path.stat().st_size // 2)
        document = shell.json("verify", tmp_path / directory, code=1)
        assert [file["file"] for file in document["files"] if file["state"] == "damaged"] == [path.name]
        assert shell("verify", tmp_path / directory, "--fast").code == 0
        path.unlink()
        assert shell("verify", tmp_path / directory, "--fast").code == 1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_directory_without_checksums(shell: Shell, tmp_path: Path) -> None:
    """Torch can leave them out. What carries some in the same file is looked at all the same."""
    state = {name: torch.arange(5000.0) for name in "abc"}
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        dcp.save(state, checkpoint_id=tmp_path / "bare", no_dist=True)
    finally:
        torch.serialization.set_crc32_options(before)
    dcp.save(state, checkpoint_id=tmp_path / "usual", no_dist=True)
    document = shell.json("verify", tmp_path / "bare")
    assert document["states"] == {"not verifiable": 1} and "has no checksums" in document["files"][0]["problem"]
    bare, usual = (next((tmp_path / name).glob("*.distcp")) for name in ("bare", "usual"))
    content, third = bare.read_bytes(), len(bare.read_bytes()) // 3
    assert usual.stat().st_size == len(content) == 3 * third, "one archive for each tensor"
    bare.write_bytes(content[:third] + usual.read_bytes()[third:])
    assert shell.json("verify", tmp_path / "bare")["states"] == {"not verifiable": 1}
    flip(bare, len(content) - third // 2)
    assert "data/0' fails" in shell.json("verify", tmp_path / "bare", code=1)["files"][0]["problem"]
    bare.write_bytes(content[:-22] + bytes(22))
    assert "archive is damaged" in shell.json("verify", tmp_path / "bare", code=1)["files"][0]["problem"]


def test_the_copy_of_metadata_that_torch_reads(shell: Shell, tmp_path: Path) -> None:
    """Of a step that was saved again the manifest names another file."""
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        for value in (1.0, 2.0):
            checkpointer.save(1, sharded={"w": torch.full((50,), value)}).result()
    step = step_in(tmp_path, 1)
    before = (step / ".metadata").read_bytes()
    assert (step / ".metadata-2").read_bytes() == before and shell("verify", tmp_path).code == 0
    flip(step / ".metadata", len(before) // 2)
    document = shell.json("verify", tmp_path, code=1)
    assert [file["file"] for file in document["files"] if file["state"] == "damaged"] == [".metadata"]
    assert shell("repair", tmp_path, "--yes").code == 0 and shell("verify", tmp_path).code == 0


def test_a_node_has_but_its_part(shell: Shell, tmp_path: Path) -> None:
    job = Job(tmp_path, nodes=2)
    job.save(1, common=300)
    assert shell.json("verify", job.roots[0])["states"] == {"good": 2, "on another node": 1}


def test_nothing_there(shell: Shell, tmp_path: Path) -> None:
    assert shell("verify", tmp_path).code == shell("verify", tmp_path / "missing").code == 3
    assert shell("verify").code == 2
