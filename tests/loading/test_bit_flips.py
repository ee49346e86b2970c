"""One bit of a finished file is flipped, at every byte; the file is cut off, at every length. It never goes unnoticed."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, options

import ckpt
from ckpt.errors import CorruptError


def small_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "weights": torch.randn(20, 10, generator=generator),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0),
        "half": torch.randn(33, generator=generator).bfloat16(),
        "step": 17,
        "name": "a model",
    }


def larger_state() -> dict[str, Any]:
    return small_state() | {"matrix": torch.randn(64, 80, generator=torch.Generator().manual_seed(2))}


def write_ours(path: Path) -> dict[str, Any]:
    ckpt.save(small_state(), path, options=options()).result(30)
    return small_state()


def write_ours_aligned(path: Path) -> dict[str, Any]:
    """With a record that is placed for direct I/O: a page of padding before it."""
    ckpt.save(larger_state(), path, lazy=True, options=options()).result(30)
    return larger_state()


def write_ours_uniform(path: Path) -> dict[str, Any]:
    ckpt.save(small_state(), path, options=options(record_alignment=64)).result(30)
    return small_state()


def write_torch(path: Path) -> dict[str, Any]:
    torch.save(small_state(), path)
    return small_state()


class Damaged:
    """A file that is damaged in place, and mended again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.good = path.read_bytes()
        self._bits = random.Random(len(self.good))

    def flip(self, position: int, bit: int | None = None) -> str:
        mask = 1 << (self._bits.randrange(8) if bit is None else bit)
        self._write(position, bytes([self.good[position] ^ mask]))
        return f"byte {position} ^ {mask:#04x} of {self.path.name}"

    def mend(self, position: int) -> None:
        self._write(position, self.good[position : position + 1])

    def cut(self, length: int) -> str:
        self.path.write_bytes(self.good[:length])
        return f"{self.path.name} cut to {length} bytes"

    def _write(self, position: int, byte: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(position)
            file.write(byte)


def outcome(path: Path, expected: Any) -> str:
    """What load() makes of the file: "found", "harmless" (the right state all the same), or what it should never do."""
    try:
        loaded = ckpt.load(path)
    except CorruptError as error:
        if "weights_only=False" in str(error):
            return f"advises to run code from a damaged file: {error}"
        return "found" if str(path) in str(error) else f"does not name the file: {error}"
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:100]}"
    try:
        assert_same(expected, loaded)
    except AssertionError as error:
        return f"returns something else: {error}"
    return "harmless"


def outcomes_of_flips(damaged: Damaged, expected: Any) -> dict[str, str]:
    """For every byte of the file; of a long one, for every third in its middle, where a page of padding lies."""
    found = {}
    size = len(damaged.good)
    positions = range(size) if size < 16384 else [*range(4000), *range(4000, size - 4000, 3), *range(size - 4000, size)]
    for position in positions:
        flip = damaged.flip(position)
        found[flip] = outcome(damaged.path, expected)
        damaged.mend(position)
    return found


def all_but(outcomes: dict[str, str], *expected: str) -> dict[str, str]:
    return {damage: result for damage, result in outcomes.items() if result not in expected}


@pytest.mark.parametrize(
    "write",
    [write_ours, pytest.param(write_ours_aligned, marks=pytest.mark.slow), write_ours_uniform],
    ids=lambda write: write.__name__,
)
def test_every_flipped_byte_is_found(write: Any, tmp_path: Path) -> None:
    expected = write(tmp_path / "model.pt")
    damaged = Damaged(tmp_path / "model.pt")
    assert all_but(outcomes_of_flips(damaged, expected), "found") == {}
    assert outcome(damaged.path, expected) == "harmless"


def test_flips_in_a_file_by_torch_save_are_found(tmp_path: Path) -> None:
    expected = write_torch(tmp_path / "model.pt")
    assert all_but(outcomes_of_flips(Damaged(tmp_path / "model.pt"), expected), "found") == {}


def structure_of(path: Path) -> tuple[list[int], list[int]]:
    """Of the bytes between the records: all but paddings; and for each record one byte of its padding."""
    size, fields, paddings = path.stat().st_size, [], []
    with zipfile.ZipFile(path) as archive:
        at = 0
        for entry in archive.infolist():
            header = path.read_bytes()[entry.header_offset : entry.header_offset + 30]
            begin = entry.header_offset + 30 + int.from_bytes(header[26:28], "little")
            payload = begin + int.from_bytes(header[28:30], "little")
            fields += range(at, min(begin + 4, payload))
            paddings.append(payload - 1)
            at = payload + entry.file_size
    return fields + list(range(at, size)), paddings


@pytest.mark.parametrize("write", [write_ours, write_ours_uniform, write_torch], ids=lambda write: write.__name__)
@pytest.mark.parametrize("mask", [0x01, 0xFF, *(pytest.param(mask, marks=pytest.mark.slow) for mask in (0x80, 0xDD))], ids=hex)
def test_damage_to_every_padding_hides_no_damage_to_a_field(mask: int, write: Any, tmp_path: Path) -> None:
    """Where no stretch between two records is whole any more, the file is still not somebody else's."""
    expected = write(tmp_path / "model.pt")
    damaged = Damaged(tmp_path / "model.pt")
    fields, paddings = structure_of(damaged.path)
    bad = bytearray(damaged.good)
    for position in paddings:
        bad[position] ^= 0x20
    damaged.path.write_bytes(bad)
    outcomes = {"paddings alone": outcome(damaged.path, expected)}
    for position in fields:
        bad[position] ^= mask
        damaged.path.write_bytes(bad)
        outcomes[f"byte {position} ^ {mask:#04x}"] = outcome(damaged.path, expected)
        bad[position] ^= mask
    assert all_but(outcomes, "found") == {}


def test_every_bit_of_the_records_by_torch_save_is_found(tmp_path: Path) -> None:
    write_torch(tmp_path / "model.pt")
    damaged = Damaged(tmp_path / "model.pt")
    weights = damaged.good.index(small_state()["weights"].numpy().tobytes())
    for position in range(weights, weights + 800, 7):
        for bit in range(8):
            damaged.flip(position, bit)
            with pytest.raises(CorruptError, match="data/0"):
                ckpt.load(damaged.path)
        damaged.mend(position)


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_flips_in_a_file_of_the_old_format_raise_nothing_but_our_errors(every: int, tmp_path: Path) -> None:
    """It has no checksums, so flips in its numbers cannot be found."""
    torch.save(small_state(), tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    damaged = Damaged(tmp_path / "model.pt")
    foreign = []
    for position in range(0, len(damaged.good), every):
        flip = damaged.flip(position)
        try:
            ckpt.load(damaged.path)
        except ckpt.CheckpointError:
            pass
        except Exception as error:
            foreign.append(f"{flip}: {type(error).__name__}: {error}")
        damaged.mend(position)
    assert foreign == []


def lengths(size: int) -> Iterator[int]:
    yield from range(0, min(size, 300))
    yield from range(300, max(300, size - 300), 37)
    yield from range(max(300, size - 300), size)


@pytest.mark.parametrize("write", [write_ours, write_ours_aligned, write_torch], ids=lambda write: write.__name__)
def test_every_truncation_is_found(write: Any, tmp_path: Path) -> None:
    expected = write(tmp_path / "model.pt")
    damaged = Damaged(tmp_path / "model.pt")
    outcomes = {damaged.cut(length): outcome(damaged.path, expected) for length in lengths(len(damaged.good))}
    assert all_but(outcomes, "found") == {}


def test_bytes_behind_the_end_are_found(tmp_path: Path) -> None:
    expected = write_ours(tmp_path / "model.pt")
    good = (tmp_path / "model.pt").read_bytes()
    for extra in (b"\0", b"\0" * 4096, b"x" * 100_000, good):
        (tmp_path / "model.pt").write_bytes(good + extra)
        assert outcome(tmp_path / "model.pt", expected) == "found"


def test_lost_blocks_are_found(tmp_path: Path) -> None:
    """What a file system may leave of a file that was never flushed: the right size, zeros in places."""
    path = tmp_path / "model.pt"
    expected = write_ours_aligned(path)
    good = path.read_bytes()
    outcomes = {}
    for begin in range(0, len(good), 4096):
        for end in range(begin + 4096, len(good) + 4096, 4096):
            path.write_bytes((good[:begin] + bytes(end - begin) + good[end:])[: len(good)])
            outcomes[f"zeros from {begin} to {end}"] = outcome(path, expected)
    assert all_but(outcomes, "found") == {}


# ---- a directory of checkpoints --------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Iterator[ckpt.Checkpointer]:
    """Steps 12 and 34."""
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        for step in (12, 34):
            checkpointer.save(step, small_state() | {"step": step}).result(30)
        yield checkpointer


def part_of(run: ckpt.Checkpointer, step: int, name: str) -> Damaged:
    return Damaged(run.directory / f"step-{step:012d}" / name)


def assert_restores(run: ckpt.Checkpointer, steps: tuple[int, ...], damage: str) -> int:
    """One of these steps is restored, under its right number and with its right state."""
    found = run.restore()
    assert found is not None and found.step in steps, damage
    assert_same(small_state() | {"step": found.step}, found.state)
    return found.step


def test_flips_in_a_state_lead_to_the_older_one(run: ckpt.Checkpointer, caplog: pytest.LogCaptureFixture) -> None:
    damaged = part_of(run, 34, "state.pt")
    positions = random.Random(3).sample(range(len(damaged.good)), 200)
    for position in positions:
        flip = damaged.flip(position)
        caplog.clear()
        assert_restores(run, (12,), flip)
        assert any("passed over" in record.getMessage() for record in caplog.records), flip
        damaged.mend(position)
    assert_restores(run, (34,), "mended")


def test_truncations_of_a_state_lead_to_the_older_one(run: ckpt.Checkpointer) -> None:
    damaged = part_of(run, 34, "state.pt")
    for length in [0, 1, *range(50, len(damaged.good), 97), len(damaged.good) - 1]:
        assert_restores(run, (12,), damaged.cut(length))
    damaged.path.unlink()
    assert_restores(run, (12,), "no state at all")


@pytest.mark.parametrize("bits", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("step", [12, 34])
def test_no_flip_in_a_manifest_leads_astray(step: int, bits: int, run: ckpt.Checkpointer) -> None:
    """Damage to the newest manifest may cost that checkpoint, damage to the older one must change nothing.

    Of each byte so many bits are flipped, one after the other; others of its neighbours.
    """
    damaged = part_of(run, step, "manifest.json")
    allowed = (12, 34) if step == 34 else (34,)
    astray = []
    for position in range(len(damaged.good)):
        for bit in range(position % (8 // bits), 8, 8 // bits):
            flip = damaged.flip(position, bit)
            try:
                assert_restores(run, allowed, flip)
            except AssertionError:
                around = damaged.good[max(0, position - 12) : position + 4]
                astray.append(f"{flip}, the last but 4 of {around!r}")
        damaged.mend(position)
    assert astray == []


@pytest.mark.parametrize("length", [0, 1, 50, -2])
def test_truncations_of_a_manifest_lead_to_the_older_one(length: int, run: ckpt.Checkpointer) -> None:
    damaged = part_of(run, 34, "manifest.json")
    assert_restores(run, (12,), damaged.cut(length))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"format": 1}',
        b"[" * 100_000,
        b"1" * 10_000,
        b'{"format": 2, "step": 34, "sequence": 9, "world_size": 1, "files": []}',
    ],
    ids=range(9),
)
def test_nonsense_in_place_of_a_manifest(content: bytes, run: ckpt.Checkpointer) -> None:
    part_of(run, 34, "manifest.json").path.write_bytes(content)
    assert_restores(run, (12,), repr(content[:20]))


@pytest.mark.parametrize("name", ["../state.pt", "/etc/passwd", "", ".", "..", "a/b", None, 7])
def test_a_manifest_names_only_files_beside_it(name: Any, run: ckpt.Checkpointer) -> None:
    path = part_of(run, 34, "manifest.json").path
    document = json.loads(path.read_text())
    document["files"][0]["name"] = name
    path.write_text(json.dumps(document))
    assert_restores(run, (12,), repr(name))


def test_when_all_are_damaged_restore_says_so(run: ckpt.Checkpointer) -> None:
    for step in (12, 34):
        part_of(run, step, "state.pt").flip(1000)
    with pytest.raises(CorruptError) as caught:
        run.restore()
    assert "step-000000000012" in str(caught.value) and "step-000000000034" in str(caught.value)


def test_damage_to_latest_does_not_matter(run: ckpt.Checkpointer) -> None:
    for content in (b"", b"step-000000000099\n", b"\0\xff", b"../..\n"):
        (run.directory / "latest").write_bytes(content)
        assert_restores(run, (34,), repr(content))
    (run.directory / "latest").unlink()
    assert_restores(run, (34,), "no latest")
