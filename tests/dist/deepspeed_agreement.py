"""More modes of deepspeed_training.py: ranks that do not save the same.

torchrun --nproc-per-node 2 deepspeed_agreement.py plan.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from deepspeed import comm
from dist import deepspeed_training
from dist.deepspeed_behaviour import error_of, leftovers, loads, started, wait_error
from dist.deepspeed_models import Case
from dist.deepspeed_training import digest, read


def differing(case: Case, directory: Path) -> dict[str, Any]:
    """In what the first of the tags names; the second is DeepSpeed's way to validate tags."""
    training, rank = started(case), comm.get_rank()
    config = training.engine._config
    config.checkpoint_tag_validation_enabled = case.tags[1] != "IGNORE"
    config.checkpoint_tag_validation_fail = case.tags[1] == "FAIL"
    where, tag = (directory, f"of-{rank}") if case.tags[0] == "tags" else (directory / f"of-{rank}", "same")
    training.save(str(directory), "before")
    refused = [error_of(lambda: training.save(str(where), tag)) for _ in range(2)]
    training.advance()
    expected = digest(training.state())
    training.save(str(directory), "after")
    found: dict[str, Any] = {"refused": refused, "wait": wait_error(training), "latest": read(directory / "latest")}
    training.advance()
    found["loads"] = loads(training, directory, None, expected)
    found["leftovers"] = leftovers(directory)
    training.engine.destroy()
    return found


def exported(case: Case, directory: Path) -> dict[str, Any]:
    """The 16-bit weights, to a directory of each rank's own: only rank 0 writes."""
    training, where = started(case), directory / f"of-{comm.get_rank()}"
    raised = error_of(lambda: training.engine.save_16bit_model(str(where)))
    found = {"raised": raised, "files": sorted(path.name for path in where.glob("*.bin"))}
    training.engine.destroy()
    return found


deepspeed_training.MODES.update({"differing": differing, "exported": exported})

if __name__ == "__main__":
    deepspeed_training.main(json.loads(Path(sys.argv[1]).read_text()))
