"""`ckpt show` of checkpoints and of single files, ours and those of others, sound, damaged and made to do harm."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from command_line import Shell, step_in
from safetensors.torch import save_file
from test_load_safetensors import DAMAGED as HEADERS
from test_load_safetensors import written

from ckpt.directory import manifest as manifests

HUGE = 100_000


def tensors(document: dict[str, Any], file: str) -> dict[str, tuple[str, list[int], int]]:
    return {each["name"]: (each["dtype"], each["shape"], each["bytes"]) for each in document["files"][file]["tensors"]}


MODEL = {"model.weight": ("float32", [4, 8], 128), "model.bias": ("int64", [8], 64)}


def test_a_checkpoint_with_its_tensors(shell: Shell, three_steps: Path) -> None:
    document = shell.json("show", step_in(three_steps, 2), "--tensors", "*")
    assert (document["manifest"]["step"], document["manifest"]["sequence"]) == (2, 2)
    assert tensors(document, "state.pt") == MODEL and document["files"]["state.pt"]["problem"] == ""
    assert document["files"]["state.pt"]["values"] == [{"name": "step", "type": "int", "value": "2"}]
    said = shell("show", step_in(three_steps, 2), "--tree")
    assert said.code == 0 and "  weight  float32  4x8  128 B" in said.out.splitlines()


def test_long_lists_of_numbers_are_one_line(shell: Shell, tmp_path: Path) -> None:
    rng = random.Random(0).getstate()
    state = {"rng": {"python": rng}, "losses": [0.5] * 20, "few": [1, 2], "mixed": [torch.zeros(2), *range(30)]}
    torch.save(state, tmp_path / "a.pt")
    for words in ((), ("--tree",)):
        lines = shell("show", tmp_path / "a.pt", *words).out.splitlines()
        assert len(lines) < 20 and "... and" not in lines[-1]
        (numbers,) = [line for line in lines if "625 ints" in line]
        assert numbers.endswith(f"  {', '.join(map(str, rng[1][:4]))}, ...") and numbers.split()[0] in ("1", "rng.python.1")
        assert any("20 floats  0.5, 0.5, 0.5, 0.5, ..." in line for line in lines)
        assert any(re.search(r"1-30 +30 ints +0, 1, 2, 3, ...", line) for line in lines)
    assert len(shell("show", tmp_path / "a.pt", "--tree", "--tensors", "losses*").out.splitlines()) == 22
    assert len(shell("show", tmp_path / "a.pt", "--tensors", "losses*").out.splitlines()) == 22
    values = shell.json("show", tmp_path / "a.pt", "--tree")["files"]["a.pt"]["values"]
    assert len(values) == 627 + 20 + 2 + 30


def test_what_it_has_cost_and_whose_that_is(shell: Shell, home: Path) -> None:
    document = shell.json("show", step_in(home, 3))
    cost = document["manifest"]["cost"]
    assert cost.keys() == {"blocked_s", "flushed_s"}
    assert "training was held for" in shell("show", step_in(home, 3)).out and "ranks" not in shell("show", step_in(home, 3)).out
    path = step_in(home, 3) / "manifest.json"
    said = json.loads(path.read_bytes())
    del said["crc32"]
    path.write_bytes(manifests.with_checksum({**said, "world_size": 2, "metrics": {"loss": 0.5}}))
    shown = shell("show", step_in(home, 3)).out
    assert "(each of the one of 2 ranks that had most)" in shown and "metrics of rank 0: loss=0.5" in shown
    assert "(each of the one of 2 ranks that had most)" in shell("status", home).out
    assert shell.json("status", home)["newest"]["cost"] == cost


def test_what_was_shared_is_told(shell: Shell, home: Path) -> None:
    path = step_in(home, 3) / "manifest.json"
    said = json.loads(path.read_bytes())
    del said["crc32"]
    said["files"][0] |= {"shared_bytes": 3 << 20, "shared_step": 2}
    path.write_bytes(manifests.with_checksum(said))
    assert "state.pt: 3.0 MiB were not written, but shared with step 2" in shell("show", step_in(home, 3)).out
    row = shell.json("show", step_in(home, 3))["files"]["state.pt"]
    assert (row["shared_bytes"], row["shared_step"]) == (3 << 20, 2)
    assert "shared with" not in shell("show", step_in(home, 2)).out
    assert shell("verify", step_in(home, 3)).code == 0
    with (step_in(home, 3) / "state.pt").open("r+b") as file:
        file.seek(300)
        file.write(b"other bytes")
    bad = shell("verify", step_in(home, 3))
    assert bad.code == 1 and "shared with step 2: look at that, too" in bad.out


@pytest.mark.parametrize("form", ["{home}", "{home}:3", "{home}:step-000000000003"])
def test_ways_to_name_a_checkpoint(form: str, shell: Shell, three_steps: Path) -> None:
    assert shell.json("show", form.format(home=three_steps))["manifest"]["step"] == 3


@pytest.mark.parametrize("what", ["state.pt", "manifest.json"])
def test_a_newer_one_that_is_damaged_is_not_passed_over_in_silence(
    what: str, shell: Shell, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is taken for the newest may be exported."""
    (step_in(home, 3) / what).write_text("{")
    assert shell.json("show", home)["manifest"]["step"] == 2
    (said,) = [text for text in caplog.messages if "is passed over" in text]
    assert str(step_in(home, 3)) in said and "'step-000000000002' is taken" in said
    caplog.clear()
    assert shell("show", f"{home}:1").code == 0 and not caplog.messages


def test_a_file_in_a_checkpoint(shell: Shell, three_steps: Path) -> None:
    document = shell.json("show", f"{step_in(three_steps, 1)}:state.pt", "--tensors", "model.w*")
    assert tensors(document, "state.pt") == {"model.weight": MODEL["model.weight"]}
    for form in (f"{three_steps}:1:state.pt", f"{three_steps}:step-000000000001:state.pt"):
        assert shell.json("show", form)["path"] == str(step_in(three_steps, 1) / "state.pt")
    assert shell("show", f"{three_steps}:7:state.pt").code == 3
    for name in ("other.pt", "../latest", "/etc/passwd"):
        assert shell("show", f"{step_in(three_steps, 1)}:{name}").code == 3


def test_damage_is_told(shell: Shell, home: Path) -> None:
    (step_in(home, 2) / "state.pt").unlink()
    said = shell("show", step_in(home, 2))
    assert said.code == 1 and "missing" in said.out
    os.truncate(step_in(home, 3) / "state.pt", 700)
    document = shell.json("show", step_in(home, 3), "--tensors", "*", code=1)
    assert (
        document["files"]["state.pt"]["problem"] == "has another size" and "state.pt" in document["files"]["state.pt"]["error"]
    )
    (step_in(home, 1) / "manifest.json").write_text("{}")
    assert "manifest" in shell.json("show", step_in(home, 1), code=3)["error"]["message"]


def test_files_of_others(shell: Shell, tmp_path: Path) -> None:
    state = {"w": torch.zeros(3, 5, dtype=torch.bfloat16), "n": torch.zeros((), dtype=torch.uint16)}
    torch.save(state, tmp_path / "new.pt")
    torch.save({"w": state["w"]}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shapes = {"w": ("bfloat16", [3, 5], 30), "n": ("uint16", [], 2)}
    for name, kind in (("new.pt", "torch"), ("model.safetensors", "safetensors"), ("old.pt", "torch before 1.6")):
        document = shell.json("show", tmp_path / name)
        wanted = {"w": shapes["w"]} if name == "old.pt" else shapes
        assert tensors(document, name) == wanted and document["files"][name]["format"] == kind
    assert "format: pt" in shell("show", tmp_path / "model.safetensors").out


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_directory_of_torch_distributed_checkpoint(shell: Shell, tmp_path: Path) -> None:
    dcp.save({"m": {"w": torch.zeros(4, 4)}, "epoch": 7}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    document = shell.json("show", tmp_path / "dcp", "--tree")
    assert document["manifest"] is None and tensors(document, ".metadata") == {"m.w": ("float32", [4, 4], 64)}
    (tmp_path / "dcp" / ".metadata").write_bytes(b"\x80\x04N.")
    assert "no metadata of torch.distributed" in shell.json("show", tmp_path / "dcp" / ".metadata", code=1)["error"]["message"]


class Harm:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def test_a_file_made_to_do_harm_is_shown_as_what_it_is(shell: Shell, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2), "bad": Harm(tmp_path / "harm")}, tmp_path / "a.pt")
    said = shell("show", tmp_path / "a.pt")
    assert said.code == 0 and "it refers to posix.mkdir" in said.out and not (tmp_path / "harm").exists()
    assert shell.json("show", tmp_path / "a.pt")["files"]["a.pt"]["would_run"] == ["posix.mkdir"]


def test_a_hundred_thousand_tensors(shell: Shell, tmp_path: Path) -> None:
    weight = torch.zeros(1)
    torch.save({f"layer.{number}.weight": weight for number in range(HUGE)}, tmp_path / "huge.pt")
    said = shell("show", tmp_path / "huge.pt")
    assert said.code == 0 and f"{HUGE} tensors" in said.out and len(said.out.splitlines()) < 60
    assert f"{HUGE - 40} more" in said.out.splitlines()[-1]


DAMAGED = {
    "empty": b"",
    "text": b"hello world",
    "zip": b"PK\x03\x04 and so on",
    "header": (1 << 50).to_bytes(8, "little") + b"{}",
    "cut header": (90).to_bytes(8, "little") + b'{"a":',
    "outside": (66).to_bytes(8, "little")
    + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,99999999999999]}}'[:66]
    + b"12345678",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_what_is_no_file_of_a_known_format(content: bytes, shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(content)
    said = shell("show", tmp_path / "file.pt")
    assert said.code == 1 and str(tmp_path / "file.pt") in said.err and said.out == ""


def test_headers_that_a_load_refuses_are_refused_here(shell: Shell, tmp_path: Path) -> None:
    for header, text in HEADERS.values():
        path = written(tmp_path / "a.safetensors", header)
        said = shell("show", path)
        assert said.code == 1 and re.search(text, said.err) and str(path) in said.err and len(said.err) < 1000
        assert shell("verify", path, "--fast").code == 1
        assert shell("export", path, "-o", tmp_path / "b", "--format", "safetensors").code == 1
    path.write_bytes(b"1234567")
    assert shell("show", path).code == shell("verify", path).code == 1
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("beginning", [b"PK", b"\x80"])
def test_a_safetensors_file_that_begins_as_something_else(beginning: bytes, shell: Shell, tmp_path: Path) -> None:
    """Its first bytes are the length of its header."""
    length = int.from_bytes(beginning.ljust(2, b"\x4b"), "little")
    header = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'.ljust(length)
    written(tmp_path / "5f3a", header)
    document = shell.json("show", tmp_path / "5f3a")
    assert tensors(document, "5f3a") == {"a": ("uint8", [4], 4)}


def test_what_is_not_there_and_what_cannot_be_read(shell: Shell, tmp_path: Path) -> None:
    assert shell("show", tmp_path / "nothing").code == 3
    assert shell("show", tmp_path).code == 3
    os.mkfifo(tmp_path / "pipe")
    assert shell("show", tmp_path / "pipe").code == 5
