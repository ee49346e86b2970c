"""Several ranks save by ckpt.integrations.dcp; a process that has torch alone reads what they have saved."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from background import Result, side_by_side
from choice import in_turn, mostly_slow
from dist import sharded_states
from nursery import Ended, Nursery, sharding_nurseries
from places import TESTS
from support import DEADLINE_S
from torch.distributed.checkpoint import FileSystemReader

READERS = TESTS / "dist"
RUNS = [(case, world) for case, (_, worlds) in sharded_states.CASES.items() for world in worlds]
ALL_RANKS = ["preallocated", "chunks-written", "data-durable", "before-rename", "renamed", "prepared"]
RANK_0_ONLY = ["metadata-written", "metadata-renamed", "manifest-renamed", "published", "tidied"]
NUMBERS = itertools.count()
OF_PARTS = ["chunks-written", "data-durable", "before-rename", "renamed"]

pytestmark = pytest.mark.usefixtures("native")


Start = Callable[..., list[Ended]]


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with sharding_nurseries(4) as made:
        yield made


@pytest.fixture(scope="module")
def start(nurseries: list[Nursery], tmp_path_factory: pytest.TempPathFactory) -> Start:
    return starter(nurseries, tmp_path_factory)


def starter(nurseries: list[Nursery], tmp_path_factory: pytest.TempPathFactory) -> Start:
    """What starts a job, whose ranks are children of these, and waits for its end."""

    def start(work: str, directory: Path, world: int, *each: dict[str, Any], **common: Any) -> list[Ended]:
        meeting = tmp_path_factory.getbasetemp() / f"meeting-{next(NUMBERS)}"
        children = []
        for rank in range(world):
            request = {"work": work, "directory": str(directory), "meeting": str(meeting), "rank": rank, "world": world}
            request |= common | (each[rank] if each else {})
            children.append(nurseries[rank].start(f"from dist import dcp_ranks; dcp_ranks.main({request!r})"))
        return [child.wait() for child in children]

    return start


def ended_well(ended: list[Ended]) -> list[list[dict[str, Any]]]:
    """What each has said."""
    assert [each.returncode for each in ended] == [0] * len(ended), "\n".join(each.stderr for each in ended)
    return list(map(said, ended))


def said(ended: Ended) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


# ---- what is saved ---------------------------------------------------------------------------------------------------


def read(*directories: Path) -> dict[str, str]:
    """What is wrong with each case."""
    command = [sys.executable, str(READERS / "torch_reader.py"), *map(str, directories)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * DEADLINE_S, cwd="/")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {each["case"]: each["error"] for each in found}


@pytest.fixture(scope="module")
def saved(start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process with torch alone finds wrong, by case and ranks."""
    directories = [tmp_path_factory.mktemp("ranks") for _ in (1, 2, 4)]
    for world, directory in zip((1, 2, 4), directories, strict=True):
        ended_well(start("save_cases", directory, world))
    return read(*directories)


@pytest.mark.parametrize(("case", "world"), RUNS)
def test_torch_reads_what_was_there_when_it_was_saved(case: str, world: int, saved: dict[str, str]) -> None:
    """An optimizer has stepped right behind async_save(), while writes were slow."""
    assert saved[f"{case}-{world}"] == ""


@pytest.mark.parametrize(("case", "world"), [(case, world) for case, world in RUNS if case != "apart"])
def test_so_it_does_where_torch_plans(case: str, world: int, saved: dict[str, str]) -> None:
    assert saved[f"{case}-{world}-parts"] == ""


def test_staging_of_torch_without_a_fence_fails_that(start: Start, tmp_path: Path) -> None:
    ended_well(start("control", tmp_path, 1))
    (error,) = read(tmp_path).values()
    assert "has other values" in error


# ---- an id that is saved again ---------------------------------------------------------------------------------------


class Reader:
    """A process with torch alone."""

    def __init__(self) -> None:
        command = [sys.executable, str(READERS / "dcp_reader.py")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")
        self._one_at_a_time = threading.Lock()

    def find(self, directory: Path) -> int:
        """The number of the state that it is, bit for bit."""
        candidates = sorted(map(str, directory.parent.glob("expected-*.pt")))
        with self._one_at_a_time:
            print(json.dumps({"directory": str(directory), "candidates": candidates}), file=self._input, flush=True)
            answer = json.loads(self._output.readline())
        assert "error" not in answer, answer["error"]
        return int(re.findall(r"\d+", answer["found"])[0])

    @property
    def _input(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _output(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def close(self) -> None:
        self._input.close()
        self._process.wait(DEADLINE_S)
        self._output.close()


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


def assert_nothing_left(directory: Path) -> None:
    """Beside the newest checkpoint."""
    metadata = FileSystemReader(directory).read_metadata()
    data = {Path(info.relative_path) for info in metadata.storage_data.values()}
    names = {path.name for path in directory.iterdir()} - {".lock", ".metadata", "manifest.json"}
    assert names == {str(name) for path in data for name in (path, path.with_suffix(".crc32"))}


@pytest.mark.parametrize("way", ["ours", "parts"])
def test_former_files_go(way: str, start: Start, reader: Reader, tmp_path: Path) -> None:
    ended_well(start("again", tmp_path, 2, saves=3, way=way))
    assert reader.find(tmp_path / "id") == 2
    assert_nothing_left(tmp_path / "id")


KILLS = [("ours", point, victim) for point in ALL_RANKS for victim in (0, 1)] + [("ours", point, 0) for point in RANK_0_ONLY]
KILLS += [("parts", point, victim) for point in OF_PARTS for victim in (0, 1)]
KILLS += [("parts", point, 0) for point in ("metadata-written", "metadata-renamed", "manifest-renamed")]


LANES = 6  # jobs side by side: the rank that is left waits for most of the time


@pytest.fixture(scope="module")
def begun(
    nurseries: list[Nursery], reader: Reader, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Result]:
    def killed(start: Start, directory: Path, **case: Any) -> None:
        killed_while_an_id_is_saved_again(start, reader, directory, **case)

    with contextlib.ExitStack() as stack:
        pairs = [[stack.enter_context(nursery.another()) for nursery in nurseries[:2]] for _ in range(LANES)]
        lanes = [starter(pair, tmp_path_factory) for pair in pairs]
        bodies = {"test_killed_while_an_id_is_saved_again": killed}
        yield stack.enter_context(side_by_side(request, bodies, lanes, tmp_path_factory))


MANY_KILLS = [("ours", *each) for each in in_turn(ALL_RANKS)] + [("parts", *each) for each in in_turn(OF_PARTS)]
MANY_KILLS += [kill for kill in KILLS if kill[1] not in (*ALL_RANKS, *OF_PARTS)]


@pytest.mark.parametrize(("way", "point", "victim"), mostly_slow(KILLS, run=MANY_KILLS))
def test_killed_while_an_id_is_saved_again(
    way: str, point: str, victim: int, begun: Result, request: pytest.FixtureRequest
) -> None:
    """Readers of torch find the one or the other, never a mixture, and the next save clears up."""
    begun(request)


def killed_while_an_id_is_saved_again(start: Start, reader: Reader, directory: Path, way: str, point: str, victim: int) -> None:
    ended_well(start("again", directory, 2, way=way))
    each = [{"crash_point": point if rank == victim else "none"} for rank in (0, 1)]
    told = start("again", directory, 2, *each, first=1, way=way)
    assert told[victim].returncode == -signal.SIGKILL, told[victim].stderr
    found = reader.find(directory / "id")
    assert found in (0, 1)
    if any(each == {"durable": 1} for each in said(told[1 - victim])):
        assert found == 1, "called durable, and not there"
    if point in (*ALL_RANKS, "metadata-written") and (point, victim) != ("prepared", 1):  # then rank 0 has its word
        assert found == 0
    ended_well(start("again", directory, 2, first=2, way=way))
    assert reader.find(directory / "id") == 2
    assert_nothing_left(directory / "id")


@pytest.mark.parametrize("way", ["ours", "parts"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("call", ["open", "pwritev", "fdatasync", "rename"])
def test_a_full_disk_on_one_rank(call: str, rank: int, way: str, start: Start, reader: Reader, tmp_path: Path) -> None:
    fault = {"call": call, "path_part": f"__{rank}_", "error": 28}
    each = [{"fault": fault if this == rank else None} for this in (0, 1)]
    for words in ended_well(start("again", tmp_path, 2, *each, saves=2, way=way)):
        assert words[0] == {"durable": 0} and words[1]["failed"] == 1, words
        assert "No space left" in words[1]["text"] or way == "parts"
    assert reader.find(tmp_path / "id") == 0


@pytest.mark.parametrize("call", ["open", "write", "rename"])
def test_metadata_that_cannot_be_written(call: str, start: Start, reader: Reader, tmp_path: Path) -> None:
    fault = {"call": call, "path_part": "metadata", "error": 28}
    for words in ended_well(start("again", tmp_path, 2, {"fault": fault}, {}, saves=2)):
        assert words[1]["failed"] == 1 and "No space left" in words[1]["text"], words
    assert reader.find(tmp_path / "id") == 0
    ended_well(start("again", tmp_path, 2, first=2))
    assert_nothing_left(tmp_path / "id")


# ---- groups, and states that differ ----------------------------------------------------------------------------------


def test_groups_save_beside_each_other(start: Start, tmp_path: Path) -> None:
    told = ended_well(start("apart", tmp_path, 4))
    assert all("does not belong to the process group" in words.pop(0)["refused"] for words in told)
    assert not (tmp_path / "foreign").exists()
    assert [words[0] for words in told] == [{"half": 0, "w": [1.0]}] * 2 + [{"half": 1, "w": [12.0]}] * 2
    assert sorted(path.name for path in (tmp_path / "rank-3").glob("*.distcp")) == ["__0_0.distcp"]


@pytest.mark.parametrize("group", ["none", "world", "own"])
def test_states_that_differ_are_left_to_torch(group: str, start: Start, tmp_path: Path) -> None:
    """Which collects them, in the background, while the training reduces on the group that it names, if any."""
    ended = start("unlike", tmp_path, 2, group=group)
    assert ended_well(ended) == [[{"error": ""}]] * 2
    for each in ended:
        assert each.stderr.count("makes this save, with LazyStorageWriter, because rank 1 has other keys") == 1


def test_sharded_tensors_are_left_to_torch(start: Start, tmp_path: Path) -> None:
    told = ended_well(start("sharded_tensors", tmp_path, 2))
    assert told == [[{"kind": "ShardedTensor"}, {"same": True}] * 2] * 2


def test_errors_of_one_rank(start: Start, tmp_path: Path) -> None:
    """Also of what has a state dict and does not give it, where the others would wait in a collective of torch."""
    told = ended_well(start("lonely", tmp_path, 2))
    assert [words["raised"] for words in told[1] if "raised" in words][:4] == ["RuntimeError"] * 2 + ["KeyboardInterrupt"] * 2
    others = [words for words in told[0] if "raised" in words]
    assert [words["raised"] for words in others[:4]] == ["PeerError"] * 4
    assert all("rank 1 cannot save" in words["text"] for words in others[:4]) and "no state today" in others[0]["text"]
    for words in told:
        assert [each["error"] for each in words if "error" in each] == ["", ""]
        damaged = [each for each in words if "raised" in each][4:]
        assert [each["raised"] for each in damaged] == ["CorruptError"] * 2, damaged
        assert "__1_" in damaged[0]["text"] and ".metadata" in damaged[1]["text"]
