"""A nursery whose children have accelerate imported, with what torch imports late."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from nursery import Nursery, freeze, import_torch, serve, warm_up


class AccelerateNursery(Nursery):
    def __init__(self) -> None:
        self._begin(__file__, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")


def training_program(plan: dict[str, Any], rank: int, ranks: int, port: int, module: str = "accelerate_training") -> str:
    """What runs a plan of accelerate_training.py as this rank, in a child of a nursery."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    place = {"MASTER_ADDR": "127.0.0.1"} | {name: str(number) for name, number in numbers.items()}
    setting = f"import os; os.environ.update({place!r})" if ranks > 1 else "import os"
    return f"{setting}; from dist import {module}; {module}.main({plan!r}); os._exit(0)"  # all is durable


if __name__ == "__main__":
    import_torch()
    warm_up()
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    from dist import accelerate_training  # noqa: F401

    if importlib.util.find_spec("deepspeed") is not None:  # accelerate imports half of it anyway
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    freeze()
    exec(serve(int(sys.argv[1])), {})
