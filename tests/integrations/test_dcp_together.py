"""Several saves to one id at once, by ckpt.integrations.dcp and its parts: the last is there, whole, or an error says why."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from support import DEADLINE_S, options
from torch.distributed.checkpoint.planner_helpers import _create_write_items

import ckpt
from ckpt import _native
from ckpt.directory import dcp_directory
from ckpt.directory.dcp_directory import DcpDirectory
from ckpt.errors import CorruptError
from ckpt.integrations import dcp

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:Detected an existing"),
]


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    dcp.configure(options(commit_timeout_s=DEADLINE_S))
    yield
    _native.clear_faults()
    with contextlib.suppress(ckpt.CheckpointError):
        dcp.close()


def state(number: int) -> dict[str, Any]:
    return {**{f"layer {each}": torch.full((70_000,), float(number)) for each in range(6)}, "number": number}


def find(path: Path) -> int:
    """The number of the state that is there, every part of it."""
    for load in (stock.load, dcp.load):
        found = state(-1)
        load(found, checkpoint_id=str(path), no_dist=True)
        numbers = {float(found["number"])} | {
            value for key in found if key != "number" for value in found[key].unique().tolist()
        }
        assert len(numbers) == 1, numbers
    return int(numbers.pop())


def slow() -> None:
    _native.set_fault(call="pwritev", path_part="distcp", delay_s=0.02)


def begin(way: str, number: int, path: Path) -> Any:
    more = {"planner": stock.DefaultSavePlanner()} if way == "torch" else {}
    return dcp.async_save(state(number), checkpoint_id=str(path), no_dist=True, **more).upload_completion


@pytest.mark.parametrize("ways", [("ours", "ours"), ("ours", "torch"), ("torch", "ours"), ("torch", "torch")], ids="-".join)
def test_the_later_save_is_the_one_that_is_there(ways: tuple[str, str], tmp_path: Path) -> None:
    """Whoever makes them, and however slowly the first one is written."""
    for number in range(0, 8, 2):
        slow()
        first = begin(ways[0], number, tmp_path / "id")
        _native.clear_faults()
        second = begin(ways[1], number + 1, tmp_path / "id")
        first.result(DEADLINE_S)
        second.result(DEADLINE_S)
        assert find(tmp_path / "id") == number + 1
    names = {path.suffix for path in (tmp_path / "id").glob("__*")}
    assert names == {".distcp", ".crc32"} and len(list((tmp_path / "id").glob("__*.distcp"))) <= 2


@pytest.mark.parametrize("way", ["ours", "torch"])
def test_a_load_waits_for_what_is_on_its_way(way: str, tmp_path: Path) -> None:
    begin(way, 1, tmp_path / "id").result(DEADLINE_S)
    slow()
    upload = begin(way, 2, tmp_path / "id")
    found = state(-1)
    dcp.load(found, checkpoint_id=tmp_path / "id", no_dist=True)
    assert upload.done() and found["number"] == 2 and found["layer 5"].unique().tolist() == [2.0]


def test_ids_do_not_wait_for_each_other(tmp_path: Path) -> None:
    slow()
    first = begin("torch", 1, tmp_path / "1")
    second = begin("ours", 2, tmp_path / "2")
    third = begin("torch", 3, tmp_path / "3")
    for upload in (third, second, first):
        upload.result(DEADLINE_S)
    assert [find(tmp_path / name) for name in "123"] == [1, 2, 3]


class HeldWriter(dcp.LazyStorageWriter):
    """Waits when all of its data has been written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, options())
        self.reached, self.go_on = threading.Event(), threading.Event()

    def finish(self, metadata: Any, results: Any) -> None:
        self.reached.set()
        assert self.go_on.wait(DEADLINE_S)
        super().finish(metadata, results)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_parts_of_one_id_at_once(order: tuple[int, int], tmp_path: Path) -> None:
    """Called as torch's own, so that nothing puts them in order: the one whose files the other removes fails."""
    writers, uploads = [HeldWriter(tmp_path / "id") for _ in range(2)], []
    for number, writer in enumerate(writers):
        stager = dcp.LazyStager(options())
        found: Any = stock.async_save(state(number), storage_writer=writer, async_stager=stager, no_dist=True)
        uploads.append(found.upload_completion)
    for writer in writers:
        assert writer.reached.wait(DEADLINE_S)
    assert len(list((tmp_path / "id").glob("__*.distcp"))) == 4, "each has names of its own"
    writers[order[0]].go_on.set()
    uploads[order[0]].result(DEADLINE_S)
    writers[order[1]].go_on.set()
    with pytest.raises(BaseException, match="somebody else saves to it"):
        uploads[order[1]].result(DEADLINE_S)
    assert find(tmp_path / "id") == order[0]


def test_many_parts_of_one_id_at_once(tmp_path: Path) -> None:
    for turn in range(5):
        uploads = []
        for number in range(3):
            more = {
                "storage_writer": dcp.LazyStorageWriter(tmp_path / "id", options()),
                "async_stager": dcp.LazyStager(options()),
            }
            found: Any = stock.async_save(state(10 * turn + number), no_dist=True, **more)
            uploads.append(found.upload_completion)
        good = [10 * turn + number for number, upload in enumerate(uploads) if upload.exception(DEADLINE_S) is None]
        assert find(tmp_path / "id") in good


def place(directory: DcpDirectory, text: bytes) -> Path:
    target = directory.take_name(0)
    temporary = target.with_suffix(".temporary")
    temporary.write_bytes(text)
    dcp_directory.place(temporary, target, b"checksums")
    return target


def test_what_tidies_up_leaves_the_files_of_a_newer_checkpoint_alone(tmp_path: Path) -> None:
    pair = [DcpDirectory(tmp_path, locks=False) for _ in range(2)]
    files = [place(directory, b"content") for directory in pair]
    metadata = [dcp_directory.seal(b"first"), dcp_directory.seal(b"second")]
    pair[0].publish(metadata[0], None, {files[0].name: 7})
    pair[1].publish(metadata[1], None, {files[1].name: 7})
    pair[0].tidy(metadata[0], {files[0].name})
    assert files[1].exists()
    pair[1].tidy(metadata[1], {files[1].name})
    assert files[1].exists() and not files[0].exists()
    with pytest.raises(CorruptError, match="does not have the 7 bytes"):
        pair[0].publish(metadata[0], None, {files[0].name: 7})
    assert pair[1].holds(metadata[1])


# ---- what cannot be staged lazily ------------------------------------------------------------------------------------


class Own(torch.Tensor):
    """Says by itself what of it is saved."""

    def __create_write_items__(self, fqn: str, _: Any) -> list[Any]:
        return _create_write_items(fqn, self.as_subclass(torch.Tensor))

    def __create_chunk_list__(self) -> list[Any]:
        raise NotImplementedError

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_what_cannot_be_staged_lazily_is_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On a machine without a GPU, too."""
    weights = torch.arange(6.0)
    with caplog.at_level(logging.WARNING, logger="ckpt"):
        saved = {"a": weights.clone().as_subclass(Own), "b": torch.ones(3)}
        response = dcp.async_save(saved, checkpoint_id=str(tmp_path), no_dist=True)
    saved["a"].zero_()
    response.upload_completion.result(DEADLINE_S)
    assert "says by itself what of it is saved" in caplog.text
    found = {"a": torch.zeros(6), "b": torch.zeros(3)}
    stock.load(found, checkpoint_id=str(tmp_path), no_dist=True)
    assert found["a"].tolist() == weights.tolist() and found["b"].tolist() == [1.0] * 3
