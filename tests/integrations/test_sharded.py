"""Models and optimizers of which each rank holds a part are not saved as if they were the same on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from nursery import Ranks, sharding_nurseries
from places import TESTS
from support import DEADLINE_S

from ckpt.integrations.torch import CheckpointCallback

SCRIPT = TESTS / "dist" / "sharded_rank.py"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    with sharding_nurseries(2) as nurseries:
        ended = Ranks(nurseries, SCRIPT, str(tmp_path_factory.mktemp("sharded"))).wait(4 * DEADLINE_S)
    assert [rank.returncode for rank in ended] == [0, 0], "".join(rank.stderr for rank in ended)
    return dict(line.split(": ", 1) for rank in ended for line in rank.stdout.splitlines() if ": " in line)


REFUSED = {
    "fsdp-False": "model is sharded (a FullyShardedDataParallel) without device_mesh=init_device_mesh(...) and use_orig_params",
    "fsdp-True": "model is sharded (a FullyShardedDataParallel) without device_mesh=init_device_mesh(...): wrap it with both",
    "fsdp-mesh": "model is sharded (a FullyShardedDataParallel) without use_orig_params=True: wrap it with both",
    "fsdp-inside-False": "model is sharded (a FullyShardedDataParallel, in 'trunk')",
    "fsdp-inside-True": "model is sharded (a FullyShardedDataParallel, in 'trunk')",
    "fsdp-optimizer-False": "optimizer is sharded ('parameter 0 of group 0' is a FlatParameter)",
    "fsdp-optimizer-True": "optimizer steps sharded parameters that do not all belong to one of the modules that were given",
    "fully_shard-optimizer": "optimizer steps sharded parameters that do not all belong to one of the modules that were given",
    "zero": "optimizer is sharded (a ZeroRedundancyOptimizer)",
    "replicated-shard": "replicated= holds a DTensor, of which each rank has a part (at 'w')",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_part_on_each_rank_is_refused(name: str, told: dict[str, str]) -> None:
    assert told[name].startswith(f"TypeError: {REFUSED[name]}"), told[name]


@pytest.mark.parametrize("name", ["ddp", "replicated-whole", "fully_shard"])
def test_what_is_the_same_everywhere_is_saved(name: str, told: dict[str, str]) -> None:
    assert told[name] == "accepted"


def test_an_engine_of_deepspeed_is_refused(tmp_path: Path) -> None:
    deepspeed = pytest.importorskip("deepspeed")
    engine = deepspeed.DeepSpeedEngine.__new__(deepspeed.DeepSpeedEngine)
    engine._modules, engine._parameters, engine._buffers = {}, {}, {}
    with pytest.raises(TypeError, match=r"Use ckpt\.integrations\.deepspeed"):
        CheckpointCallback(tmp_path, model=engine)
