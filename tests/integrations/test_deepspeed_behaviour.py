"""What goes wrong around saves with DeepSpeed's own engines does not with ours. Writers fail or are slow, runs end early."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

from dist.deepspeed_nursery import DeepSpeedNursery
from dist.deepspeed_runs import Fields, Outcomes
from nursery import Ended, Nursery, nurseries_of_ranks
from tier_places import end_drains_below

pytestmark = pytest.mark.usefixtures("native")

COMMON: Fields = {"engine": "enable", "stage": 1, "precision": "bf16", "same_buffers": True}
KINDS: dict[str, Fields] = {
    "ZeRO 0": {"stage": 0, "precision": "fp32", "half": True},
    "ZeRO 1": {"half": True},
    "ZeRO 3": {"stage": 3, "half": True},
    "pipeline": {"variant": "pipeline"},
}
SHARDED = ("ZeRO 1", "ZeRO 3", "pipeline")  # where all ranks write
QUICK: Fields = {"max_failed_saves": 2, "timeout_s": 10.0, "commit_timeout_s": 10.0}  # a rank that is left alone says so
DETECTED_S = 0.3  # as a launcher ends the other ranks once one has died


def case(mode: str, name: str = "", **fields: Any) -> Fields:
    return COMMON | {"name": f"{mode} {name}".strip(), "mode": mode} | fields


# The last ones would take the processes down if ranks were of different minds.
CASES = [
    *(case("slow_rank", name, **KINDS[name]) for name in SHARDED),
    *(case("destroyed", name, **kind) for name, kind in KINDS.items()),
    *(case("load_at_once", name, **KINDS[name]) for name in ("ZeRO 0", "ZeRO 1")),
    *(case(mode) for mode in ("failing", "unpicklable", "deleted_in_flight", "deleted_often")),
    case("deleted_often", "slowly", faults=[{"call": "fallocate", "delay_s": 0.1}]),
    case("own_retention"),
    case("own_retention", "waiting", options={"wait_before_return": True}),
    case("fence", options={"host_cache_size": 1 / 16}),
    *(case(mode) for mode in ("damaged", "nothing_there", "of_stock")),
    case("too_many_failures", "waiting", wait=True, tags=["0"], options=QUICK),
    case("too_many_failures", "rank 0 late", tags=["0"], options=QUICK),
    case("too_many_failures", "rank 1 late", tags=["1"], options=QUICK),
]


class Behaviour(Outcomes):
    module = "deepspeed_behaviour"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Behaviour(tmp_path_factory.mktemp("behaviour"), 2, CASES)


# ---- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHARDED)
def test_latest_waits_for_the_slowest_rank(kind: str, ranks: Outcomes) -> None:
    found = ranks[f"slow_rank {kind}"]
    assert found[0]["at_return"] == "first"
    assert found[0]["moved_s"] > 0.6, "the writer was not slow"
    assert found[0]["files"] == found[0]["all_files"]
    assert len(found[0]["files"]) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_saves_are_finished_by_destroy(kind: str, ranks: Outcomes) -> None:
    """Two of them and the 16-bit weights, with no step between."""
    for found in ranks[f"destroyed {kind}"]:
        assert (found["differences"], found["latest"], found["leftovers"]) == ([], "second", [])
        assert found["half"] == (["pytorch_model.bin"] if "half" in KINDS[kind] else [])
    assert ranks[f"destroyed {kind}"][0]["files"] >= 2


@pytest.mark.parametrize("kind", ["ZeRO 0", "ZeRO 1"])
@pytest.mark.parametrize("tag", ["first", "second", "third", "fourth"])
def test_a_load_right_behind_a_save_finds_it(tag: str, kind: str, ranks: Outcomes) -> None:
    for found in ranks[f"load_at_once {kind}"]:
        assert found[tag] == {"error": None, "path": tag, "same": True, "logged": []}


FAILURES = {  # what is injected: the rank, and what must be said of it
    "EIO in a write on rank 1": (1, "pwritev failed", "Input/output error"),
    "ENOSPC on rank 0": (0, "fallocate failed", "No space left on device"),
    "EIO in a flush on rank 1": (1, "fdatasync failed", "Input/output error"),
    "ENOSPC in the manifest": (0, "write failed", "No space left on device"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_writer_that_fails_does_not_stop_the_training(name: str, ranks: Outcomes) -> None:
    guilty, *words = FAILURES[name]
    number = list(FAILURES).index(name)
    for rank, outcomes in enumerate(ranks["failing"]):
        found = outcomes[name]
        assert (found["returned"], found["trained"]) == (True, 2)
        assert found["wait"]["type"] == ("StorageError" if rank == guilty else "PeerError")
        assert all(word in found["wait"]["text"] for word in words)
        assert rank == guilty or f"rank {guilty}" in found["wait"]["text"]
        assert found["wait_again"] is None, "a failure is raised once"
        assert (found["latest"], found["leftovers"]) == (f"good {number}", [])
        assert (found["then"], found["latest_then"]) == (None, f"good {number + 1}")
        assert found["loads"] == {"error": None, "path": f"good {number + 1}", "same": True, "logged": []}


def test_what_cannot_be_pickled_does_not_stop_the_training(ranks: Outcomes) -> None:
    for found in ranks["unpicklable"]:
        assert (found["returned"], found["trained"], found["leftovers"]) == (True, 2, [])
        assert "pickle" in found["wait"]["text"]
        assert (found["wait_again"], found["then"], found["latest"]) == (None, None, "good")
        assert found["destroy"] is None, "the end of a run must not fail for its last checkpoint"


@pytest.mark.parametrize("way", ["waiting", "rank 0 late", "rank 1 late"])
def test_too_many_failures_in_a_row_raise_on_all_ranks_in_the_same_save(way: str, ranks: Outcomes) -> None:
    first, second = ranks[f"too_many_failures {way}"]
    assert first["saves"] == second["saves"] < 20
    for found in (first, second):
        assert found["raised"]["type"] == "FailedSavesError"
        assert "Input/output error" in found["raised"]["text"]
        assert (found["then"], found["latest"]) == (None, "good")
    if way == "waiting":
        assert first["saves"] == QUICK["max_failed_saves"] + 1


def test_a_tag_is_deleted_while_it_is_written(ranks: Outcomes) -> None:
    for found in ranks["deleted_in_flight"]:
        assert "second" in found["wait"]["text"]
        assert found["latest"] == "first"
        assert found["then"] is None
        assert found["loads"] == {"error": None, "path": "third", "same": True, "logged": []}


@pytest.mark.parametrize("pace", ["", " slowly"])
def test_checkpoints_are_deleted_as_soon_as_the_next_is_begun(pace: str, ranks: Outcomes) -> None:
    for found in ranks[f"deleted_often{pace}"]:
        assert found["errors"] == [], "a checkpoint that the user deletes is no reason to stop"
        assert found["loads"] == {"error": None, "path": "step", "same": True, "logged": []}
        descriptors, threads = zip(*found["counts"], strict=True)
        # Those of files in flight come and go.
        assert max(descriptors[-5:]) <= max(descriptors[4:9]) + 3, descriptors
        assert max(threads[-5:]) <= max(threads[4:9]) + 1, threads


@pytest.mark.parametrize("way", ["", " waiting"])
def test_a_save_to_another_directory_is_durable_when_it_returns(way: str, ranks: Outcomes) -> None:
    """Rank 0, which moves `latest`, is not ahead of the others: each looks behind its own save."""
    for found in ranks[f"own_retention{way}"]:
        assert (found["one"] == "tag") == bool(way), "the first is waited for only if asked"
        assert found["two"] == "tag"
        assert "No space left on device" in found["full"]["text"]


def test_no_step_waits_for_the_disk(ranks: Outcomes) -> None:
    for found in ranks["fence"]:
        # Who waits for the disk takes as long as that.
        assert max(found["took"].values()) < found["disk_s"], found["took"]
        assert (found["meanwhile"], found["latest"]) == ("", "slow")


# ---- loading ---------------------------------------------------------------------------------------------------------

DAMAGES = {  # and what is said of it
    "flip": "rank 1: .*fails (the|its) CRC-32",
    "truncate": "has 5000 bytes",
    "delete": "rank 1: .*No such file",
    "only_temporaries": "never completed",
    "empty": "never completed",
    "cut_manifest": "manifest.json' cannot be read",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tag_is_refused_by_all_ranks(damage: str, ranks: Outcomes) -> None:
    for outcomes in ranks["damaged"]:
        found = outcomes[damage]["named"]
        assert found["error"]["type"] == "CorruptError"
        with pytest.raises(AssertionError, match=DAMAGES[damage]):
            raise AssertionError(found["error"]["text"])
        assert found["error"]["text"].endswith("published there: two, one")
        assert outcomes[damage]["untouched"], "a refused load has changed the model"


@pytest.mark.parametrize("damage", [*DAMAGES, "missing directory"])
def test_without_a_tag_the_newest_good_one_is_taken(damage: str, ranks: Outcomes) -> None:
    wanted = "nowhere" if damage == "missing directory" else damage
    for outcomes in ranks["damaged"]:
        found = outcomes[damage]["newest"]
        assert (found["error"], found["path"], found["same"]) == (None, "two", True)
        assert any(wanted in text and "'two'" in text for text in found["logged"])


def test_none_is_good(ranks: Outcomes) -> None:
    for outcomes in ranks["damaged"]:
        error = outcomes["all of them"]["newest"]["error"]
        assert error["type"] == "CorruptError"
        assert "/two/" in error["text"] and "so it is with one" in error["text"]


@pytest.mark.parametrize("what", ["no directory", "empty directory", "missing tag", "latest alone"])
def test_where_there_is_none_it_ends_as_with_deepspeed(what: str, ranks: Outcomes) -> None:
    for found in ranks["nothing_there"]:
        stock, ours = found[what]
        assert ours == stock
        if "directory" in what:
            assert ours == {"error": None, "returned": [None, None]}


@pytest.mark.parametrize("way", ["by tag", "by latest", "ours by stock"])
def test_what_one_engine_has_saved_the_other_loads(way: str, ranks: Outcomes) -> None:
    for found in ranks["of_stock"]:
        expected = "lazy" if way == "ours by stock" else "stock"
        assert found[way] == {"error": None, "path": expected, "same": True, "logged": []}


# ---- processes that end, and nodes of their own ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with nurseries_of_ranks(2, DeepSpeedNursery) as made:
        yield made


class Lives:
    """Two processes, one after the other life, in one directory."""

    def __init__(self, nurseries: list[Nursery], where: Path) -> None:
        self._nurseries, self._where = nurseries, where
        self._count = 0

    def live(self, fields: Fields, nodes: bool = False, at_once: bool = False) -> tuple[list[Ended], list[Fields]]:
        """Until they end; the second process soon after the first was killed, or the other way round.

        Args:
            at_once: they end with what is in flight, as if they had been killed.
        """
        self._count += 1
        outcomes = self._where / f"life-{self._count}"
        outcomes.mkdir()
        fields = fields | {"name": "case", "directory": str(self._where / "saved")}
        plan, port = {"outcomes": str(outcomes), "cases": [fields]}, free_port()
        end = "\nos._exit(0)" if at_once else ""
        children = [nursery.start(program(plan, rank, port, nodes) + end) for rank, nursery in enumerate(self._nurseries)]
        ended: dict[int, Ended] = {}
        for rank in sorted(range(2), key=lambda rank: rank != fields.get("crash_rank", 0)):
            if any(before.returncode < 0 for before in ended.values()):
                children[rank].kill_after(DETECTED_S)
            ended[rank] = children[rank].wait()
        found = [json.loads(path.read_text()) for path in sorted(outcomes.glob("case.*.json"))]
        return [ended[0], ended[1]], found


def program(plan: Fields, rank: int, port: int, nodes: bool) -> str:
    local = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank)}
    local = local if nodes else {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    place = local | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return (
        f"import os; os.environ.update({place | {'DEEPSPEED_TIMEOUT': '1'}!r})\n"
        f"from dist import deepspeed_tiers\ndeepspeed_tiers.deepspeed_training.main({plan!r})"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(("way", "code"), [("local", 0), ("kept", 0), ("exit", 3), ("exception", 1)])
def test_what_was_saved_is_durable_however_the_interpreter_ends(
    way: str, code: int, nurseries: list[Nursery], tmp_path: Path
) -> None:
    """`destroy()` is never called by the training. "local", "kept": its engine is gone before the end of the script, or not."""
    ended, _ = Lives(nurseries, tmp_path).live(case("leave", tags=[way]))
    assert [life.returncode for life in ended] == [code, code], ended[0].stderr + ended[1].stderr
    saved = tmp_path / "saved"
    assert (saved / "latest").read_text() == "saved"
    assert not list(saved.rglob(".tmp-*"))
    files = {file["name"]: file["bytes"] for file in json.loads((saved / "saved" / "manifest.json").read_text())["files"]}
    assert len(files) == 3
    assert files == {name: os.path.getsize(saved / "saved" / name) for name in files}


def node_files(where: Path) -> list[tuple[str, set[str]]]:
    """What each node has: the text of `latest`, and the names of all files."""
    nodes = [where / "saved" / f"node{rank}" / "saved" for rank in range(2)]
    return [(read(node / "latest"), {str(path.relative_to(node)) for path in node.rglob("*.*")}) for node in nodes]


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def assert_all_well(ended: list[Ended], found: list[Fields]) -> None:
    assert [life.returncode for life in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    for outcome in found:
        assert "error" not in outcome, outcome["traceback"]
        assert (outcome["refused"], outcome["wait"]) == (None, None)


@pytest.fixture(scope="module")
def two_nodes(nurseries: list[Nursery], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Fields]]:
    """Where they have saved "a", and what each has found meanwhile."""
    where = tmp_path_factory.mktemp("nodes")
    ended, found = Lives(nurseries, where).live(case("on_nodes", tags=["a"]), nodes=True)
    assert_all_well(ended, found)
    return where, found


def test_nodes_with_directories_of_their_own(two_nodes: tuple[Path, list[Fields]]) -> None:
    """Each has the files of its own ranks, the manifest and `latest`."""
    where, _ = two_nodes
    for number, (latest, names) in enumerate(node_files(where)):
        own = f"a/bf16_zero_pp_rank_{number}_mp_rank_00_optim_states.pt"
        assert latest == "a"
        assert {name for name in names if name.startswith("a/")} == {"a/manifest.json", "a/mp_rank_00_model_states.pt", own}


KILLED = [("data-durable", 1, "a"), ("prepared", 1, "a"), ("all-placed", 0, "a"), ("latest-renamed", 0, "b")]


@pytest.mark.parametrize(("point", "rank", "latest"), KILLED)
def test_a_node_dies(
    point: str,
    rank: int,
    latest: str,
    nurseries: list[Nursery],
    two_nodes: tuple[Path, list[Fields]],
    tmp_path: Path,
) -> None:
    """No `latest` has moved before all nodes have all of the checkpoint; both resume from the same one."""
    where, before = two_nodes
    shutil.copytree(where / "saved", tmp_path / "saved")
    lives = Lives(nurseries, tmp_path)
    ended, _ = lives.live(case("on_nodes", tags=["b"], crash_point=point, crash_rank=rank), nodes=True)
    assert ended[rank].returncode == -signal.SIGKILL, "it never came to the crash point"
    assert [text for text, _ in node_files(tmp_path)] == [latest, "a"]

    ended, found = lives.live(case("on_nodes", tags=["c"]), nodes=True)
    assert_all_well(ended, found)
    for earlier, outcome in zip(before, found, strict=True):
        assert outcome["path"] == latest
        assert latest != "a" or outcome["found"] == earlier["saved"]
    assert [text for text, _ in node_files(tmp_path)] == ["c", "c"]


def test_a_node_whose_directory_is_in_use_stops_all_ranks(nurseries: list[Nursery], tmp_path: Path) -> None:
    directory = tmp_path / "saved" / "node1" / "saved"
    directory.mkdir(parents=True)
    hold = f"import fcntl, os, sys; file = open({str(directory / '.lock')!r}, 'w'); fcntl.lockf(file, fcntl.LOCK_EX)"
    other = subprocess.Popen(
        [sys.executable, "-c", f"{hold}; print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    try:
        _, found = Lives(nurseries, tmp_path).live(case("on_nodes", tags=["a"]), nodes=True)
    finally:
        other.communicate()
    assert [(outcome["refused"] or {}).get("type") for outcome in found] == ["PeerError", "InUseError"]


# ---- by way of the disks of nodes ------------------------------------------------------------------------------------


@pytest.fixture
def lives(nurseries: list[DeepSpeedNursery], tmp_path: Path) -> Iterator[Lives]:
    yield Lives(nurseries, tmp_path)
    end_drains_below(tmp_path)


def outcomes_of(lives: Lives, mode: str, **fields: Any) -> list[Fields]:
    ended, found = lives.live(case(mode, **fields), at_once=True)
    for outcome in found:
        assert outcome.get("error") is None, outcome
    assert [life.returncode for life in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    return found


def test_saves_land_on_the_nodes_first(lives: Lives, tmp_path: Path) -> None:
    """Home is out of reach meanwhile; the job ends, and is started again. Last, stock DeepSpeed reads what came home."""
    saved = outcomes_of(lives, "save_by_nodes")
    for found in saved:
        assert (found["landed"], found["latest"], found["at_home"]) == (None, "one", [])
        assert found["late"]["type"] == "DeadlineError"

    for rank, found in enumerate(outcomes_of(lives, "load_by_nodes")):
        assert (found["path"], found["found"], found["latest"]) == ("two", saved[rank]["saved"], "three")
        assert found["places"] == (["node"] if rank == 0 else ["home", "node"]), "each has on its node what it has written"

    end_drains_below(tmp_path)
    shutil.rmtree(tmp_path / "node-0")
    for rank, found in enumerate(outcomes_of(lives, "load_by_nodes", load_tag="two")):
        assert (found["path"], found["found"]) == ("two", saved[rank]["saved"])
        assert found["places"] == (["home"] if rank == 0 else ["home", "node"])

    for rank, found in enumerate(outcomes_of(lives, "load_stock", load_tag="two", engine="stock")):
        assert found["found"] == saved[rank]["saved"]
        optimizer = [f"bf16_zero_pp_rank_{number}_mp_rank_00_optim_states.pt" for number in range(2)]
        assert found["names"] == sorted([*optimizer, "manifest.json", "mp_rank_00_model_states.pt"])


@pytest.mark.parametrize(("point", "tag"), [("receipt-renamed", "one"), ("manifest-written", "two")])
def test_a_rank_dies_before_its_node_has_the_manifest(point: str, tag: str, lives: Lives, tmp_path: Path) -> None:
    """A checkpoint is what one node has the manifest of, and all nodes have the files of."""
    ended, _ = lives.live(case("save_by_nodes", crash_point=point, crash_rank=1), at_once=True)
    assert ended[1].returncode == -signal.SIGKILL, "it never came to the crash point"
    for found in outcomes_of(lives, "load_by_nodes"):
        assert (found["path"], found["latest"]) == (tag, "three")
