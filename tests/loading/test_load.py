"""load(): the object of torch.load, by reads of our own; parts of it; and what the system can do to reads."""

from __future__ import annotations

import collections
import errno
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from states import ALL_STATES
from support import DEADLINE_S, assert_no_leak, assert_same, options, resources

import ckpt
from ckpt import _native
from ckpt import devices as torch_devices
from ckpt.errors import CheckpointError, CorruptError, DeadlineError, StorageError
from ckpt.loading.archive import Archive
from ckpt.torch_private import find_loader

SIZES = [0, 1, 511, 4096, 70_001, (256 << 10) - 1, 256 << 10, (1 << 20) + 3, (9 << 20) + 17]


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    _native.clear_faults()


def sized_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {str(size): torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in SIZES}


@pytest.fixture(params=["ours", "ours_lazy", "torch"])
def sized_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "sizes.pt"
    if request.param == "torch":
        torch.save(sized_state(), path)
    else:
        lazy = True if request.param == "ours_lazy" else None
        ckpt.save(sized_state(), path, lazy=lazy, options=options(eager_bytes=0)).result(60)
    return path


def test_every_size_from_every_writer(sized_file: Path) -> None:
    assert_same(sized_state(), ckpt.load(sized_file))


@pytest.mark.parametrize("align", [(1, 1), (4, 512), (512, 4096), (4096, 4096), (32768, 32768)], ids=str)
def test_every_alignment(align: tuple[int, int], sized_file: Path) -> None:
    if align[0] > 4096 or align[1] > 1:
        probe = _native.RecordFile(str(sized_file).encode(), True, 1, 60.0)
        assert probe.checksummed
    _native.override_io_limits(*align)
    assert_same(sized_state(), ckpt.load(sized_file))


def test_short_reads_and_interrupted_calls_are_continued(sized_file: Path) -> None:
    for short in (1000, 4096, 100_000):
        _native.set_fault("pread", sized_file.name, short_bytes=short)
        _native.set_fault("pread", sized_file.name, skip=3, count=5, error=errno.EINTR)
        assert_same(sized_state(), ckpt.load(sized_file))
        _native.clear_faults()


def test_without_direct_io_reads_go_through_the_page_cache(sized_file: Path) -> None:
    _native.set_fault("pread", sized_file.name, skip=6, count=1, error=errno.EINVAL)  # granted, then refused
    _native.override_io_limits(512, 512)
    assert_same(sized_state(), ckpt.load(sized_file))


def test_a_failing_disk_is_named(sized_file: Path) -> None:
    for skip in (0, 4, 9):
        _native.set_fault("pread", sized_file.name, skip=skip, error=errno.EIO)
        with pytest.raises(StorageError, match=r"pread failed on '.*sizes\.pt' at offset \d+.*kernel log") as caught:
            ckpt.load(sized_file)
        assert caught.value.errno == errno.EIO
        _native.clear_faults()
    assert_same(sized_state(), ckpt.load(sized_file))


def test_slow_storage_meets_the_deadline(sized_file: Path) -> None:
    _native.set_fault("pread", sized_file.name, skip=5, delay_s=0.4)
    with pytest.raises(DeadlineError, match=r"sizes\.pt.*longer than 0\.1"):
        ckpt.load(sized_file, timeout_s=0.1)


def test_a_thread_that_hangs_counts_for_more_than_one_that_fails(sized_file: Path) -> None:
    """It may still write to its place, so nobody may take this for a damaged file and use that place again."""
    _native.set_fault("pread", sized_file.name, skip=5, count=1, delay_s=0.4)
    _native.set_fault("pread", sized_file.name, skip=6, error=errno.EIO)
    with pytest.raises(DeadlineError, match=r"sizes\.pt.*longer than 0\.1"):
        ckpt.load(sized_file, timeout_s=0.1)


def test_ctrl_c_ends_a_load_and_leaves_nothing(tmp_path: Path) -> None:
    torch.save(sized_state(), tmp_path / "slow.pt")
    ckpt.load(tmp_path / "slow.pt")
    before = resources()
    _native.set_fault("pread", "slow.pt", skip=5, delay_s=0.3)
    timer = threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        while True:  # the signal may come between two loads
            ckpt.load(tmp_path / "slow.pt")
            time.sleep(0)
    timer.join()
    assert_no_leak(before)


def test_loads_leave_nothing_behind(sized_file: Path) -> None:
    ckpt.load(sized_file)
    before = resources()
    for _ in range(8):
        ckpt.load(sized_file)
        ckpt.load(sized_file, keys="1")
    assert_no_leak(before, memory_bytes=32 << 20)


def test_a_file_that_is_cut_off_while_it_is_read(sized_file: Path) -> None:
    archive = Archive(sized_file)
    places = archive.allocate(archive.storage_names())
    sized_file.write_bytes(sized_file.read_bytes()[: 4 << 20])
    with pytest.raises(CorruptError, match="truncated"):
        archive.fill(places)


def test_large_tensors_lie_as_in_the_file(sized_file: Path) -> None:
    archive = Archive(sized_file)
    for name, tensor in archive.allocate(archive.storage_names()).items():
        record = archive.records[name]
        if record.size >= 256 << 10 and record.offset % 64 == 0:
            assert (tensor.data_ptr() - record.offset) % 4096 == 0
        assert tensor.nbytes() == record.size


def test_records_that_lie_askew_do_not_do_so_in_memory(tmp_path: Path) -> None:
    """A complex128 asks for 16 bytes."""
    state = {str(number): torch.randn(20_000 + number, dtype=torch.complex128) for number in range(12)}
    path = ckpt.save(state, tmp_path / "x.pt", options=options(record_alignment=8)).result(30)
    assert any(record.offset % 16 == 8 for record in Archive(path).records.values() if record.size > 256 << 10)
    loaded = ckpt.load(path)
    assert_same(state, loaded)
    assert all(each.data_ptr() % 16 == 0 for each in loaded.values())


def test_restore_reads_every_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that checks the file against its manifest is the one that fills the storages."""
    state = {"a": torch.randn(300_000), "b": torch.arange(9)}
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        checkpointer.save(3, state).result(60)
        read: list[tuple[int, bool]] = []
        fill = Archive.fill

        def spy(self: Archive, destinations: Any, *, whole: bool = False, **how: Any) -> Any:
            read.append((len(destinations), whole))
            return fill(self, destinations, whole=whole, **how)

        monkeypatch.setattr(Archive, "fill", spy)
        monkeypatch.setattr("ckpt.restore.file_readers.digest_file", None)  # it would read it all again
        found = checkpointer.restore()
        assert found is not None and found.step == 3
        assert_same(state, found.state)
        with zipfile.ZipFile(next(tmp_path.glob("step-*/*.pt"))) as archive:
            small = [name for name in archive.namelist() if "/data/" not in name]
            # A torch that knows devices reads the pickle first, to see whether anything is to go to one.
            before = [(len(small), False)] if torch_devices.are_possible() else []
            assert read == [*before, (len(archive.namelist()), True)]


# ---- as torch.load ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_STATES)
def test_files_by_torch_save_give_what_torch_load_gives(name: str, tmp_path: Path) -> None:
    torch.save(ALL_STATES[name](), tmp_path / "state.pt")
    assert_same(torch.load(tmp_path / "state.pt", weights_only=False), ckpt.load(tmp_path / "state.pt", weights_only=False))


def test_map_locations(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    state = {"a": torch.randn(300, 300), "b": torch.arange(3)}
    torch.save(state, path)
    seen: list[tuple[int, str]] = []

    def note(storage: Any, location: str) -> Any:
        seen.append((storage.nbytes(), location))
        return None

    for where in (None, "cpu", torch.device("cpu"), {"cpu": "cpu"}, {}, note, lambda storage, location: storage.clone()):
        assert_same(state, ckpt.load(path, map_location=where))
    assert seen == [(360_000, "cpu"), (24, "cpu")]
    for meta in ("meta", torch.device("meta")):
        found = ckpt.load(path, map_location=meta)
        assert found["a"].is_meta and found["a"].shape == (300, 300)


def test_errors_of_a_map_location_are_the_callers(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "state.pt")

    class Mine(Exception):
        pass

    def fail(storage: Any, location: str) -> Any:
        raise Mine("here")

    with pytest.raises(Mine):
        ckpt.load(tmp_path / "state.pt", map_location=fail)


def test_safe_globals_allow_what_they_name(tmp_path: Path) -> None:
    torch.save({"counts": Mild(3)}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"Mild.*weights_only=False"):
        ckpt.load(tmp_path / "state.pt")
    with torch.serialization.safe_globals([Mild]):
        assert ckpt.load(tmp_path / "state.pt")["counts"].number == 3


class Mild:
    def __init__(self, number: int) -> None:
        self.number = number


def test_the_environment_can_forbid_all_but_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(Mild(3), tmp_path / "state.pt")
    assert ckpt.load(tmp_path / "state.pt", weights_only=False).number == 3
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match="Mild"):
        ckpt.load(tmp_path / "state.pt", weights_only=False)


def test_a_checkpoint_of_several_files_is_no_file(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        step = checkpointer.save(1, sharded={"a": torch.ones(3), "b": torch.zeros(3)}).result(DEADLINE_S)
    for load in (ckpt.load, lambda path: ckpt.load_into(path, {})):
        for directory in (tmp_path, step):
            with pytest.raises(StorageError, match=r"directory.*one file.*restore\(\).*load\(state, checkpoint_id=") as raised:
                load(directory)
            assert raised.value.errno == errno.EISDIR and raised.value.filename == str(directory)
        for name in ("__0_0.distcp", ".metadata"):
            with pytest.raises(CheckpointError, match=rf"sharded checkpoint.*sharded_into=.*checkpoint_id='{step}'"):
                load(step / name)


def test_torchscript_is_left_to_torch(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    for load in (ckpt.load, lambda path: ckpt.load_into(path, {})):
        with pytest.raises(CheckpointError, match=r"script\.pt.*TorchScript.*torch\.jit\.load"):
            load(tmp_path / "script.pt")


# ---- parts -----------------------------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", "left right")


def layered() -> dict[str, Any]:
    layers = {f"layers.{n}.{part}": torch.randn(64, 64) for n in range(12) for part in ("weight", "bias")}
    return {
        "model": collections.OrderedDict(layers),
        "optimizer": {"state": {n: {"step": torch.tensor(float(n)), "exp_avg": torch.randn(64, 64)} for n in range(3)}},
        "list": [torch.ones(2), {"x": torch.zeros(3)}, 7],
        "pair": (torch.ones(4), "text"),
        "step": 5,
    }


def test_keys_take_what_matches_and_nothing_else(tmp_path: Path) -> None:
    state = layered()
    torch.save(state, tmp_path / "state.pt")

    def part(*keys: str) -> Any:
        return ckpt.load(tmp_path / "state.pt", keys=keys)

    model = state["model"]
    assert_same(
        {"model": collections.OrderedDict({k: model[k] for k in model if k.startswith("layers.1.")})}, part("model.layers.1.*")
    )
    assert_same({"step": 5}, part("step"))
    assert_same({"model": model}, part("model"))
    assert_same({"list": [None, {"x": torch.zeros(3)}, None], "pair": (torch.ones(4), None)}, part("list.1", "pair.0"))
    assert_same({"optimizer": {"state": {n: {"step": torch.tensor(float(n))} for n in range(3)}}}, part("optimizer*step"))
    assert_same(state, part("*"))


def test_keys_read_only_their_records(tmp_path: Path) -> None:
    """Damage elsewhere goes unseen: those bytes were not looked at."""
    state = layered()
    torch.save(state, tmp_path / "state.pt")
    good = (tmp_path / "state.pt").read_bytes()
    at = good.index(state["optimizer"]["state"][0]["exp_avg"].numpy().tobytes())
    (tmp_path / "state.pt").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    assert_same({"model": state["model"]}, ckpt.load(tmp_path / "state.pt", keys="model.*"))
    for keys in ("optimizer.*", None):
        with pytest.raises(CorruptError, match="CRC-32"):
            ckpt.load(tmp_path / "state.pt", keys=keys)


def test_keys_move_only_what_they_return(tmp_path: Path) -> None:
    torch.save(layered(), tmp_path / "state.pt")
    moved = []

    def note(storage: Any, location: str) -> Any:
        moved.append(storage.nbytes())
        return storage

    ckpt.load(tmp_path / "state.pt", keys="model.layers.3.*", map_location=note)
    assert moved == [64 * 64 * 4] * 2


@pytest.mark.parametrize("name", ["sparse", "quantized", "conjugated", "subclass", "numpy", "odd_objects", "tied"])
def test_keys_of_odd_things(name: str, tmp_path: Path) -> None:
    torch.save({"wanted": ALL_STATES[name](), "other": torch.ones(100_000)}, tmp_path / "state.pt")
    expected = torch.load(tmp_path / "state.pt", weights_only=False)["wanted"]
    assert_same({"wanted": expected}, ckpt.load(tmp_path / "state.pt", weights_only=False, keys="wanted"))


@pytest.mark.parametrize("keys", ["wanted", "other", "plain"])
def test_keys_of_sparse_tensors_that_are_looked_into(keys: str, tmp_path: Path) -> None:
    """By torch, when they are made: not before they are read."""
    state = {"wanted": ALL_STATES["sparse"](), "other": ALL_STATES["sparse"](), "plain": torch.ones(3)}
    torch.save(state, tmp_path / "state.pt")
    with torch.sparse.check_sparse_tensor_invariants():
        assert_same({keys: state[keys]}, ckpt.load(tmp_path / "state.pt", keys=keys))
        assert_same(state, ckpt.load(tmp_path / "state.pt"))
        assert (loader := find_loader()) is not None and loader.noted() == []


def test_namedtuples_and_legacy_files_have_parts_too(tmp_path: Path) -> None:
    torch.save({"p": Pair(torch.ones(2), 3)}, tmp_path / "new.pt")
    found = ckpt.load(tmp_path / "new.pt", weights_only=False, keys="p.0")
    assert_same({"p": Pair(torch.ones(2), None)}, found)
    torch.save({"a": torch.ones(2), "b": 3}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert ckpt.load(tmp_path / "old.pt", keys="b") == {"b": 3}


def test_keys_that_match_nothing_are_an_error(tmp_path: Path) -> None:
    torch.save(layered(), tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt.*'modle\.\*'.*model\.layers\.0\.weight"):
        ckpt.load(tmp_path / "state.pt", keys=["step", "modle.*"])
    with pytest.raises(TypeError, match="pattern"):
        ckpt.load(tmp_path / "state.pt", keys=[7])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="name something"):
        ckpt.load(tmp_path / "state.pt", keys=[])


def test_containers_that_hold_each_other_end_the_search(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"x": torch.ones(2)}
    loop["self"] = loop
    torch.save(loop, tmp_path / "state.pt")
    assert_same({"x": torch.ones(2)}, ckpt.load(tmp_path / "state.pt", keys="x"))
    doubled: Any = [torch.ones(1)]
    for _ in range(60):
        doubled = [doubled, doubled]
    torch.save(doubled, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="too many paths"):
        ckpt.load(tmp_path / "state.pt", keys="x")
