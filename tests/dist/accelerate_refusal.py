"""Loads by accelerate where the main process alone has saved, and leaves what a rank is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

import ckpt.integrations.accelerate as lazy


def main(plan: dict[str, Any]) -> None:
    """
    Args:
        plan: "directory", "outcomes".
    """
    lazy.enable(ranks="main")
    project = ProjectConfiguration(plan["directory"], automatic_checkpoint_naming=True)
    accelerator = Accelerator(cpu=True, project_config=project)
    told = None
    try:
        accelerator.load_state()
    except Exception as error:
        told = [type(error).__name__, str(error)]
    rank = accelerator.process_index
    Path(plan["outcomes"], f"outcome.{rank}.json").write_text(json.dumps({"told": told}))
