"""What needs no torch imports none; and whoever has imported ckpt and torch has the hooks of the fence, in whatever order."""

from __future__ import annotations

import json
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


# Runs each of the programs in a process that is forked from this one, and tells what each has raised.
FORKING = """
import json, os, sys, tempfile, traceback
{first}
found = dict()
for program in {programs!r}:
    with tempfile.TemporaryFile("w+") as raised:
        child = os.fork()
        if child == 0:
            try:
                exec(program, dict(__name__="__main__"))
            except BaseException:
                traceback.print_exc(file=raised)
                raised.flush()
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        raised.seek(0)
        found[program] = raised.read() or (ended and f"it has ended with {{ended}}")
print(json.dumps(found))
"""


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=patience(120), env={"PYTHONPATH": PYTHONPATH}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_each(programs: list[str], first: str = "") -> dict[str, str]:
    """Behind `first`, which is run once."""
    found: dict[str, str] = json.loads(run(FORKING.format(first=first, programs=programs)))
    assert list(found) == programs
    return found


def lightly(module: str) -> str:
    return f"import sys, {module}; assert 'torch' not in sys.modules"


@pytest.fixture(scope="module")
def light() -> dict[str, str]:
    return run_each([*map(lightly, LIGHT), lightly("ckpt.fence")])


@pytest.mark.parametrize("module", LIGHT)
def test_imports_no_torch(module: str, light: dict[str, str]) -> None:
    assert not light[lightly(module)]


def test_another_module_is_seen_to_import_it(light: dict[str, str]) -> None:
    assert "AssertionError" in light[lightly("ckpt.fence")]


def test_errors_are_found_at_the_top_without_torch() -> None:
    run("import sys, ckpt; assert ckpt.CorruptError is ckpt.errors.CorruptError; assert 'torch' not in sys.modules")


STEP = """
parameter = torch.nn.Parameter(torch.zeros(2))
parameter.grad = torch.ones(2)
optimizer = torch.optim.SGD([parameter], lr=1.0)
optimizer.step()
from ckpt.fence import stepped_optimizers
assert stepped_optimizers() == [optimizer]
"""
FIRST = ["import ckpt.errors, torch", "import ckpt.coordinator", pytest.param("import ckpt.devices", marks=pytest.mark.slow)]
BEHIND_TORCH = f"import torch, ckpt{STEP}"


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


WAYS = ["", "from ckpt.fence import fence", "import ckpt.fence", "import ckpt.checkpointer"]


def hidden(first: str) -> str:
    return f"{first}\nimport ckpt, types; assert isinstance(ckpt.fence, types.FunctionType) and ckpt.fence is ckpt.fence"


@pytest.fixture(scope="module")
def behind_torch() -> dict[str, str]:
    return run_each([*map(hidden, WAYS), BEHIND_TORCH], first="import torch")


@pytest.mark.parametrize("first", WAYS)
def test_the_function_hides_its_module(first: str, behind_torch: dict[str, str]) -> None:
    assert not behind_torch[hidden(first)]


def test_an_optimizer_is_known_where_torch_came_first(behind_torch: dict[str, str]) -> None:
    assert not behind_torch[BEHIND_TORCH]


def test_all_public_names_are_there_though_nothing_has_been_imported() -> None:
    run(
        "import ckpt; assert {*ckpt.__all__, 'errors', 'coordinator', '__version__'} <= {*dir(ckpt)}\n"
        "from ckpt import *; assert load is ckpt.load and Checkpointer is ckpt.Checkpointer\n"
        "assert ckpt.errors.CheckpointError is CheckpointError and not hasattr(ckpt, 'nothing')"
    )
