"""What of a sharded optimizer the callback cannot bring back is refused when it is to be saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as td
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt.integrations.torch.sharded_parts import ShardedParts


@pytest.fixture
def parts() -> Iterator[tuple[ShardedParts, torch.optim.Optimizer, torch.Tensor]]:
    td.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    module = nn.Linear(4, 4, bias=False)
    weight = DTensor.from_local(torch.randn(2, 4), init_device_mesh("cpu", (2,)), [Shard(0)], run_check=False)
    module.weight = nn.Parameter(weight)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    yield ShardedParts({"model": module, "optimizer": optimizer}), optimizer, module.weight
    td.destroy_process_group()


@pytest.mark.parametrize("value", [{}, {"left": torch.ones(2)}, [torch.ones(2)], [1, [torch.ones(1)]], [{"a": 1}]], ids=repr)
def test_containers_are_refused(parts: Any, value: Any) -> None:
    sharded, optimizer, weight = parts
    optimizer.state[weight]["of"] = value
    with pytest.raises(TypeError, match=r"optimizer cannot be saved: .* but 'of' of weight is a (dict|list)"):
        sharded.take()
    optimizer.state[weight]["of"] = torch.ones(2)
    optimizer.param_groups[0]["history"] = value
    with pytest.raises(TypeError, match=r"but 'history' of group 0 is a (dict|list)"):
        sharded.take()


def test_names_with_dots_are_refused(parts: Any) -> None:
    sharded, optimizer, weight = parts
    optimizer.state[weight]["of.a"] = torch.ones(2)
    with pytest.raises(TypeError, match=r"but 'of.a' of weight has a dot in its name"):
        sharded.take()


def test_all_else_is_taken(parts: Any) -> None:
    sharded, optimizer, weight = parts
    optimizer.state[weight] = {"step": torch.tensor(1.0), "moment": weight.detach(), "notes": [1, "two"], "none": None}
    optimizer.param_groups[0]["names"] = ("a", "b")
    found, _ = sharded.take()
    assert found["optimizer"]["state"]["weight"].keys() == {"step", "moment", "notes", "none"}


def test_a_count_of_steps_is_no_part_of_another_model(parts: Any) -> None:
    """What has not stepped gets memory for what was saved: of a parameter of another shape all else differs, and this not."""
    sharded, _, weight = parts
    state = {"step": ((), torch.float32), "moment": ((4, 9), torch.float32)}
    saved = {f"optimizer.state.weight.{key}": form for key, form in state.items()} | {"model.weight": ((4, 9), torch.float32)}
    found = sharded.prepare_targets()(saved)["optimizer"]["state"]["weight"]
    assert found["step"].shape == () and found["moment"].shape == weight.shape
