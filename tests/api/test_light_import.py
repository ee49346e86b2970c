"""What needs no torch imports none; and whoever has imported ckpt and torch has the hooks of the fence, in whatever order."""

from __future__ import annotations

import subprocess
import sys

import pytest
from places import PYTHONPATH
from support import patience

from ckpt.cli.main import COMMANDS

LIGHT = [
    *("ckpt", "ckpt._native", "ckpt.errors", "ckpt.quantities"),
    *("ckpt.storage.durable", "ckpt.storage.directory_lock", "ckpt.storage.free_space", "ckpt.storage.stores"),
    *(
        "ckpt.drain",
        "ckpt.drain.drainer",
        "ckpt.drain.uploader",
        "ckpt.remote.download",
        "ckpt.storage.object_store",
        "ckpt.cli.main",
        *(f"ckpt.cli.{name}" for name in COMMANDS),
        "ckpt.__main__",
        "ckpt.storage.block_files",
        "ckpt.storage.pace_file",
        "ckpt.safetensors_layout",
    ),
    *("ckpt.directory.manifest", "ckpt.directory.listing", "ckpt.directory.steps", "ckpt.directory.retention"),
    "ckpt.directory.keeping",
    *("ckpt.metrics", "ckpt.metrics.events", "ckpt.metrics.trace"),
]


def run(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=patience(120), env={"PYTHONPATH": PYTHONPATH}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", LIGHT)
def test_imports_no_torch(module: str) -> None:
    run(f"import sys, {module}; assert 'torch' not in sys.modules")


def test_errors_are_found_at_the_top_without_torch() -> None:
    run("import sys, ckpt; assert ckpt.CorruptError is ckpt.errors.CorruptError; assert 'torch' not in sys.modules")


FIRST = ("import ckpt.errors, torch", "import torch, ckpt", "import ckpt.coordinator", "import ckpt.devices")
STEP = """
parameter = torch.nn.Parameter(torch.zeros(2))
parameter.grad = torch.ones(2)
optimizer = torch.optim.SGD([parameter], lr=1.0)
optimizer.step()
from ckpt.fence import stepped_optimizers
assert stepped_optimizers() == [optimizer]
"""


@pytest.mark.parametrize("first", FIRST)
def test_an_optimizer_that_steps_before_the_first_save_is_known(first: str) -> None:
    run(f"{first}\nimport torch{STEP}")


def test_torch_keeps_its_loader() -> None:
    run(
        "import sys; before = [*sys.meta_path]; import ckpt, importlib.util\n"
        "assert importlib.util.find_spec('torch').origin.endswith('__init__.py') and 'torch' not in sys.modules\n"
        "import torch; assert type(torch.__loader__).__name__ == type(torch.__spec__.loader).__name__ == 'SourceFileLoader'\n"
        "assert sys.meta_path == before"
    )


@pytest.mark.parametrize("first", ["", "from ckpt.fence import fence", "import ckpt.fence", "import ckpt.checkpointer"])
def test_the_function_hides_its_module(first: str) -> None:
    run(f"{first}\nimport ckpt, types; assert isinstance(ckpt.fence, types.FunctionType) and ckpt.fence is ckpt.fence")


def test_all_public_names_are_there_though_nothing_has_been_imported() -> None:
    run(
        "import ckpt; assert {*ckpt.__all__, 'errors', 'coordinator', '__version__'} <= {*dir(ckpt)}\n"
        "from ckpt import *; assert load is ckpt.load and Checkpointer is ckpt.Checkpointer\n"
        "assert ckpt.errors.CheckpointError is CheckpointError and not hasattr(ckpt, 'nothing')"
    )
