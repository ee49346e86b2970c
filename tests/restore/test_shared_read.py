"""Ranks that read a file together: each its share, the rest from the others. Real processes, gloo over loopback."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import PYTHONPATH, TESTS
from states import ALL_STATES
from support import DEADLINE_S, options

import ckpt
from ckpt.errors import CheckpointError, CorruptError
from ckpt.loading.archive import Archive
from ckpt.loading.host_memory import bytes_of
from ckpt.restore import shared_read

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

Answers = list[dict[str, Any]]


class Ranks:
    """Processes of one group, which wait to be asked. A context manager."""

    def __init__(self, size: int, timeout_s: float = DEADLINE_S) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        meeting = Path(self._folder.name, "meeting")
        env = os.environ | {"PYTHONPATH": PYTHONPATH, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        program = [sys.executable, str(TESTS / "dist" / "spread_rank.py")]
        self.processes = [
            subprocess.Popen(
                [*program, str(rank), str(size), str(meeting), str(timeout_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=env,
                bufsize=0,
            )
            for rank in range(size)
        ]

    def tell(self, rank: int, **asked: Any) -> None:
        pipe = self.processes[rank].stdin
        assert pipe is not None
        pipe.write(json.dumps(asked).encode() + b"\n")

    def hear(self, rank: int) -> dict[str, Any]:
        pipe = self.processes[rank].stdout
        assert pipe is not None
        assert select.select([pipe], [], [], DEADLINE_S)[0], f"rank {rank} hangs"
        line = pipe.readline()
        assert line, f"rank {rank} has died"
        return dict(json.loads(line))

    def ask(self, call: str, only: dict[int, dict[str, Any]] | None = None, **asked: Any) -> Answers:
        """The same of all, but for what is `only` for some."""
        for rank in range(self.size):
            self.tell(rank, call=call, **(asked | (only or {}).get(rank, {})))
        return [self.hear(rank) for rank in range(self.size)]

    def load(self, path: Path, **more: Any) -> Answers:
        return self.ask("load", path=str(path), **more)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        self._folder.cleanup()


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda size: f"{size}_ranks")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with Ranks(request.param) as started:
        yield started


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    with Ranks(3) as started:
        yield started


def filled(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def uneven() -> dict[str, torch.Tensor]:
    """Small and large in turn, and one that spans several shares."""
    sizes = [1, 70_001, 3, (2 << 20) + 5, 0, 4096, 1 << 20, (1 << 20) - 1, 300_000, (30 << 20) + 11, 17, 5 << 20]
    return {str(index): filled(size) for index, size in enumerate(sizes)}


SHAPES: dict[str, Any] = {
    "uneven": uneven,
    "one_huge": lambda: {"weight": torch.randn(12 << 20)},
    "tiny": lambda: {"step": torch.tensor(3)},
    "no_tensor": lambda: {"step": 3},
    "many_small": lambda: [filled(random.Random(index).randrange(20_000)) for index in range(600)],
}


def save(state: Any, path: Path, by: str = "ours") -> Path:
    if by == "torch":
        torch.save(state, path)
    else:
        ckpt.save(state, path, lazy=True, options=options(eager_bytes=0)).result(DEADLINE_S)
    return path


def crc_of(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


@pytest.mark.parametrize("by", ["ours", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_rank_reads_its_share_and_has_all(ranks: Ranks, shape: str, by: str, tmp_path: Path) -> None:
    path = save(SHAPES[shape](), tmp_path / "state.pt", by)
    size = path.stat().st_size
    answers = ranks.load(path)
    assert [answer.get("crc") for answer in answers] == [crc_of(path)] * ranks.size, answers
    if shape in ("uneven", "one_huge"):  # the directory and the headers, which every rank reads, are next to nothing
        for answer in answers:
            assert size // ranks.size - 4096 <= answer["bytes_read"] <= size // ranks.size + 512 * 1024


def test_every_state(three: Ranks, tmp_path: Path) -> None:
    for name, make in ALL_STATES.items():
        path = save(make(), tmp_path / f"{name}.pt")
        answers = three.load(path)
        assert [answer.get("crc") for answer in answers] == [crc_of(path)] * 3, (name, answers)


@pytest.mark.parametrize("staged", [False, True], ids=["straight", "staged"])
def test_into_tensors_that_exist(ranks: Ranks, staged: bool, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in uneven().items() if tensor.numel()}
    state |= {"half": torch.randn(333, 77).bfloat16(), "complex": torch.randn(5, dtype=torch.complex64)}
    path = save(state, tmp_path / "state.pt")
    answers = ranks.ask("fill", path=str(path), staged=staged)
    assert answers == [{"crc": crc_of(path)}] * ranks.size


def test_through_buffers_alone(ranks: Ranks, tmp_path: Path) -> None:
    path = save(uneven(), tmp_path / "state.pt")
    answers = ranks.load(path, staged=True)
    assert [answer.get("crc") for answer in answers] == [crc_of(path)] * ranks.size, answers


def test_some_of_the_ranks(three: Ranks, tmp_path: Path) -> None:
    path = save(uneven(), tmp_path / "state.pt")
    answers = three.load(path, ranks=[1, 2])
    assert answers[0]["error"] == "CheckpointError" and "not in the group" in answers[0]["text"]
    assert [answer.get("crc") for answer in answers[1:]] == [crc_of(path)] * 2, answers
    assert max(answer["bytes_read"] for answer in answers[1:]) < path.stat().st_size * 0.51


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("where", [0.01, 0.5, 0.9])
def test_a_flipped_bit_is_noticed_on_every_rank(ranks: Ranks, where: float, tmp_path: Path) -> None:
    path = save({"weight": torch.randn(2 << 20)}, tmp_path / "state.pt")
    flip(path, int(path.stat().st_size * where))
    answers = ranks.load(path)
    assert [answer.get("error") for answer in answers] == ["CorruptError"] * ranks.size, answers
    assert all("record 'state/data/0' of" in answer["text"] and "fails its CRC-32" in answer["text"] for answer in answers)


def test_a_flipped_bit_between_records_is_in_the_checksum(ranks: Ranks, tmp_path: Path) -> None:
    path = save({"weight": torch.randn(2 << 20)}, tmp_path / "state.pt")
    before = crc_of(path)
    archive = Archive(path)
    flip(path, archive.records["data/0"].offset - 1)  # padding
    answers = ranks.load(path, compare=False)
    assert [answer.get("crc") for answer in answers] == [crc_of(path)] * ranks.size, answers
    assert crc_of(path) != before


def test_a_bit_that_flips_on_the_way_is_noticed_on_every_rank(three: Ranks, tmp_path: Path) -> None:
    path = save({"weight": torch.randn(2 << 20)}, tmp_path / "state.pt")
    answers = three.load(path, only={1: {"tamper": True}})
    assert [answer.get("error") for answer in answers] == ["CorruptError"] * 3, answers
    assert all("record 'state/data/0' of" in answer["text"] for answer in answers)


def assert_blamed(answers: Answers, culprit: int, error: str, cause: str) -> None:
    """The rank raises its own error, the others name it and the cause."""
    for rank, answer in enumerate(answers):
        assert cause in answer["text"], answer
        assert answer["error"] == (error if rank == culprit else "PeerError"), answer
        assert rank == culprit or (answer["ranks"] == [culprit] and f"rank {culprit} could" in answer["text"])


def test_what_fails_on_one_rank_fails_on_all_and_they_go_on(three: Ranks, tmp_path: Path, native: Any) -> None:
    path, short = save(uneven(), tmp_path / "state.pt"), tmp_path / "short.pt"
    shutil.copy(path, short)
    os.truncate(short, path.stat().st_size // 2)
    missing = {"path": str(tmp_path / "missing.pt")}
    unreadable = {"fault": {"call": "pread", "path_part": "state.pt", "skip": 2, "error": errno.EIO}}
    assert_blamed(three.load(path, only={1: {"path": str(short)}}), 1, "CorruptError", "was it cut off?")
    assert_blamed(three.load(path, only={2: missing}), 2, "StorageError", "missing.pt")
    assert_blamed(three.load(path, only={0: unreadable}), 0, "StorageError", "pread failed")
    assert [answer.get("crc") for answer in three.load(path)] == [crc_of(path)] * 3


def test_a_file_that_shrinks_while_it_is_read(three: Ranks, tmp_path: Path) -> None:
    path, own = save(uneven(), tmp_path / "state.pt"), tmp_path / "own.pt"
    shutil.copy(path, own)
    answers = three.load(path, only={1: {"path": str(own), "truncate": 100_000}})
    assert_blamed(answers, 1, "CorruptError", "while it was read: it was truncated")


def test_ranks_that_see_different_files(three: Ranks, tmp_path: Path) -> None:
    ours, other = tmp_path / "a.pt", tmp_path / "b" / "a.pt"
    other.parent.mkdir()
    save({"a": torch.zeros(100_000)}, ours, "torch")
    save({"a": torch.ones(100_000)}, other, "torch")
    assert ours.stat().st_size == other.stat().st_size
    answers = three.load(ours, only={2: {"path": str(other)}})
    assert [answer.get("error") for answer in answers] == ["CorruptError"] * 3, answers
    assert all("another file on rank 2 than on rank 0: all ranks must see the same" in answer["text"] for answer in answers)


def test_ranks_that_want_different_records(three: Ranks, tmp_path: Path) -> None:
    path = save(uneven(), tmp_path / "state.pt")
    answers = three.load(path, only={1: {"map_location": "meta"}})
    assert [answer.get("error") for answer in answers] == ["CheckpointError"] * 3, answers
    assert all("rank 1 wants other records" in answer["text"] for answer in answers)
    assert all("crc" in answer for answer in three.load(path, map_location="meta"))


@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_a_peer_that_does_not_answer(how: str, tmp_path: Path) -> None:
    path = save(uneven(), tmp_path / "state.pt")
    with Ranks(2, timeout_s=4 if how == "hangs" else DEADLINE_S) as pair:
        assert all("crc" in answer for answer in pair.load(path))
        if how == "hangs":
            pair.tell(1, call="sleep", seconds=600)
        else:
            pair.processes[1].kill()
        pair.tell(0, call="load", path=str(path))
        answer = pair.hear(0)
    assert (answer["error"], answer["ranks"]) == ("PeerError", [])
    assert "A rank has died or hangs" in answer["text"] and "start the job again" in answer["text"]


def test_without_a_process_group(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not initialised.*init_process_group"):
        shared_read.read_together(lambda: Archive(tmp_path / "any.pt"))


# ---- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4095, 4096, 10_000, 1 << 20, (1 << 30) + 12_345])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_shares_cover_the_file_evenly(size: int, count: int) -> None:
    shares = shared_read.cut(size, count)
    assert len(shares) == count
    assert (shares[0][0], shares[-1][1]) == (0, size)
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(shares))
    assert all(begin % 4096 == 0 for begin, _ in shares)
    assert all(size / count - 4096 <= end - begin <= size / count + 4096 for begin, end in shares)


def test_small_parts_share_broadcasts(tmp_path: Path) -> None:
    archive = Archive(save([filled(size) for size in [5000, 1 << 20] * 40 + [40 << 20]], tmp_path / "state.pt", "torch"))
    names = archive.storage_names()
    bounds = shared_read.cut(archive.size, 4)
    batches = shared_read.plan(archive, archive.allocate(names), bounds)
    assert sum(batch.nbytes for batch in batches) == sum(archive.records[name].size for name in names)
    assert all(batch.nbytes <= 16 << 20 for batch in batches)
    assert {batch.owner for batch in batches[:4]} == {0, 1, 2, 3}
    packed = [batch for batch in batches if len(batch.parts) > 1]
    assert len(packed) <= 4 and sum(len(batch.parts) for batch in packed) >= 40


def test_a_place_that_is_too_small(tmp_path: Path) -> None:
    archive = Archive(save({"a": filled(100)}, tmp_path / "state.pt"))
    with pytest.raises(ValueError, match="100 bytes is to go where there is room for 99"):
        shared_read.plan(archive, {"data/0": torch.zeros(99, dtype=torch.uint8)}, shared_read.cut(archive.size, 2))


@pytest.mark.parametrize("align", [1, 512, 4096])
def test_any_share_is_read_exactly(align: int, tmp_path: Path, native: Any) -> None:
    path = save({str(n): filled(n) for n in (1, 5000, 300_000, (1 << 20) + 7, 12, 70_000)}, tmp_path / "state.pt")
    native.override_io_limits(align, align)
    content, dice = path.read_bytes(), random.Random(1)
    archive = Archive(path)
    for _ in range(50):
        begin, end = sorted(dice.randrange(len(content) + 1) for _ in range(2))
        places = archive.allocate(archive.records)
        for place in places.values():
            place.fill_(0xEE)
        before = archive.bytes_read
        assert archive.fill_share(places, begin, end) == zlib.crc32(content[begin:end])
        assert archive.bytes_read - before <= end - begin + 2 * align
        for name, place in places.items():
            offset, size = archive.records[name][1:]
            first, last = (min(max(edge - offset, 0), size) for edge in (begin, end))
            wanted = b"\xee" * first + content[offset + first : offset + last] + b"\xee" * (size - last)
            assert bytes_of(place) == wanted, name


def test_a_share_outside_the_file(tmp_path: Path) -> None:
    archive = Archive(save({"a": filled(100)}, tmp_path / "state.pt"))
    with pytest.raises(CorruptError, match="are not in it"):
        archive.fill_share({}, 0, archive.size + 1)
    with pytest.raises(ValueError, match="ends before it begins"):
        archive.fill_share({}, 2, 1)


def test_records_in_memory_are_checked(tmp_path: Path) -> None:
    path = save({"a": filled(100), "b": filled((9 << 20) + 1)}, tmp_path / "state.pt")
    archive = Archive(path)
    places = archive.allocate(archive.records)
    archive.fill(places)
    archive.check(places)
    places["data/1"][9 << 20] ^= 1
    archive.check({name: place for name, place in places.items() if name != "data/1"})
    with pytest.raises(CorruptError, match=r"data/1.*fails its CRC-32"):
        archive.check(places)


def test_the_checksum_of_a_directory(tmp_path: Path) -> None:
    paths = [tmp_path / name / "state.pt" for name in ("zeros", "ones")]
    for path, make in zip(paths, (torch.zeros, torch.ones), strict=True):
        path.parent.mkdir()
        save({"a": make(9)}, path)
    zeros, ones, again = (Archive(path).directory_crc32 for path in (*paths, paths[0]))
    assert zeros == again != ones
