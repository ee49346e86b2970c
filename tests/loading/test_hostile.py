"""Files made to do harm: an error that says what is wrong, and nothing else."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, patience

import ckpt
from ckpt.errors import CheckpointError, CorruptError
from ckpt.torch_private import find_loader

FUZZED = int(os.environ.get("LAZYCKPT_FUZZ_FILES", "1500"))
STATE = {"a": torch.arange(1000.0), "b": torch.ones(7)}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    torch.save(STATE, tmp_path / "file.pt")
    return tmp_path / "file.pt"


WAYS: dict[str, Callable[[Path], Any]] = {
    "load": ckpt.load,
    "keys": lambda path: ckpt.load(path, keys="a"),
    "load_into": lambda path: ckpt.load_into(path, {"a": torch.zeros(1000), "b": torch.zeros(7)}),
}


@pytest.fixture(params=WAYS)
def load(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    return WAYS[request.param]


def records_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path: Path, records: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in records:
            archive.writestr(name, content)


def entry_of(data: bytes, name: str) -> int:
    """Where the entry of a record begins in the central directory."""
    at = data.rindex(name.encode() + b"", 0, len(data)) - 46
    assert data[at : at + 4] == b"PK\1\2"
    return at


def set_field(path: Path, name: str, field: int, value: int, width: int = 4) -> None:
    data = bytearray(path.read_bytes())
    at = entry_of(data, name) + field
    data[at : at + width] = value.to_bytes(width, "little")
    path.write_bytes(data)


def test_files_by_other_zip_writers_load(good: Path, load: Callable[[Path], Any]) -> None:
    """The ground of what follows: it is not for a foreign writer that these files are refused."""
    write_zip(good, list(records_of(good).items()))
    load(good)
    assert_same(STATE, ckpt.load(good))


def test_compressed_records(good: Path, load: Callable[[Path], Any]) -> None:
    records = list(records_of(good).items())
    write_zip(good, [*records, ("file/data/9", bytes(50_000_000))], zipfile.ZIP_DEFLATED)
    assert good.stat().st_size < 200_000
    with pytest.raises(CorruptError, match=r"file\.pt.*is compressed"):
        load(good)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["file/data/0", "file/data.pkl"])
def test_records_that_stand_there_twice(name: str, good: Path, load: Callable[[Path], Any]) -> None:
    records = list(records_of(good).items())
    write_zip(good, [*records, (name, dict(records)[name])])
    with pytest.raises(CorruptError, match=rf"'{name}' stands in it twice"):
        load(good)


def test_overlapping_records(good: Path, load: Callable[[Path], Any]) -> None:
    """Two names for one header, and a record that reaches into the next."""
    path = good
    data = path.read_bytes()
    first = int.from_bytes(data[(at := entry_of(data, "file/data/0")) + 42 : at + 46], "little")
    set_field(path, "file/data/1", 42, first)
    with pytest.raises(CorruptError, match="disagree on the name"):
        load(path)
    path.write_bytes(data)
    for field in (20, 24):
        set_field(path, "file/data/0", field, 4200)
    with pytest.raises(CorruptError, match=r"'file/data/0' reaches into what follows"):
        load(path)


@pytest.mark.parametrize("offset", [2**31, 2**32 - 2], ids=hex)
def test_records_outside_the_file(offset: int, good: Path, load: Callable[[Path], Any]) -> None:
    set_field(good, "file/data/1", 42, offset)
    with pytest.raises(CorruptError, match="outside the file"):
        load(good)


@pytest.mark.parametrize("size", [2**31, 2**32 - 2], ids=hex)
def test_records_larger_than_the_file(size: int, good: Path, load: Callable[[Path], Any]) -> None:
    set_field(good, "file/data/1", 20, size)
    set_field(good, "file/data/1", 24, size)
    with pytest.raises(CorruptError, match="reaches into what follows"):
        load(good)


@pytest.mark.parametrize("count", [10**6, 2**40, 2**64 - 1], ids=hex)
def test_huge_counts(count: int, good: Path, load: Callable[[Path], Any]) -> None:
    data = bytearray(good.read_bytes())
    at = data.rindex(b"PK\6\6")
    data[at + 24 : at + 40] = count.to_bytes(8, "little") * 2
    good.write_bytes(data)
    with pytest.raises(CorruptError, match="counts too many records"):
        load(good)


def test_a_directory_of_many_records_is_only_slow(tmp_path: Path) -> None:
    torch.save([torch.full((1,), float(n)) for n in range(3000)], tmp_path / "many.pt")
    assert [int(t) for t in ckpt.load(tmp_path / "many.pt")] == list(range(3000))


@pytest.mark.parametrize(
    "name", ["../../escaped", "/tmp/escaped", "file/../../escaped", "file/data/../../escaped", "file/" + "x" * 60_000]
)
def test_names_that_are_paths_lead_nowhere(name: str, good: Path, load: Callable[[Path], Any]) -> None:
    """Names of records are only compared; nothing is ever unpacked."""
    before = {path: path.stat().st_mtime_ns for path in good.parent.iterdir() if path != good}
    write_zip(good, [*records_of(good).items(), (name, b"evil")])
    load(good)
    assert_same(STATE, ckpt.load(good))
    assert {path: path.stat().st_mtime_ns for path in good.parent.iterdir() if path != good} == before
    assert not Path("/tmp/escaped").exists() and not (good.parent.parent / "escaped").exists()


def forge(path: Path, pickled: bytes) -> None:
    records = records_of(path)
    name = next(name for name in records if name.endswith("/data.pkl"))
    write_zip(path, [(key, pickled if key == name else value) for key, value in records.items()])


def test_pickles_that_name_records_which_are_not_there(good: Path, load: Callable[[Path], Any]) -> None:
    pickled = records_of(good)["file/data.pkl"]
    forge(good, pickled.replace(b"X\1\0\0\x001", b"X\1\0\0\x007"))
    with pytest.raises(CorruptError, match="has no record 'data/7'"):
        load(good)


@pytest.mark.parametrize("count", [7, 999, 1001, 2**31 - 1, -1])
def test_pickles_that_lie_about_sizes(count: int, good: Path, load: Callable[[Path], Any]) -> None:
    """Or memory beside the storage could be read."""
    pickled = records_of(good)["file/data.pkl"]
    assert pickled.count(b"M\xe8\x03") == 2  # 1000 elements: of the storage, and of the tensor
    forge(good, pickled.replace(b"M\xe8\x03", b"J" + struct.pack("<i", count), 1))
    with pytest.raises(CorruptError, match=r"'data/0'.*has 4000 bytes, and its pickle says"):
        load(good)


@pytest.mark.parametrize("count", [1001, 2**31 - 1])
def test_tensors_that_reach_beyond_their_storage(count: int, good: Path, load: Callable[[Path], Any]) -> None:
    pickled = records_of(good)["file/data.pkl"]
    head, tail = pickled.rsplit(b"M\xe8\x03", 1)
    forge(good, head + b"J" + struct.pack("<i", count) + tail)
    with pytest.raises(CheckpointError, match=r"cannot be loaded.*not resizable"):
        load(good)


def test_devices_that_there_are_none_of(good: Path, load: Callable[[Path], Any]) -> None:
    pickled = records_of(good)["file/data.pkl"]
    forge(good, pickled.replace(b"X\3\0\0\0cpu", b"X\3\0\0\0csu"))
    if load is WAYS["load_into"]:  # where the bytes came from does not matter to it
        load(good)
        return
    with pytest.raises(CheckpointError, match=r"cannot be loaded.*restore data location"):
        load(good)


def test_tensors_over_a_storage_of_nothing(good: Path, load: Callable[[Path], Any]) -> None:
    torch.save({"a": torch.empty(0)}, good)
    pickled = records_of(good)["file/data.pkl"]
    forge(good, pickled.replace(b"K\x00K\x00\x85", b"K\x00K\x05\x85", 1))
    assert records_of(good)["file/data.pkl"] != pickled
    with pytest.raises(CheckpointError, match=r"cannot be loaded.*not resizable"):
        load(good)


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("function", [os.system, eval, exec, open, subprocess.check_output, torch.load, getattr])
def test_pickles_that_call_functions(function: Any, good: Path, load: Callable[[Path], Any]) -> None:
    witness = good.parent / "called"
    argument = {eval: f"open({str(witness)!r}, 'w')", exec: f"open({str(witness)!r}, 'w')"}.get(function, f"touch {witness}")
    arguments = (str(witness), "w") if function is open else (argument,)
    forge(good, pickle.dumps({"a": Calls(function, *arguments)}, protocol=2))
    with pytest.raises(CheckpointError, match="weights_only=False, which can run any code"):
        load(good)
    assert not witness.exists()


def test_a_refused_pickle_leaves_nothing_to_the_next(good: Path) -> None:
    """Torch keeps lists of what it is going to check: a load that ends in between must not spoil the next one."""
    path = good.parent / "sparse.pt"
    torch.save([torch.eye(3).to_sparse(), Calls(os.getcwd)], path)
    for _ in range(3):
        with pytest.raises(CheckpointError, match="weights_only"):
            ckpt.load(path)
    assert (loader := find_loader()) is not None and loader.noted() == []
    assert_same(STATE, ckpt.load(good))


@pytest.mark.parametrize(
    "pickled", [b"", b"\x80\x02", b"\x80\x02N", b".", b"\x80\x02(((((", b"\x80\x02h\x05.", b"\x80\x02K\x01Q.", b"\xff" * 99]
)
def test_pickles_that_are_none(pickled: bytes, good: Path, load: Callable[[Path], Any]) -> None:
    forge(good, pickled)
    with pytest.raises(CheckpointError, match=r"file\.pt"):
        load(good)


@pytest.mark.parametrize("order", [b"middle", b"\xff\xfe", b""])
def test_nonsense_in_place_of_the_byte_order(order: bytes, good: Path, load: Callable[[Path], Any]) -> None:
    records = records_of(good)
    records["file/byteorder"] = order
    write_zip(good, list(records.items()))
    with pytest.raises(CheckpointError, match=r"file\.pt"):
        load(good)


def test_numbers_of_the_other_byte_order(good: Path) -> None:
    records = records_of(good)
    records["file/byteorder"] = b"big"
    for name in ("file/data/0", "file/data/1"):
        records[name] = b"".join(bytes(reversed(records[name][at : at + 4])) for at in range(0, len(records[name]), 4))
    write_zip(good, list(records.items()))
    assert_same(torch.load(good), ckpt.load(good))
    assert_same(STATE, ckpt.load(good))
    with pytest.raises(CheckpointError, match=r"byte order: use load\(\)"):
        WAYS["load_into"](good)


def test_thousands_of_tampered_files(tmp_path: Path) -> None:
    """See fuzz_files.py. LAZYCKPT_FUZZ_FILES: how many."""
    script = Path(__file__).with_name("fuzz_files.py")
    done = subprocess.run(
        [sys.executable, str(script), str(FUZZED), "1", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=patience(120 + FUZZED / 20),
        cwd=script.parent,
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    report = json.loads(done.stdout)
    assert report["finds"] == []
    outcomes = report["outcomes"]
    assert sum(outcomes.values()) == FUZZED
    assert all(outcomes[f"{how}: error"] > 0 for how in ("flip", "cut", "move", "directory", "pickle"))
    assert outcomes["flip: right"] > 0 and outcomes["directory: right"] > 0 and outcomes["pickle: object"] > 0
