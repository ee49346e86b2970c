"""What cannot be saved as sharded is refused by every rank, in words that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from nursery import sharding_nurseries

TOLD = {
    "partial": "ValueError: cannot save 'w' of sharded=: it has the placement P",
    "sharded-tensor": "TypeError: cannot save 'model.w' of sharded=: it is a ShardedTensor, as FSDP1 makes them. Take ",
    "named-part": "TypeError: cannot save 'w' of sharded=: its attributes say that it is a part of another tensor, as a ",
    "other-mesh": "ValueError: cannot save 'w' of sharded=: ",
    "same-key": "ValueError: cannot save sharded=: duplicated flatten key a.b: two places of the state have the same name",
    "inside": "TypeError: sharded= holds a DTensor inside of something that is saved as one value",
    "meta": "ValueError: cannot save 'w' of sharded=: it is on the meta device",
    "sparse": "ValueError: cannot save 'w' of sharded=: torch.distributed.checkpoint loads no tensors of torch.sparse_coo",
    "function": "TypeError: cannot save 'f' of sharded=: it cannot be pickled: ",
    "list": "TypeError: sharded= takes a state dict (nested dicts and lists), not a list",
    "good": "accepted",
    "other-ranks": "ValueError: cannot save 'w' of sharded=: this is rank ",
    "no-group": "ValueError: cannot save 'w' of sharded=: the process group of the ",
}

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    where: Path = tmp_path_factory.mktemp("refusals")
    request = {"directory": str(where / "steps"), "meeting": str(where / "meeting")}
    with sharding_nurseries(2) as nurseries:
        children = [
            nursery.start(f"from dist import sharded_refusals; sharded_refusals.main({request | {'rank': rank}!r})")
            for rank, nursery in enumerate(nurseries)
        ]
        ended = [child.wait() for child in children]
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    return [dict(line.split(": ", 1) for line in each.stdout.splitlines() if ": " in line) for each in ended]


@pytest.mark.parametrize("name", TOLD)
def test_each_rank_is_told(name: str, told: list[dict[str, str]]) -> None:
    for rank in told:
        assert rank[name].startswith(TOLD[name]), rank[name]


def test_a_part_of_another_shape_is_refused(told: list[dict[str, str]]) -> None:
    """By the rank that has it; the other one hears of it."""
    assert "(5, 3) of it, where (4, 3) follows from its shape (8, 3)" in told[1]["short"]
    assert told[0]["short"].startswith("PeerError") and "(5, 3) of it" in told[0]["short"]


def test_a_write_that_no_fence_saw_fails_the_save(told: list[dict[str, str]]) -> None:
    assert all("'model.up.weight" in rank["unannounced"] or "tensor model.up.weight" in rank["unannounced"] for rank in told)
    assert all("was changed before its bytes were captured" in rank["unannounced"] for rank in told)
