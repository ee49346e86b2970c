"""What is given as the same on all ranks, and is not: found when it is saved, or at least never a file that cannot be read.

Real processes save three steps; in the second, a tensor of one rank has other values.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Nursery
from test_commit import nurseries

from ckpt import _native
from ckpt.commit.record_path import name_of_record
from ckpt.plan.pickler import pickle_object

__all__ = ["nurseries"]

SMALL, MEDIUM, LARGE = 1000, 200_000, 1_300_000  # elements: within a chunk, of several ranks, of all

pytestmark = pytest.mark.usefixtures("native")

Said = list[dict[str, Any]]
Run = Callable[..., list[Said]]


class Holder:
    def __init__(self, held: torch.Tensor) -> None:
        self.held = held


def sample(*tensors: torch.Tensor, seed: int = 0) -> list[bytes]:
    addresses, sizes = [tensor.data_ptr() for tensor in tensors], [tensor.nbytes for tensor in tensors]
    found = _native.sample_records(addresses=addresses, sizes=sizes, seed=seed)
    return [found[at : at + 4] for at in range(0, len(found), 4)]


@pytest.fixture
def run(nurseries: list[Nursery], tmp_path: Path) -> Run:
    def run(world: int = 2, **request: Any) -> list[Said]:
        """What each rank has said: of step 0, of step 1, what it restored then, and of step 2."""
        children = []
        for rank in range(world):
            whole = {"directory": str(tmp_path), "rank": rank, "world": world} | request
            children.append(nurseries[rank].start(f"from dist import replica_rank; replica_rank.main({whole!r})"))
        told = []
        for ended in [child.wait() for child in children]:
            assert ended.returncode == 0, ended.stderr
            told.append([json.loads(line) for line in ended.stdout.splitlines()])
            assert len(told[-1]) == 4 and told[-1][0]["kind"] is None and told[-1][3]["kind"] is None, ended
        return told

    return run


def assert_refused(told: list[Said], *words: str) -> None:
    """The step fails on all ranks with the same words, and the one before stands."""
    for said in told:
        assert said[1]["kind"] == "PeerError", said[1]
        assert "not the same on all ranks" in said[1]["text"] and said[1]["text"] == told[0][1]["text"]
        for word in words:
            assert word in said[1]["text"]
        assert said[2]["restored"] == 0


@pytest.mark.parametrize("elements", [SMALL, MEDIUM, LARGE])
@pytest.mark.parametrize(("world", "writers"), [(2, "all"), (3, "all"), (2, "rank0")])
def test_a_tensor_with_other_values(writers: str, world: int, elements: int, run: Run) -> None:
    told = run(world, elements=elements, odd=world - 1, options={"replicated_writers": writers})
    assert_refused(
        told, f"'extra/stats/x' of shape [{elements}]", f"rank {world - 1}", "rank 0", "own state", "state=", "data="
    )
    assert told[0][1]["ranks"] == [world - 1]


@pytest.mark.parametrize("lazy", [True, False])
def test_whether_it_leaves_lazily_or_not(lazy: bool, run: Run) -> None:
    assert_refused(run(elements=MEDIUM, lazy=lazy), f"'extra/stats/x' of shape [{MEDIUM}]")


def test_a_tensor_of_rank_0_alone(run: Run) -> None:
    told = run(3, odd=0)
    assert_refused(told, "'extra/stats/x'", "ranks 1 and 2")
    assert told[0][1]["ranks"] == [1, 2]


@pytest.mark.parametrize("elements", [SMALL, MEDIUM])
def test_what_the_callback_is_given_as_extra(elements: int, run: Run) -> None:
    assert_refused(run(callback=True, elements=elements), f"'extra/stats/x' of shape [{elements}]", "rank 1", "data=")


def test_buffers_of_a_batch_norm(run: Run) -> None:
    assert_refused(run(callback=True, elements=512, batch_norm=True), "'extra/stats/running_mean' of shape [512]")


@pytest.mark.parametrize("only", [0, 500, SMALL - 1])
def test_one_element_of_a_small_tensor(only: int, run: Run) -> None:
    assert_refused(run(only=only), f"'extra/stats/x' of shape [{SMALL}]")


@pytest.mark.parametrize(("world", "odd", "only"), [(2, 1, 3), (2, 0, 3), (3, 0, 7), (3, 1, LARGE // 2), (3, 2, LARGE // 2)])
def test_one_element_of_a_tensor_that_several_write(world: int, odd: int, only: int, run: Run) -> None:
    """Most samples miss it. Who finds the checksum of all has read what the others have written, and has other bytes there."""
    told = run(world, elements=LARGE, odd=odd, only=only)
    assert_refused(told, f"'extra/stats/x' of shape [{LARGE}]")
    assert world == 3 or told[0][1]["ranks"] == [1]


@pytest.mark.parametrize("writers", ["all", "rank0"])
def test_one_element_that_nobody_sees_leaves_a_file_that_is_good(writers: str, run: Run, tmp_path: Path) -> None:
    """It lies in what the last rank writes, and no other reads; or rank 0 alone writes."""
    told = run(elements=LARGE, odd=1, only=LARGE - 9, options={"replicated_writers": writers})
    for said in told:
        if said[1]["kind"] is not None:  # a sample may have met it
            assert_refused(told, "'extra/stats/x'")
            return
        assert said[2]["restored"] == 1
    found = torch.load(tmp_path / "step-000000000001" / "replicated.pt")["extra"]["stats"]["x"]
    expected = torch.arange(LARGE, dtype=torch.float32)
    expected[LARGE - 9] += writers == "all"
    assert torch.equal(found, expected), "that of one rank"


def test_a_pickle_that_several_write_and_names_other_devices(run: Run) -> None:
    told = run(padding=400_000, odd=-1)
    assert_refused(told, "rank 1 has pickled it otherwise than rank 0 has written", "CUDA_VISIBLE_DEVICES")


def test_names_of_devices_may_differ(run: Run) -> None:
    for said in run(padding=10, odd=-1):
        assert said[1]["kind"] is None and said[2]["restored"] == 1


def test_a_record_is_named_whatever_it_stands_in() -> None:
    shared = torch.zeros(2, 3)
    names: list[Any] = [{"a": [torch.zeros(4), shared]}, (shared, torch.nn.Parameter(torch.zeros(5)))]
    names += [Holder(torch.zeros(6)), torch.zeros(7).to_sparse(), {3: torch.zeros(8, dtype=torch.uint16)}, torch.zeros(9)[2:4]]
    data, records = pickle_object(names)
    found = [name_of_record(data, key) for key in range(len(records))]
    assert found[:4] == [
        "the tensor '0/a/0' of shape [4]",
        "the tensor '1/0' of shape [2, 3]",
        "the tensor '1/1' of shape [5]",
        "the tensor '2/held' of shape [6]",
    ]
    assert found[-2:] == ["the tensor '4/3' of shape [8]", "the tensor '5' of shape [2]"]
    assert name_of_record(b"no pickle", 3) == "a tensor (record data/3)"


@pytest.mark.parametrize("nbytes", [1, 63, 64, 4095, 4096])
def test_samples_see_every_byte_of_a_small_record(nbytes: int) -> None:
    tensor = torch.zeros(nbytes, dtype=torch.uint8)
    before = sample(tensor)
    for at in range(nbytes):
        tensor[at] = 1
        assert sample(tensor) != before
        tensor[at] = 0
    assert sample(tensor) == before


@pytest.mark.parametrize("nbytes", [10_001, 100_001, (9 << 20) + 3])
def test_samples_lie_elsewhere_each_time_but_at_the_same_places_for_all(nbytes: int) -> None:
    ours = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    theirs = ours.clone()
    other = torch.zeros(100)
    assert len({sample(ours, seed=seed)[0] for seed in range(20)}) > 10
    for seed in range(20):
        assert sample(ours, other, seed=seed) == sample(theirs, other, seed=seed)
    theirs[nbytes // 2 :] += 1
    for seed in range(20):
        first, second = sample(ours, other, seed=seed), sample(theirs, other, seed=seed)
        assert first[0] != second[0] and first[1] == second[1]


def test_a_record_without_an_address_is_not_looked_at() -> None:
    assert _native.sample_records(addresses=[0, 0], sizes=[10, 0], seed=1) == bytes(8)
    assert _native.sample_records(addresses=[], sizes=[], seed=1) == b""
