"""A nursery whose children have DeepSpeed imported, with all that it imports when the first engine is built."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

from nursery import Nursery, freeze, serve, warm_up


class DeepSpeedNursery(Nursery):
    def __init__(self) -> None:
        # Collectives that miss a rank fail within a minute.
        self._begin(__file__, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", DEEPSPEED_TIMEOUT="1")


def training_program(plan: dict[str, Any], rank: int, ranks: int, port: int, module: str = "deepspeed_training") -> str:
    """What runs a plan of deepspeed_training.py as this rank, in a child of a nursery.

    Args:
        module: of dist, which knows the modes of the cases.
    """
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    place = {"MASTER_ADDR": "127.0.0.1"} | {name: str(number) for name, number in numbers.items()}
    run = f"from dist import {module}, deepspeed_training; deepspeed_training.main({plan!r})"
    return f"import os; os.environ.update({place!r}); {run}; os._exit(0)"  # all is durable


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    from dist import deepspeed_training  # noqa: F401

    warm_up()
    freeze()
    exec(serve(int(sys.argv[1])), {})
