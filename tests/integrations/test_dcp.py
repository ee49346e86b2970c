"""ckpt.integrations.dcp in one process: what it gives back, what it leaves to torch, damage, forks, the end of the process."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from places import PYTHONPATH
from support import DEADLINE_S, options
from torch import nn
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

import ckpt
from ckpt import _native
from ckpt.dcp import DcpCheckpointer
from ckpt.errors import CaptureError, CorruptError, StorageError, UnsupportedError
from ckpt.integrations import dcp
from ckpt.integrations.dcp import notices

pytestmark = [pytest.mark.usefixtures("native"), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    notices._said.clear()
    dcp.configure(options(commit_timeout_s=DEADLINE_S))
    yield
    _native.clear_faults()
    with contextlib.suppress(ckpt.CheckpointError):
        dcp.close()


class Trained:
    """Statistics that a forward changes, and weights that a step does."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.step()

    def forward(self) -> torch.Tensor:
        found: torch.Tensor = self.model(torch.randn(8, 300)).square().sum()
        return found

    def step(self) -> None:
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self, number: int = 0) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "number": number}


def copy_of(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: copy_of(value) for key, value in state.items()}
    return [copy_of(value) for value in state] if isinstance(state, list) else state


def assert_holds(path: Path, expected: dict[str, Any], load: Any = stock.load) -> None:
    found = {"model": {key: torch.full_like(tensor, 3) for key, tensor in expected["model"].items()}, "number": -1}
    load(found, checkpoint_id=str(path))
    assert found["number"] == expected["number"]
    for key, tensor in expected["model"].items():
        assert torch.equal(found["model"][key], tensor), key


def slow() -> None:
    _native.set_fault(call="pwritev", path_part="distcp", delay_s=0.05)


# ---- what it gives back ----------------------------------------------------------------------------------------------


def test_save_returns_what_that_of_torch_returns(tmp_path: Path) -> None:
    trained = Trained()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        ours = dcp.save(trained.state(), checkpoint_id=tmp_path / "ours")
    assert any("assuming the intent is to save in a single process" in str(each.message) for each in warned)
    theirs = stock.save(trained.state(), checkpoint_id=tmp_path / "theirs")
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    assert ours.planner_data == theirs.planner_data and ours.version == theirs.version
    assert_holds(tmp_path / "ours", trained.state())
    names = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert names == [".lock", ".metadata", "__0_0.crc32", "__0_0.distcp", "manifest.json"]


def test_async_save_returns_two_futures(tmp_path: Path) -> None:
    trained = Trained()
    slow()
    expected = copy_of(trained.state())
    response = dcp.async_save(trained.state(), checkpoint_id=str(tmp_path / "id"))
    assert isinstance(response, AsyncSaveResponse)
    staged = threading.Event()
    response.staging_completion.add_done_callback(lambda _: staged.set())
    trained.forward()  # which moves the statistics
    trained.step()
    assert response.staging_completion.done() and response.staging_completion.exception() is None
    assert staged.wait(DEADLINE_S)
    found: Any = response.upload_completion.result(DEADLINE_S)
    assert isinstance(found, stock.Metadata) and not response.upload_completion.cancel()
    assert_holds(tmp_path / "id", expected)


def test_staging_ends_without_a_step(tmp_path: Path) -> None:
    slow()
    responses = [dcp.async_save(Trained().state(), checkpoint_id=str(tmp_path / f"{number}")) for number in range(2)]
    for response in responses:
        response.staging_completion.result(DEADLINE_S)
    futures = [response.upload_completion for response in responses]
    assert not concurrent.futures.wait(futures, DEADLINE_S).not_done


def test_what_has_a_state_dict_stands_for_it(tmp_path: Path) -> None:
    trained = Trained()
    dcp.save({"model": trained.model, "number": 4}, checkpoint_id=tmp_path / "id")
    assert_holds(tmp_path / "id", trained.state(4))
    other = Trained()
    other.step()
    dcp.load({"model": other.model}, checkpoint_id=tmp_path / "id")
    assert torch.equal(other.model[0].weight, trained.model[0].weight)


def test_loading_waits_for_what_is_captured_lazily(tmp_path: Path) -> None:
    trained = Trained()
    dcp.save(trained.state(1), checkpoint_id=tmp_path / "before")
    trained.step()
    expected = copy_of(trained.state(2))
    slow()
    response = dcp.async_save(trained.state(2), checkpoint_id=tmp_path / "id")
    dcp.load({"model": trained.model}, checkpoint_id=tmp_path / "before")
    response.upload_completion.result(DEADLINE_S)
    assert_holds(tmp_path / "id", expected)


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["open", "fallocate", "pwritev", "fdatasync", "rename"])
def test_a_failed_write_is_a_failed_save(call: str, tmp_path: Path) -> None:
    trained = Trained()
    dcp.save(trained.state(1), checkpoint_id=tmp_path / "id")
    expected = copy_of(trained.state(1))
    _native.set_fault(call=call, path_part="__0_1", error=28)
    response = dcp.async_save(trained.state(2), checkpoint_id=tmp_path / "id")
    trained.step()
    with pytest.raises(StorageError, match="No space left"):
        response.upload_completion.result(DEADLINE_S)
    response.staging_completion.result(DEADLINE_S)
    _native.clear_faults()
    assert_holds(tmp_path / "id", expected)
    assert not [path for path in (tmp_path / "id").iterdir() if "_1" in path.name]
    dcp.save(trained.state(3), checkpoint_id=tmp_path / "id")
    assert_holds(tmp_path / "id", trained.state(3))


def test_a_process_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not save by another process"):
        dcp.async_save({"a": 1}, checkpoint_id=tmp_path, async_checkpointer_type=AsyncCheckpointerType.PROCESS)


def test_options_come_before_the_first_save(tmp_path: Path) -> None:
    dcp.save({"a": 1}, checkpoint_id=tmp_path)
    with pytest.raises(ckpt.CheckpointError, match="before the first save"):
        dcp.configure(options())


# ---- what is left to torch -------------------------------------------------------------------------------------------


class Halves:
    """Says by itself what of it is saved."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __create_write_items__(self, fqn: str, _: Any) -> list[Any]:
        from torch.distributed.checkpoint.planner_helpers import _create_write_items

        return _create_write_items(fqn, self.tensor)


@pytest.mark.parametrize("call", [dcp.save, dcp.async_save], ids=["save", "async_save"])
@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"planner": stock.DefaultSavePlanner()}, "with LazyStorageWriter, because planner= is given"),
        ({"use_collectives": False}, "makes this save, because use_collectives is False"),
        ({"storage_writer": "stock"}, "makes this save, because storage_writer= is given"),
        ({"storage_writer": "ours"}, "with LazyStorageWriter, because storage_writer= is given"),
    ],
    ids=["planner", "collectives", "writer", "our-writer"],
)
def test_what_torch_makes(more: dict[str, Any], text: str, call: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = Trained()
    writers = {"stock": stock.FileSystemWriter, "ours": dcp.LazyStorageWriter}
    for number in range(2):
        given = {**more}
        if "storage_writer" in given:
            given["storage_writer"] = writers[given["storage_writer"]](tmp_path / "id")
        expected = copy_of(trained.state(number))
        with caplog.at_level(logging.WARNING, logger="ckpt"):
            found = call(trained.state(number), checkpoint_id=str(tmp_path / "id"), **given)
        if call is dcp.async_save:
            assert isinstance(found, AsyncSaveResponse)
            found.upload_completion.result(DEADLINE_S)
        trained.step()
        assert_holds(tmp_path / "id", expected)
    assert [text in record.message for record in caplog.records if "makes this save" in record.message] == [True]


def test_items_of_its_own_making(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot be staged lazily"):
        dcp.LazyStager().stage({"a": Halves(torch.arange(6.0))})
    with (
        DcpCheckpointer(alone=True) as checkpointer,
        pytest.raises(UnsupportedError, match="says by itself what of it is saved"),
    ):
        checkpointer.save(tmp_path / "id", {"a": Halves(torch.arange(6.0))})
    assert not list((tmp_path / "id").glob("__*"))


class Inverting(StreamTransformExtension):
    """Turns all bits around."""

    @staticmethod
    def from_descriptor(version: str) -> Inverting:
        return Inverting()

    @staticmethod
    def registry_name() -> str:
        return "inverting"

    def get_descriptor(self) -> str:
        return "inverting/1"

    def transform_to(self, output: Any) -> Any:
        return _Inverted(output)

    def transform_from(self, input: Any) -> Any:
        return io.BytesIO(bytes(255 - byte for byte in input.read()))


class _Inverted(io.RawIOBase):
    def __init__(self, output: Any) -> None:
        self._output = output

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return int(self._output.write(bytes(255 - byte for byte in bytes(data))))


def test_extensions_are_left_to_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the state is staged lazily: a step waits until torch has written it."""
    trained = Trained()
    expected = copy_of(trained.state(3))
    writer = dcp.LazyStorageWriter(tmp_path / "id", _extensions=[Inverting()])
    with caplog.at_level(logging.WARNING, logger="ckpt"):
        response = dcp.async_save(trained.state(3), storage_writer=writer)
        trained.step()
        response.upload_completion.result(DEADLINE_S)
    assert "leaves the writing to torch, because extensions transform its bytes" in caplog.text
    registry = ExtensionRegistry()
    registry.extensions["inverting"] = Inverting
    found = {"model": {key: torch.zeros_like(tensor) for key, tensor in expected["model"].items()}}
    stock.load(found, storage_reader=stock.FileSystemReader(tmp_path / "id", _extension_registry=registry))
    assert all(torch.equal(found["model"][key], tensor) for key, tensor in expected["model"].items())


def test_safetensors_are_left_to_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    writer = dcp.LazyStorageWriter(tmp_path / "id", serialization_format=SerializationFormat.SAFETENSORS)
    with caplog.at_level(logging.WARNING, logger="ckpt"):
        dcp.save({"w": torch.ones(4)}, storage_writer=writer)
    assert "leaves the writing to torch, because it is to be safetensors" in caplog.text
    assert not list((tmp_path / "id").glob("*.crc32"))


# ---- torch plans, on a thread of its own -----------------------------------------------------------------------------


class Held(stock.DefaultSavePlanner):
    """Waits in the middle of planning."""

    def __init__(self, go_on: threading.Event, error: Exception | None = None) -> None:
        super().__init__()
        self._go_on, self._error = go_on, error

    def create_local_plan(self) -> Any:
        assert self._go_on.wait(DEADLINE_S)
        if self._error is not None:
            raise self._error
        return super().create_local_plan()


def test_a_step_waits_for_the_plan(tmp_path: Path) -> None:
    trained, go_on, stepped = Trained(), threading.Event(), threading.Event()
    expected = copy_of(trained.state(5))
    more = {"storage_writer": dcp.LazyStorageWriter(tmp_path / "id", options()), "async_stager": dcp.LazyStager(options())}
    response: Any = stock.async_save(trained.state(5), planner=Held(go_on), **more)
    assert not response.staging_completion.done()
    trained.forward()

    def step() -> None:
        trained.step()
        stepped.set()

    thread = threading.Thread(target=step)
    thread.start()
    assert not stepped.wait(0.3), "it has not waited"
    go_on.set()
    thread.join(DEADLINE_S)
    response.upload_completion.result(DEADLINE_S)
    response.staging_completion.result(DEADLINE_S)
    assert_holds(tmp_path / "id", expected)


def test_a_plan_that_fails_lets_the_step_go_on(tmp_path: Path) -> None:
    trained, go_on = Trained(), threading.Event()
    go_on.set()
    more = {"storage_writer": dcp.LazyStorageWriter(tmp_path / "id"), "async_stager": dcp.LazyStager()}
    response: Any = stock.async_save(trained.state(), planner=Held(go_on, RuntimeError("no plan")), **more)
    trained.step()
    with pytest.raises(BaseException, match="no plan"):
        response.upload_completion.result(DEADLINE_S)
    response.staging_completion.result(DEADLINE_S)


def test_a_plan_that_hangs_is_given_up(tmp_path: Path) -> None:
    """The step goes on, and the save fails."""
    trained, go_on = Trained(), threading.Event()
    more = {"storage_writer": dcp.LazyStorageWriter(tmp_path / "id"), "async_stager": dcp.LazyStager(options(timeout_s=0.2))}
    response: Any = stock.async_save(trained.state(), planner=Held(go_on), **more)
    trained.step()
    go_on.set()
    with pytest.raises(BaseException, match="was given up: a step of an optimizer has waited") as found:
        response.upload_completion.result(DEADLINE_S)
    assert any(isinstance(each[0], CaptureError) for each in found.value.failures.values())  # type: ignore[attr-defined]
    assert not list((tmp_path / "id").glob("__*"))


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ours", "parts"])
def test_damage_is_found_where_it_is_used(way: str, tmp_path: Path) -> None:
    trained, path = Trained(), tmp_path / "id"
    if way == "ours":
        dcp.save(trained.state(), checkpoint_id=path)
    else:
        stock.save(trained.state(), storage_writer=dcp.LazyStorageWriter(path))
    assert_holds(path, trained.state(), dcp.load)
    places = stock.FileSystemReader(path).read_metadata().storage_data.items()
    used = [info for index, info in places if index.fqn in ("model.0.weight", "model.1.running_var", "number")]
    for file in [*path.glob("*.distcp"), path / ".metadata"]:
        content = file.read_bytes()
        # Of the optimizer nothing is loaded.
        here = [info for info in used if info.relative_path == file.name]
        found = [info.offset + info.length * part // 4 for info in here for part in (0, 2, 3)]
        for at in found or (0, len(content) // 2, len(content) - 13):
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(CorruptError, match=re.escape(file.name)):
                assert_holds(path, trained.state(), dcp.load)
        if file.suffix:
            file.write_bytes(content[:-1])
            with pytest.raises(CorruptError, match=re.escape(file.name)):
                assert_holds(path, trained.state(), dcp.load)
        file.write_bytes(content)
    for file in path.glob("*.crc32"):
        content = file.read_bytes()
        for at in (0, 8, 32, 33):  # what it is, of how long a file, the first checksum
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(CorruptError, match=re.escape(file.stem)):
                assert_holds(path, trained.state(), dcp.load)
        file.write_bytes(content)
    (checksums, *_) = sorted(path.glob("*.crc32"))
    checksums.rename(tmp_path / "away")
    with pytest.raises(CorruptError, match="is gone"):
        assert_holds(path, trained.state(), dcp.load)


def test_what_is_not_used_is_not_read(tmp_path: Path) -> None:
    state = {"first": torch.randn(3 << 20), "last": torch.randn(3 << 20), "number": 1}
    dcp.save(state, checkpoint_id=tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    file.write_bytes(content)
    found = {"first": torch.zeros(3 << 20)}
    dcp.load(found, checkpoint_id=tmp_path)
    assert torch.equal(found["first"], state["first"])
    with pytest.raises(CorruptError, match=r"__0_0.distcp' fails a CRC-32: some of its bytes \d+ to \d+ have changed"):
        dcp.load({"last": torch.zeros(3 << 20)}, checkpoint_id=tmp_path)


def test_what_torch_has_written_is_read_as_torch_reads_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where a checkpoint of ours was before, whose checksums may still be there."""
    trained = Trained()
    dcp.save(trained.state(), checkpoint_id=tmp_path / "id")
    for number in range(2):
        trained.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stock.save(trained.state(number), checkpoint_id=tmp_path / "id")
        with caplog.at_level(logging.WARNING, logger="ckpt"):
            assert_holds(tmp_path / "id", trained.state(number), dcp.load)
    assert [record for record in caplog.records if "without checksums" in record.message][1:] == []
    dcp.save(trained.state(9), checkpoint_id=tmp_path / "id")
    assert_holds(tmp_path / "id", trained.state(9), dcp.load)
    assert len(list((tmp_path / "id").glob("*.distcp"))) == 1


def test_metadata_of_a_newer_torch_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It notes more of each tensor than this one can take up."""
    trained = Trained()
    dcp.save(trained.state(), checkpoint_id=tmp_path / "id")

    def refuse(_: Any, state: Any) -> None:
        raise ValueError("too many values to unpack (expected 5)")

    monkeypatch.setattr(TensorProperties, "__setstate__", refuse)
    with pytest.raises(BaseException, match=r"cannot be read by torch .*too many values.*See Options\.metadata_compat"):
        dcp.load(trained.state(), checkpoint_id=tmp_path / "id")


def test_a_step_of_a_checkpointer_is_read(tmp_path: Path) -> None:
    trained = Trained()
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        for number in range(2):
            path = checkpointer.save(1, sharded=trained.state(number)).result(DEADLINE_S)
    assert_holds(path, trained.state(1), dcp.load)
    (file,) = path.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 6] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptError, match="fails a CRC-32"):
        assert_holds(path, trained.state(1), dcp.load)


# ---- processes -------------------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys, torch
from ckpt import _native
from ckpt.integrations import dcp
model = torch.nn.Linear(500, 500)
optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
model(torch.ones(2, 500)).sum().backward()
optimizer.step()
torch.save(model.state_dict(), sys.argv[1] + "/expected.pt")
_native.set_fault(call="pwritev", path_part="distcp", delay_s=0.1)
response = dcp.async_save({"model": model}, checkpoint_id=sys.argv[1] + "/id")
"""
FORKS = """
pid = os.fork()
if pid == 0:
    dcp.save({"model": model, "who": "child"}, checkpoint_id=sys.argv[1] + "/child")
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
optimizer.step()
response.upload_completion.result(60)
dcp.save({"model": model}, checkpoint_id=sys.argv[1] + "/later")
"""


@pytest.mark.parametrize("more", ["", FORKS], ids=["end", "fork"])
def test_at_the_end_of_the_process_all_is_durable(more: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM + more, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=4 * DEADLINE_S)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    expected = torch.load(tmp_path / "expected.pt")
    for name in ("id", "child") if more else ("id",):
        assert_id = {"model": {key: torch.zeros_like(tensor) for key, tensor in expected.items()}}
        dcp.load(assert_id, checkpoint_id=tmp_path / name)
        assert all(torch.equal(assert_id["model"][key], tensor) for key, tensor in expected.items()), name
