"""Plain tensors that say which parts of others they hold: DCP of torch 2.14 saves them as these parts, and so do we."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from nursery import Nursery, sharding_nurseries
from support import DEADLINE_S
from torch import nn

from ckpt.integrations import dcp
from ckpt.integrations.torch import CheckpointCallback

pytestmark = pytest.mark.usefixtures("native")
knows_them = pytest.mark.skipif(not hasattr(stock, "CheckpointableTensor"), reason="this torch has no CheckpointableTensor")


@pytest.fixture(scope="module")
def nurseries() -> Iterator[list[Nursery]]:
    with sharding_nurseries(2) as made:
        yield made


@knows_them
@pytest.mark.parametrize("call", ["save", "async_save"])
def test_all_parts_are_saved(call: str, nurseries: list[Nursery], tmp_path: Path) -> None:
    """Two of each rank, out of one tensor, with a gap between them."""
    request = {"call": call, "world": 2, "directory": str(tmp_path), "meeting": str(tmp_path / "meeting")}
    children = [
        nursery.start(f"from dist import named_parts; named_parts.main({request | {'rank': rank}!r})")
        for rank, nursery in enumerate(nurseries)
    ]
    ended = [child.wait() for child in children]
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    for each in ended:
        said = json.loads(each.stdout.splitlines()[-1])
        assert said == {"loaded": True, "whole": torch.arange(24.0).reshape(8, 3).tolist()}
        assert "torch.distributed.checkpoint makes this save" in each.stderr


def named_part() -> Any:
    tensor: Any = torch.zeros(2, 3)
    tensor.global_shape, tensor.global_offsets, tensor.local_offsets, tensor.local_sizes = (
        (4, 3),
        ((2, 0),),
        ((0, 0),),
        ((2, 3),),
    )
    return tensor


def test_they_are_not_staged_as_if_they_were_whole() -> None:
    with pytest.raises(TypeError, match="a CheckpointableTensor cannot be staged lazily"):
        dcp.LazyStager().stage({"a": [named_part()]})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_they_are_copied_at_once(tmp_path: Path) -> None:
    """For every torch this one is what it is."""
    whole: Any = torch.arange(60_000.0)
    whole.global_shape, whole.global_offsets, whole.local_offsets, whole.local_sizes = (60_000,), ((0,),), ((0,),), ((60_000,),)
    response = dcp.async_save({"a": whole}, checkpoint_id=str(tmp_path / "id"))
    whole.fill_(7)
    response.upload_completion.result(DEADLINE_S)
    dcp.close()
    found = {"a": torch.zeros(60_000)}
    stock.load(found, checkpoint_id=str(tmp_path / "id"))
    assert torch.equal(found["a"], torch.arange(60_000.0))


def test_they_are_no_buffers_that_all_ranks_share(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("part", named_part())
    with pytest.raises(TypeError, match="'part' is a CheckpointableTensor"):
        CheckpointCallback(tmp_path, model=model)
