"""Restoring parts: what is read, what is verified, what is passed over, and what does not fit."""

from __future__ import annotations

import dataclasses
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed as td
from support import options
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import ckpt
from ckpt.directory import manifest as manifests
from ckpt.directory.sharded_files import PieceChecksums
from ckpt.restore.places import StepPlaces
from ckpt.restore.sharded_reader import ShardedReader
from ckpt.sharded.entries import EntryFinder
from ckpt.sharded.resharding import ByteDestination, ranges_to_read

MIB = 1 << 20
PIECE = MIB // 4

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    yield
    if td.is_initialized():
        td.destroy_process_group()


def state(rows: int = 6 * 1024) -> dict[str, Any]:
    """48 MiB in two tensors, and small things."""
    torch.manual_seed(5)
    big = {"one": torch.randn(rows, 1024), "two": torch.randn(rows, 1024), "small": torch.randn(7, 3)}
    return {"model": big, "numbers": {1: 5, "list": [1, 2]}, "text": "x"}


def save(directory: Path, step: int = 1, **changes: Any) -> Path:
    with ckpt.Checkpointer(directory, options=options(chunk_bytes="1MiB", **changes), coordinator="local") as checkpointer:
        checkpointer.restore(fresh=True)
        return checkpointer.save(step, sharded=state()).result(60)


def empty(found: dict[str, Any]) -> dict[str, Any]:
    model = {key: torch.zeros_like(value) for key, value in found["model"].items()}
    return {"model": model, "numbers": {1: 0, "list": None}, "text": ""}


def restore(directory: Path, target: dict[str, Any], **arguments: Any) -> Any:
    with ckpt.Checkpointer(directory, options=options(), coordinator="local") as checkpointer:
        return checkpointer.restore(sharded_into=target, **arguments)


def as_rank(rank: int, world: int) -> Any:
    td.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    return init_device_mesh("cpu", (world,))


def reader(folder: Path, target: dict[str, Any], rank: int, world: int) -> ShardedReader:
    finder = EntryFinder(rank, world)
    places = StepPlaces.at(folder)
    return ShardedReader(
        places,
        places.read_manifest(manifests.read(folder).sequence),
        target,
        finder,
        strict=True,
        weights_only=True,
        timeout_s=60,
    )


def sharded_target(mesh: Any, found: dict[str, Any], dim: int) -> dict[str, Any]:
    target = empty(found)
    for key in ("one", "two"):
        target["model"][key] = distribute_tensor(target["model"][key], mesh, [Shard(dim)], src_data_rank=None)
    return target


def test_all_of_it_comes_back(tmp_path: Path) -> None:
    save(tmp_path)
    target = empty(state())
    places = {key: value.data_ptr() for key, value in target["model"].items()}
    found = restore(tmp_path, target)
    assert (found.step, found.state, found.replicated) == (1, None, None) and found.sharded is target
    for key, value in state()["model"].items():
        assert torch.equal(target["model"][key], value) and target["model"][key].data_ptr() == places[key]
    assert target["numbers"] == {1: 5, "list": [1, 2]} and target["text"] == "x"


def test_a_value_without_a_place_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, options=options(), coordinator="local") as checkpointer:
        checkpointer.save(1, sharded={"part": {"number": 5, "tensor": torch.ones(3)}}).result(60)
    tensor = torch.zeros(3)
    with pytest.raises(TypeError, match=r"'part.number' of sharded_into= lies in a mappingproxy, which takes no other values"):
        restore(tmp_path, {"part": MappingProxyType({"number": 0, "tensor": tensor})})
    assert not tensor.any()


def test_a_module_is_given_its_part(tmp_path: Path) -> None:
    module = torch.nn.Linear(30, 20)
    with ckpt.Checkpointer(tmp_path, options=options(), coordinator="local") as checkpointer:
        checkpointer.save(1, sharded={"model": module, "step": 4}).result(60)
    other = torch.nn.Linear(30, 20)
    target = {"model": other, "step": 0}
    restore(tmp_path, target)
    assert torch.equal(other.weight, module.weight) and target == {"model": other, "step": 4}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_rank_reads_what_it_holds(dim: int, world: int, tmp_path: Path) -> None:
    """And what it takes to verify that: of each contiguous run the rest of the pieces at its ends."""
    folder = save(tmp_path)
    whole = state()
    for rank in range(world):
        mesh = as_rank(rank, world)
        target = sharded_target(mesh, whole, dim)
        found = reader(folder, target, rank, world)
        assert found.refusal is None
        found.fill()
        found.take()
        needed = 0
        for key in ("one", "two"):
            local = target["model"][key].to_local()
            expected = distribute_tensor(whole["model"][key], mesh, [Shard(dim)], src_data_rank=None).to_local()
            assert torch.equal(local, expected)
            needed += local.nbytes
        total = (folder / "__0_0.distcp").stat().st_size
        assert found.bytes_read <= (needed + 5 * PIECE if dim == 0 else total + 5 * 4096)
        assert found.bytes_read >= needed
        td.destroy_process_group()


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", [".metadata", "__0_0.crc32", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_passed_over(name: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    flip(folder / name, (folder / name).stat().st_size // 2)
    target = empty(state())
    assert restore(tmp_path, target).step == 1
    assert torch.equal(target["model"]["one"], state()["model"]["one"])


def test_every_byte_that_is_used_is_verified_and_no_other(tmp_path: Path) -> None:
    """A rank that holds the first third of two tensors does not see what is damaged in the last third."""
    folder = save(tmp_path)
    data = folder / "__0_0.distcp"
    payloads = sorted(PieceChecksums.parse((folder / "__0_0.crc32").read_bytes()).payloads.values())[:2]
    size = state()["model"]["one"].nbytes
    for rank in (0, 2):
        mesh = as_rank(rank, 3)
        for at, bad in ((payloads[0] + 100, rank == 0), (payloads[1] + size - 3 * MIB, rank == 2)):
            flip(data, at)
            found = reader(folder, sharded_target(mesh, state(), 0), rank, 3)
            if bad:
                with pytest.raises(ckpt.CheckpointError, match="fails a CRC-32"):
                    found.fill()
            else:
                found.fill()
            flip(data, at)
        td.destroy_process_group()


def test_what_does_not_fit_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    save(tmp_path)
    target = empty(state())
    target["model"]["one"] = torch.zeros(5, 5)
    target["model"]["small"] = torch.zeros(7, 3, dtype=torch.float64)
    target["model"]["more"] = torch.zeros(3)
    target["numbers"][1] = torch.zeros(2)
    del target["text"]
    with pytest.raises(ckpt.errors.MismatchError) as told:
        restore(tmp_path, target)
    assert len(told.value.problems) == 5
    for part in ("'model.one' has shape (6144, 1024)", "torch.float64 here", "'model.more' is not in", "'text' is only in"):
        assert part in str(told.value)
    assert not bool(target["model"]["two"].any())
    assert "get_state_dict() of torch" in str(told.value) and "strict=False" not in str(told.value)
    target = empty(state())
    target["model"]["more"] = torch.ones(3)
    del target["model"]["two"]
    with pytest.raises(ckpt.errors.MismatchError, match=r"strict=False passes over keys .*get_state_dict\(\) of torch"):
        restore(tmp_path, target)
    with pytest.raises(ckpt.errors.MismatchError, match=r"'model.two' is only .*strict=False passes over") as told:
        restore(tmp_path, lambda _: target)  # type: ignore[arg-type]
    assert "get_state_dict" not in str(told.value)
    assert restore(tmp_path, target, strict=False).step == 1
    assert torch.equal(target["model"]["one"], state()["model"]["one"]) and bool(target["model"]["more"].all())


def test_a_step_without_a_sharded_state_is_told(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, options=options(), coordinator="local") as checkpointer:
        checkpointer.save(1, {"a": 1}).result(60)
        with pytest.raises(ckpt.CheckpointError, match="nothing for sharded_into="):
            checkpointer.restore(sharded_into={"a": torch.zeros(1)})


def test_beside_it_a_rank_has_a_state_of_its_own(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, options=options(), coordinator="local") as checkpointer:
        checkpointer.save(1, {"own": 1}, replicated={"same": 2}, sharded={"w": torch.ones(3)}).result(60)
        target = {"w": torch.zeros(3)}
        found = checkpointer.restore(sharded_into=target)
        assert (found.state, found.replicated) == ({"own": 1}, {"same": 2}) and bool(target["w"].all())
        found = checkpointer.restore()
        assert (found.state, found.replicated, found.sharded) == ({"own": 1}, {"same": 2}, None)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/never"),))


@pytest.mark.parametrize("what", [Evil(), {"a": 1}, DTensor, torch.nn.Linear], ids=["call", "dict", "tensor", "module"])
def test_metadata_imports_nothing(what: Any, tmp_path: Path) -> None:
    """Of a file that somebody has put there with its checksum: whatever else it names is refused."""
    folder = save(tmp_path)
    content = pickle.dumps(what)
    (folder / ".metadata").write_bytes(content)
    found = manifests.read(folder)
    put = dataclasses.replace(next(file for file in found.files if file.name == ".metadata"), bytes=len(content))
    put = dataclasses.replace(put, crc32=zlib.crc32(content))
    files = (*(file for file in found.files if file.name != ".metadata"), put)
    (folder / "manifest.json").write_bytes(dataclasses.replace(found, files=files).to_json())
    with pytest.raises(ckpt.CheckpointError, match=r"cannot be read by torch|is no metadata"):
        restore(tmp_path, empty(state()))


def test_ranges_are_whole_pieces_and_each_byte_once() -> None:
    wanted = [ByteDestination(5, 10, 1000), ByteDestination(12, 34, 2000), ByteDestination(50, 52, 3000)]
    ranges, pieces = ranges_to_read(wanted, 10, 53)
    assert [piece for piece, _ in pieces] == [0, 1, 2, 3, 5]
    covered = [byte for offset, length, _ in ranges for byte in range(offset, offset + length)]
    assert covered == [*range(40), *range(50, 53)]
    given = {offset + n: address + n for offset, length, address in ranges if address for n in range(length)}
    expected = {each.begin + n: each.address + n for each in wanted for n in range(each.end - each.begin)}
    assert given == expected
