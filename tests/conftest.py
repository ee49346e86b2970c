"""Fixtures for all tests: no fault, engine or leak of one test reaches the next."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import places
import pytest

if sys.version_info < (3, 12):
    # Torch 2.6 imports it late, by way of triton, which fails if the distutils of the standard library have come first.
    import setuptools  # noqa: F401

if TYPE_CHECKING:
    from pathlib import Path

    from command_line import Shell
    from support import Resources

    import ckpt


sys.path += [path for path in map(str, places.FOLDERS) if path not in sys.path]

from object_server import bucket, proxy, seaweed, server  # noqa: F401  fixtures, of tests that need an object store

# No test asks a name server. The server of torch's store looks up the name of whoever connects, and serves nobody meanwhile.
# For an IPv4 client that is a question to DNS: where the answer is lost, all ranks of the job would stand still for seconds.
os.environ["RES_OPTIONS"] = "attempts:0"

# A shell starts what goes to its background with Ctrl-C ignored, and children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Of two processes that share the files, none is to get a long one last.
LONGEST = (
    "test_deepspeed_behaviour.py",
    "test_deepspeed_files.py",
    "test_deepspeed_tools.py",
    "test_deepspeed_readers.py",
    "test_deepspeed_writes.py",
    "test_deepspeed_crash.py",
    "test_deepspeed_agreement.py",
    "test_deepspeed_config.py",
    "test_node_saves.py",
    "test_bundle_nodes.py",
    "test_dcp_ranks.py",
    "test_sharded_commit.py",
    "test_accelerate_ranks.py",
    "test_commit_mpi.py",
    "test_sharded_saves.py",
    "test_uploads.py",
    "test_crash.py",
    "test_commit.py",
    "test_coordinator.py",
    "test_device.py",
    "test_lightning_ranks.py",
    "test_transformers_crash.py",
    "test_transformers.py",
    "test_drain_kills.py",
    "test_drain_faults.py",
    "test_packaging.py",
    "test_bench_rivals.py",
    "test_bench_gpu.py",
    "test_gpu_report_steps.py",
    "test_bench_scaling.py",
    "test_bench_simulate.py",
    "test_example_ranks.py",
    "test_doc_blocks.py",
    "test_exit.py",
    "test_bench.py",
    "test_docs.py",
    "test_leaks.py",
    "test_shared_read.py",
    "test_ranks_apart.py",
    "test_hostile.py",
    "test_light_import.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What has been imported by now stays. Else each look for garbage goes through all of it: a third of a second with the
    frameworks, and tests make hundreds."""
    gc.collect()
    gc.freeze()


def shares_with(file: str) -> str:
    """Of files that have the same here one process runs all: what their nurseries import takes a core a quarter of a minute."""
    return "deepspeed" if "/test_deepspeed_" in file else file.replace("/test_commit_by_node.", "/test_commit.")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByNursery(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return shares_with(super()._split_scope(nodeid))

    return ByNursery(config, log)


def pytest_sessionfinish() -> None:
    if "nursery" in sys.modules:
        sys.modules["nursery"].end_shared()


@pytest.fixture(autouse=True)
def clean_engine() -> Iterator[None]:
    """Ends faults that a test has set, and the engines that `ckpt.save` keeps for the life of the process."""
    yield
    if "ckpt" in sys.modules:
        import support

        support.clear_faults()
        support.close_engines()


@pytest.fixture
def small_options() -> ckpt.Options:
    """An arena that is touched in a moment, and chunks so small that any state has several."""
    import support

    return support.options()


@pytest.fixture
def native() -> Any:
    """The native module with its fault hooks; skips the test in a release build, which has none."""
    from ckpt import _native

    if not hasattr(_native, "set_fault"):
        pytest.skip("the native module was built without fault hooks (LAZYCKPT_BUILD=dev has them)")
    return _native


@pytest.fixture
def leaks_nothing() -> Iterator[Resources]:
    """The test must end with as many threads, open files and child processes as it began with; yields the beginning."""
    import support

    support.close_engines()
    before = support.resources()
    yield before
    support.clear_faults()
    support.close_engines()
    support.assert_no_leak(before)


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    """Commands as a user types them."""
    import command_line

    return command_line.Shell(capsys)


@pytest.fixture(scope="session")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the steps 1 to 3. To look at only."""
    import command_line

    directory = tmp_path_factory.mktemp("steps") / "run"
    command_line.save_steps(directory, 1, 2, 3)
    return directory


@pytest.fixture
def home(three_steps: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    import command_line

    return command_line.copied(three_steps, tmp_path / "home")
