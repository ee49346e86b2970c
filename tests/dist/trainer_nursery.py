"""A nursery whose children have transformers imported, with all that it imports when the first Trainer is made."""

from __future__ import annotations

import sys
from typing import Any

from nursery import Nursery, freeze, serve, warm_up


class TrainerNursery(Nursery):
    def __init__(self) -> None:
        self._begin(__file__, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")


def training_program(plan: dict[str, Any], rank: int = 0, ranks: int = 1, port: int = 0) -> str:
    """What runs a plan of trainer_training.py as this rank, in a child of a nursery."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    place = {"MASTER_ADDR": "127.0.0.1"} | {name: str(number) for name, number in numbers.items()} if ranks > 1 else {}
    run = f"from dist import trainer_training; trainer_training.main({plan!r})"
    return f"import os; os.environ.update({place!r}); {run}; os._exit(0)"  # all is durable


if __name__ == "__main__":
    from dist import trainer_training

    trainer_training.import_all()
    warm_up()
    freeze()
    exec(serve(int(sys.argv[1])), {})
