"""One file that several processes write together, each its share: here one process plays them all."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support import DEADLINE_S, assert_same

from ckpt import _native
from ckpt.commit.shared_file import Disagreement, WrittenShare, find_disagreement, share_of
from ckpt.plan.save_plan import LAZY, make_plan
from ckpt.saving.baselines import Offer

CHUNK = 1 << 16


@pytest.fixture
def engine(native: Any) -> Any:
    return _native.Engine(arena_bytes=8 << 20, chunk_bytes=CHUNK, writers=3)


def state_of(kind: str) -> dict[str, Any]:
    torch.manual_seed(1)
    sizes = {
        "large": [1_000_000, 17, 300_000],
        "small": [100 + i for i in range(3000)],
        "one": [2_000_003],
        "tiny": [3],
        "none": [],
        "mixed": [50_000, 1, 70_001, 0, 16_384, 16_383, 200_000, 5, 5, 5, 90_000] * 3,
    }[kind]
    return {f"tensor {i}": torch.randn(size) for i, size in enumerate(sizes)}


class Writers:
    """The processes that write `path` together."""

    def __init__(self, engine: Any, path: Path, count: int, *, direct: bool = True, lazy: bool = True) -> None:
        self.engine, self.path, self.count, self.direct, self.lazy = engine, path, count, direct, lazy
        self.jobs: list[Any] = []
        self.held: list[Any] = []

    def submit(self, state: Any, index: int, verify: bool = False) -> Any:
        plan = make_plan(state, lambda _: self.lazy, 4096)
        assert not self.lazy or not plan.sizes or max(plan.sizes) <= 4096 or LAZY in plan.kinds
        job = self.engine.submit(
            path=os.fsencode(self.path), direct=self.direct, archive=b"replicated", head=[("data.pkl", plan.pickle)],
            addresses=plan.addresses, sizes=plan.sizes, kinds=bytes(plan.kinds), tail=[("version", b"3\n")], copy_at_most=4096,
            uniform_alignment=0, verify=verify, timeout_s=DEADLINE_S, share_index=index, share_count=self.count,
        )  # fmt: skip
        self.jobs.append(job)
        self.held.append((state, plan))
        return job

    def disagreement(self) -> Disagreement | None:
        for job in self.jobs:
            assert job.wait_finished(DEADLINE_S) and job.error is None, job.error
        return find_disagreement([WrittenShare(*job.written, job.crc32, "", "", 0, *job.edges) for job in self.jobs])

    def finish(self) -> int:
        """Joins the shares; returns the CRC-32 of the file as it follows from theirs."""
        assert self.disagreement() is None
        crcs, whole, at = [0] * self.jobs[0].record_count, 0, 0
        for job in self.jobs:
            assert job.wait_finished(DEADLINE_S)
            assert job.error is None, job.error
            assert job.layout_crc32 == self.jobs[0].layout_crc32
            assert job.written[0] == at
            at = job.written[1]
            whole = _native.crc32_combine(whole, job.crc32, job.written[1] - job.written[0])
            for record, crc in zip(*job.checksums, strict=True):
                crcs[record] = crc
        offset, directory = self.jobs[0].directory(crcs)
        assert offset == at
        _native.write_end(os.fsencode(self.path), offset, directory)
        return _native.crc32(directory, whole)


def assert_file(path: Path, state: Any, crc: int) -> None:
    assert zlib.crc32(path.read_bytes()) == crc
    assert _native.verify_torch_file(os.fsencode(path), 2)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert_same(state, torch.load(path))
    assert_same(state, torch.load(path, mmap=True))
    assert_descriptors(path)


def assert_descriptors(path: Path) -> None:
    """The checksum behind each record, which most readers never look at, is that of the central directory."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.file_size:
                begin = info.header_offset
                names = int.from_bytes(content[begin + 26 : begin + 28], "little")
                extra = int.from_bytes(content[begin + 28 : begin + 30], "little")
                end = begin + 30 + names + extra + info.file_size
                assert content[end : end + 4] == b"PK\x07\x08"
                assert int.from_bytes(content[end + 4 : end + 8], "little") == info.CRC, info.filename


@pytest.mark.parametrize("kind", ["large", "small", "one", "tiny", "none", "mixed"])
@pytest.mark.parametrize("count", [2, 3, 4, 7, 64])
def test_shares_make_one_file(kind: str, count: int, engine: Any, tmp_path: Path) -> None:
    state = state_of(kind)
    writers = Writers(engine, tmp_path / "a.pt", count)
    for index in range(count):
        writers.submit(state, index)
    assert_file(tmp_path / "a.pt", state, writers.finish())


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "copied"])
def test_records_that_end_at_a_border(lazy: bool, engine: Any, tmp_path: Path) -> None:
    """Their checksum lies in the next share, or in both."""
    for short in range(0, 200, 3):
        state = {"a": torch.arange(3 * CHUNK - 2000 - short, dtype=torch.int32), "b": torch.ones(9 * CHUNK, dtype=torch.uint8)}
        writers = Writers(engine, tmp_path / "a.pt", 7, lazy=lazy)
        for index in range(7):
            writers.submit(state, index)
        assert_file(tmp_path / "a.pt", state, writers.finish())


@pytest.mark.parametrize(
    ("odd", "at", "expected"),
    [
        (0, 5, Disagreement(1, (0, 1, 2), 3)),
        (2, 260_000, Disagreement(1, (0, 1, 2), 3)),
        (3, 5, Disagreement(1, (0, 1, 2), 3)),
        (3, 499_999, None),
    ],
    ids=["the first writer", "one between", "the last, who reads it", "the last, in its own part"],
)
def test_a_record_of_several_that_differs(
    odd: int, at: int, expected: Disagreement | None, engine: Any, tmp_path: Path
) -> None:
    """One element differs on one of four, who write the tensor together. Where it goes unseen, the file is the last one's."""
    states = [{"x": torch.arange(500_000, dtype=torch.int32)} for _ in range(4)]
    states[odd]["x"][at] += 1
    writers = Writers(engine, tmp_path / "a.pt", 4)
    for index, state in enumerate(states):
        writers.submit(state, index)
    assert writers.disagreement() == expected
    if expected is None:
        assert_file(tmp_path / "a.pt", states[3], writers.finish())


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "copied"])
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
def test_in_every_way_of_writing(direct: bool, lazy: bool, verify: bool, engine: Any, tmp_path: Path) -> None:
    state = state_of("mixed")
    writers = Writers(engine, tmp_path / "a.pt", 3, direct=direct, lazy=lazy)
    for index in range(3):
        writers.submit(state, index, verify)
    assert_file(tmp_path / "a.pt", state, writers.finish())


def test_tensors_may_lie_elsewhere_in_each_process(engine: Any, tmp_path: Path) -> None:
    """The layout does not depend on addresses; what does not suit direct I/O is copied."""
    state = state_of("mixed")
    writers = Writers(engine, tmp_path / "a.pt", 4)
    for index in range(4):
        moved = {}
        for name, tensor in state.items():
            room = torch.empty(tensor.numel() * 4 + 4096, dtype=torch.uint8)
            begin = 4 * index * 5
            view = room[begin : begin + tensor.numel() * 4].view(torch.float32)
            moved[name] = view.copy_(tensor) if tensor.numel() else tensor
        # Views of larger storages: the plan names the bytes that they reference.
        writers.submit(moved, index)
    assert_file(tmp_path / "a.pt", state, writers.finish())


def test_the_fence_captures_what_is_only_read(engine: Any, native: Any, tmp_path: Path) -> None:
    """The part of a record before our share is read for its checksum: it must be captured like what we write."""
    state = state_of("one")
    expected = {name: tensor.clone() for name, tensor in state.items()}
    writers = Writers(engine, tmp_path / "a.pt", 2)
    native.set_fault("pwritev", delay_s=0.05)
    others = {name: tensor.clone() for name, tensor in state.items()}
    writers.submit(others, 0)
    writers.submit(state, 1)
    engine.fence()
    for tensor in [*state.values(), *others.values()]:
        tensor.fill_(-1)
    native.clear_faults()
    assert_file(tmp_path / "a.pt", expected, writers.finish())


def test_more_writers_than_chunks(engine: Any, tmp_path: Path) -> None:
    writers = Writers(engine, tmp_path / "a.pt", 5)
    for index in range(5):
        writers.submit(state_of("tiny"), index)
    shares = [job.written for job in writers.jobs]
    assert sum(end > begin for begin, end in shares) == 1
    assert_file(tmp_path / "a.pt", state_of("tiny"), writers.finish())


def test_shares_are_equal_and_of_whole_chunks(engine: Any, tmp_path: Path) -> None:
    writers = Writers(engine, tmp_path / "a.pt", 3)
    for index in range(3):
        writers.submit(state_of("large"), index)
    shares = [job.written for job in writers.jobs]
    assert all(begin % CHUNK == 0 for begin, _ in shares)
    sizes = [end - begin for begin, end in shares]
    assert max(sizes) - min(sizes) <= 2 * CHUNK
    assert [job.stats["bytes_total"] for job in writers.jobs] == sizes
    writers.finish()


def test_an_impossible_share(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share_index"):
        Writers(engine, tmp_path / "a.pt", 2).submit({}, 2)


@pytest.mark.parametrize(("reused", "step", "told"), [(0, 4, (0, 0)), (4096, 4, (4096, 4)), (4096, None, (4096, 0))])
def test_who_shares_no_block_names_no_step(reused: int, step: int | None, told: tuple[int, int], tmp_path: Path) -> None:
    """Another rank's share may have blocks of an older checkpoint: that is the one to be named."""
    temporary = tmp_path / "file"
    temporary.touch()
    job = SimpleNamespace(checksums=([], []), written=(0, 1), crc32=0, edges=((0, 0, 0), (0, 0, 0)))
    written = share_of(cast(Any, SimpleNamespace(job=job, temporary=temporary, reused_bytes=reused, offer=Offer(step=step))))
    assert (written.reused, written.step) == told
