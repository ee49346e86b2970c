"""Files against torch.save and torch.load: the same bytes where both write whole storages, the same objects everywhere."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from states import ALL_STATES, PARTIAL_STATES, STATES, deep
from support import DEADLINE_S, assert_same, options, patience

import ckpt

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:backward hook"),
]

# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.fixture(params=[64, 4096])
def alignment(request: pytest.FixtureRequest) -> Iterator[int]:
    """What torch.save aligns records to, for the length of the test."""
    if request.param == 64:
        yield 64
        return
    try:
        from torch.utils.serialization import config
    except ImportError:
        pytest.skip("this torch cannot be told an alignment")
    with config.patch({"save.storage_alignment": request.param}):
        yield request.param


def torch_file(obj: Any, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save(obj, path)
    return path


def serialization_id(path: Path) -> str:
    with zipfile.ZipFile(path) as file:
        names = {name.partition("/")[2]: name for name in file.namelist()}
        if ".storage_alignment" not in names:
            pytest.skip(f"torch {torch.__version__} writes other records (no .storage_alignment)")
        return file.read(names[".data/serialization_id"]).decode()


def assert_same_bytes(obj: Any, directory: Path, alignment: int, monkeypatch: pytest.MonkeyPatch, **how: Any) -> None:
    theirs = torch_file(obj, directory / "torch" / "state.v1.pt")
    identity = serialization_id(theirs)
    monkeypatch.setattr("ckpt.formats.torch_zip.serialization_id", lambda _: identity)
    ours = directory / "state.v1.pt"
    ckpt.save(obj, ours, options=options(record_alignment=alignment), **how).result(DEADLINE_S)
    assert os.path.getsize(ours) == os.path.getsize(theirs)
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("lazy", [None, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("name", ALL_STATES)
def test_the_bytes_of_torch_save(
    name: str, lazy: bool | None, alignment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same_bytes(ALL_STATES[name](), tmp_path, alignment, monkeypatch, lazy=lazy)


def test_the_bytes_of_torch_save_for_70_000_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = list(torch.arange(70_000).view(70_000, 1).clone().unbind())
    records = [record.clone() for record in records]
    assert_same_bytes(records, tmp_path, 64, monkeypatch)


@pytest.mark.slow
def test_the_headers_of_torch_save_beyond_4_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record one byte longer than 32 bits allow, and behind it one whose header lies beyond 4 GiB.

    torch writes its file with holes for the payload, and without checksums: all other bytes must agree.
    """
    size = 2**32 - 1
    state = [torch.arange(5), torch.empty(size, dtype=torch.uint8), torch.arange(9)]
    theirs = tmp_path / "torch" / "large.pt"
    theirs.parent.mkdir()
    with torch.serialization.skip_data():
        torch.save(state, theirs)
    identity = serialization_id(theirs)
    monkeypatch.setattr("ckpt.formats.torch_zip.serialization_id", lambda _: identity)
    ours = tmp_path / "large.pt"
    try:
        big = ckpt.Options(arena_bytes="32MiB", record_alignment=64, direct_io=False)
        pending = ckpt.save(state, ours, lazy=True, options=big)
        pending.result(120)
        assert os.path.getsize(ours) == os.path.getsize(theirs) > size
        assert structure_of(ours) == structure_of(theirs)
        assert torch.equal(torch.load(ours, mmap=True, weights_only=True)[2], torch.arange(9))
    finally:
        ours.unlink(missing_ok=True)


def structure_of(path: Path) -> list[Any]:
    """All that a reader of the zip learns, and every byte between the records, with checksums blanked out."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    seen: list[Any] = []
    with path.open("rb") as file:
        for info in infos:
            file.seek(info.header_offset)
            header = file.read(30)
            tail = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            seen.append(
                (info.filename, info.file_size, info.header_offset, info.flag_bits, info.extra, header, file.read(tail))
            )
            file.seek(info.file_size, os.SEEK_CUR)
            descriptor = file.read(24 if info.file_size else 0)
            seen.append((descriptor[:4], descriptor[8:16]))
        begin = archive.start_dir
        file.seek(begin)
        directory = bytearray(file.read())
    at = 0
    while directory[at : at + 4] == b"PK\1\2":
        directory[at + 16 : at + 20] = bytes(4)
        lengths = [int.from_bytes(directory[at + k : at + k + 2], "little") for k in (28, 30, 32)]
        at += 46 + sum(lengths)
    return [*seen, bytes(directory)]


# ---- the same objects ------------------------------------------------------------------------------------------------


def load_all_ways(path: Path, plain_weights: bool) -> Iterator[Any]:
    yield torch.load(path, weights_only=False)
    yield torch.load(path, weights_only=False, mmap=True)
    yield ckpt.load(path, weights_only=False)
    if plain_weights:
        yield torch.load(path, weights_only=True)
        yield torch.load(path, weights_only=True, mmap=True)
        yield ckpt.load(path)


def loads_with_weights_only(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception as error:
        assert "weights_only" in str(error).lower() or "Weights only" in str(error)
        return False
    return True


@pytest.mark.parametrize("lazy", [None, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("name", ALL_STATES | PARTIAL_STATES)
def test_torch_loads_what_torch_would_have_saved(name: str, lazy: bool | None, tmp_path: Path) -> None:
    obj = (ALL_STATES | PARTIAL_STATES)[name]()
    theirs = torch_file(obj, tmp_path / "torch" / "state.pt")
    expected = torch.load(theirs, weights_only=False)
    plain_weights = loads_with_weights_only(theirs)
    ours = ckpt.save(obj, tmp_path / "state.pt", lazy=lazy, options=options(eager_bytes=0)).result(DEADLINE_S)
    for loaded in load_all_ways(ours, plain_weights):
        assert_same(expected, loaded)
    if not plain_weights:
        with pytest.raises(ckpt.CheckpointError, match="weights_only=False"):
            ckpt.load(ours)


@pytest.mark.parametrize("chunk", ["64KiB", "1MiB"])
@pytest.mark.parametrize("name", ["large", "many_sizes", "adamw", "odd_objects"])
def test_the_checksums_satisfy_zipfile(name: str, chunk: str, tmp_path: Path) -> None:
    path = ckpt.save(STATES[name](), tmp_path / "s.pt", lazy=True, options=options(chunk_bytes=chunk)).result(DEADLINE_S)
    done = subprocess.run(
        [sys.executable, "-m", "zipfile", "-t", str(path)], capture_output=True, text=True, timeout=patience(60)
    )
    assert done.returncode == 0 and done.stdout.strip() == "Done testing", done.stdout + done.stderr
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def payload_offsets(path: Path) -> dict[str, int]:
    offsets = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            offsets[info.filename.partition("/")[2]] = info.header_offset + 30 + name + extra
    return offsets


def test_direct_records_are_congruent_with_their_memory(tmp_path: Path) -> None:
    """Modulo the page a large lazy record lies as its tensor does modulo the block, so its inside needs no copy."""
    state = {"small": torch.arange(10), "a": torch.randn(400_003), "b": torch.randn(300_001), "c": torch.randn(70_000).half()}
    pending = ckpt.save(state, tmp_path / "s.pt", lazy=True, options=options(eager_bytes="64KiB"))
    pending.result(DEADLINE_S)
    if not pending.stats.direct_io:
        pytest.skip("the directory for temporary files has no direct I/O")
    offsets = payload_offsets(tmp_path / "s.pt")
    assert offsets["data/0"] % 64 == 0
    for index, name in enumerate(["a", "b", "c"], start=1):
        assert (offsets[f"data/{index}"] - state[name].data_ptr()) % 512 == 0, name
    total = sum(tensor.nbytes for tensor in state.values())
    assert pending.stats.bytes_total - total < 4 * 4096 + 4096  # at most a page of padding for each large record
    assert pending.stats.bytes_from_tensors > 0.9 * total


@pytest.mark.parametrize("name", ["archive.pt", "a.b.c", "no_suffix", "with space.pt", "ümläut-日本.pt", ".pt"])
def test_any_file_name(name: str, tmp_path: Path) -> None:
    state = {"x": torch.arange(3)}
    path = ckpt.save(state, tmp_path / name, options=options()).result(DEADLINE_S)
    assert path.name == name
    for loaded in load_all_ways(path, plain_weights=True):
        assert_same(state, loaded)


def test_names_the_archive_as_torch_save_does(tmp_path: Path) -> None:
    for name in ("archive.pt", "a.b.c", "no_suffix", "with space.pt"):
        with zipfile.ZipFile(torch_file([torch.ones(1)], tmp_path / "torch" / name)) as theirs:
            expected = theirs.namelist()[0]
        with zipfile.ZipFile(ckpt.save([torch.ones(1)], tmp_path / name, options=options()).result(DEADLINE_S)) as ours:
            assert ours.namelist()[0] == expected


def test_as_deep_as_torch_save(tmp_path: Path) -> None:
    def manages(save: Callable[[Any], Any], levels: int) -> bool:
        try:
            save(deep(levels))
        except RecursionError:
            return False
        return True

    low, high = 10, 100_000  # torch manages low, not high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if manages(lambda obj: torch.save(obj, tmp_path / "t.pt"), middle) else (low, middle)
    levels = low - 10  # the few frames that save() stands deeper than torch.save
    ckpt.save(deep(levels), tmp_path / "c.pt", options=options()).result(DEADLINE_S)
    loaded = ckpt.load(tmp_path / "c.pt")
    for level in reversed(range(levels)):
        loaded = loaded[0] if level % 2 else loaded["k"]
    assert torch.equal(loaded, torch.arange(3))


def test_what_torch_save_refuses_is_refused_too(tmp_path: Path) -> None:
    refused: list[Any] = [lambda: None, (i for i in range(3))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(AttributeError, RuntimeError):  # newer versions of torch have no named tensors
            refused.append(torch.zeros(2, 3).refine_names("a", "b"))
    for obj in refused:
        with pytest.raises(Exception) as theirs:
            torch.save(obj, tmp_path / "t.pt")
        with pytest.raises(type(theirs.value)):
            ckpt.save(obj, tmp_path / "c.pt", options=options())
        assert not (tmp_path / "c.pt").exists() and not list(tmp_path.glob(".tmp-*"))
