"""progress=: it tells of what is read while that is read, ends with all of it, and breaks nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from command_line import save_steps, state
from support import assert_same, options, patience

import ckpt
from ckpt.errors import CorruptError
from ckpt.loading.progress import Progress

Steps = list[tuple[int, int]]


def saved(path: Path) -> Path:
    return ckpt.save({"a": torch.zeros(300_000), "b": torch.ones(5)}, path, options=options()).result()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_load_is_told_from_its_beginning_to_its_end(name: str, tmp_path: Path) -> None:
    path, told = saved(tmp_path / name), []
    ckpt.load(path, progress=lambda *step: told.append(step))
    size = path.stat().st_size
    assert told[0] == (0, size) and told[-1] == (size, size) and told == sorted(told)
    assert ckpt.load(path, keys="b", progress=False).keys() == {"b"}


def test_what_is_read_is_told_meanwhile() -> None:
    done, heard = [100], threading.Event()
    told: Steps = []

    def note(*step: int) -> None:
        told.append(step)
        if step[0] == 40:
            heard.set()

    with Progress(note) as progress:
        progress.begin(90)
        with progress.reading(60, lambda: done[0]):
            while not told[1:]:
                pass
            done[0] = 140
            assert heard.wait(patience(60))
        with progress.reading(30):
            assert told[-1] == (60, 90)
    assert told[-1] == (90, 90) and told == sorted(told)


def test_an_error_of_the_caller_comes_at_the_end(tmp_path: Path) -> None:
    path, calls = saved(tmp_path / "a.pt"), []

    def refuse(*step: int) -> None:
        calls.append(step)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ckpt.load(path, progress=refuse)
    assert len(calls) == 1
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptError):
        ckpt.load(path, progress=refuse)
    with pytest.raises(TypeError, match="progress="):
        ckpt.load(path, progress="yes")  # type: ignore[arg-type]


def test_a_bar_of_tqdm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    path = saved(tmp_path / "a.pt")
    ckpt.load(path)
    assert capsys.readouterr().err == ""
    ckpt.load(path, progress=True)
    assert "read:" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"lazyckpt\[cli\]"):
        ckpt.load(path, progress=True)


def test_a_restore_tells_of_each_checkpoint_that_it_reads(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    newest = tmp_path / "step-000000000002" / "state.pt"
    size = newest.stat().st_size
    told: Steps = []
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        found = checkpointer.restore(progress=lambda *step: told.append(step))
        assert found is not None and found.step == 2 and told[0] == (0, size) and told[-1] == (size, size)
        content = bytearray(newest.read_bytes())
        content[size // 2] ^= 1
        newest.write_bytes(content)
        told.clear()
        found = checkpointer.restore(progress=lambda *step: told.append(step))
    assert found is not None and found.step == 1
    assert_same(found.state, state(1))
    assert told.count((0, size)) == 2 and told[-1] == (size, size)
