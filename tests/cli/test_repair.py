"""A crash at each crash point, then `ckpt repair`: what was complete stands, and nothing else is there."""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import repair_child
import torch
from command_line import Shell, copied, in_use, save_steps, step_in, unname_manifest
from node_roots import Job
from nursery import Nursery, shared_nursery
from support import options
from test_crash import POINTS, Reference, assert_tidy, check, run_to_crash_point, save_once_more
from test_verify import flip, place_of

import ckpt
from ckpt.directory import late_names

pytestmark = pytest.mark.usefixtures("native")

# From here on all that makes the step a checkpoint is on disk.
COMPLETE = list(POINTS)[list(POINTS).index("manifest-written") :]


@pytest.fixture(scope="module")
def children() -> Iterator[Nursery]:
    with shared_nursery(optimizer=True) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def truth() -> Reference:
    return Reference()


def repair(shell: Shell, directory: Path) -> list[str]:
    """What was done. The dry run before it must say the same, and do nothing."""
    before = sorted(str(path) for path in directory.rglob("*"))
    said = shell.json("repair", directory)
    assert sorted(str(path) for path in directory.rglob("*")) == before and not said["done"]
    done = shell.json("repair", directory, "--yes")
    assert done["actions"] == said["actions"] and not done["failed"]
    assert shell.json("repair", directory)["actions"] == [], "once is enough"
    return [action["do"] for action in done["actions"]]


def crash_and_repair(
    point: str, skip: int, again: bool, directory: Path, shell: Shell, children: Nursery, truth: Reference
) -> int:
    """Returns the step that stands."""
    directory.mkdir()
    killed = run_to_crash_point(children, directory, steps=40, keep=2, again=again, crash_point=point, crash_skip=skip)
    repair(shell, directory)
    step = check(directory, truth, killed.durable)
    if step >= 0:
        assert_tidy(directory)
        assert (directory / "latest").read_text().strip() == f"step-{step:012d}"
    return step


@pytest.mark.parametrize("point", ["data-durable", "renamed", "prepared", *COMPLETE])
def test_a_crash_then_repair_then_restore(
    point: str, shell: Shell, children: Nursery, truth: Reference, tmp_path: Path
) -> None:
    step = crash_and_repair(point, 2 * POINTS[point], False, tmp_path / "run", shell, children, truth)
    if point != "removal-begun":  # which comes later than the third save
        assert step == 2 if point in COMPLETE else step < 2


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_all_crashes(point: str, again: bool, shell: Shell, children: Nursery, truth: Reference, tmp_path: Path) -> None:
    for skip in (0, POINTS[point] // 2, 2 * POINTS[point], 5 * POINTS[point] - 1):
        directory = tmp_path / f"skip-{skip}"
        step = crash_and_repair(point, skip, again, directory, shell, children, truth)
        if step >= 0:
            save_once_more(children, directory, truth, step)


def test_repair_is_killed_itself(shell: Shell, children: Nursery, truth: Reference, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    killed = run_to_crash_point(children, source, steps=40, keep=2, crash_point="manifest-written", crash_skip=3)
    (step_in(source, 90)).mkdir()
    for point in ("manifest-renamed", "latest-written", "latest-renamed", "removal-begun"):
        directory = copied(source, tmp_path / point)
        ended = children.run(f"import repair_child; repair_child.repair({str(directory)!r}, {point!r})")
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        shell("repair", directory, "--yes")
        assert check(directory, truth, killed.durable) == 3
        assert_tidy(directory)


BUNDLE_POINTS = {
    False: ("data-durable", "manifest-written", "manifest-renamed", "placed", "all-placed", "latest-written"),
    True: ("data-durable", "manifest-written", "all-placed", "bundle-exchanged", "bundle-named"),
}
CASES = [(named_last, point) for named_last, points in BUNDLE_POINTS.items() for point in points]


@pytest.mark.parametrize(("named_last", "point"), CASES)
def test_bundles(named_last: bool, point: str, shell: Shell, children: Nursery, tmp_path: Path) -> None:
    arguments = (str(tmp_path), "checkpoint-1", point, named_last)
    ended = children.run(f"import repair_child; repair_child.save_bundle_twice{arguments!r}")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    repair(shell, tmp_path)
    value = 1.0 if point == "data-durable" else 2.0
    for file in repair_child.FILES:
        assert torch.equal(torch.load(tmp_path / "checkpoint-1" / file)["w"], repair_child.content(value)["w"])
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    files = {f"checkpoint-1/{name}" for name in (*repair_child.FILES, "manifest.json")}
    assert left - {".names.lock"} == {".lock", "latest", "checkpoint-1", *files}
    assert (tmp_path / "latest").read_text() == "checkpoint-1"
    assert shell("verify", tmp_path).code == 0


# ---- what is left to a person ----------------------------------------------------------------------------------------


def leave(shell: Shell, directory: Path) -> str:
    """What is said of the one thing that is left alone; nothing of it is touched."""
    before = {str(path): path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != ".lock" and path.is_file()}
    document = shell.json("repair", directory, "--yes", code=1)
    assert {str(path): path.stat().st_mtime_ns for path in map(Path, before)} == before
    (action,) = [action for action in document["actions"] if action["do"] == "leave"]
    return str(action["why"])


def test_what_cannot_be_judged_is_left(shell: Shell, home: Path) -> None:
    (step_in(home, 2) / "manifest.json").write_text("{")
    assert "cannot be understood" in leave(shell, home)
    (step_in(home, 2) / "manifest.json").unlink()
    assert "no manifest.json" in leave(shell, home)
    assert (step_in(home, 2) / "state.pt").exists()


def test_damaged_bytes_are_not_finalised(shell: Shell, home: Path) -> None:
    aside = unname_manifest(step_in(home, 3))
    flip(step_in(home, 3) / "state.pt", place_of(step_in(home, 3) / "state.pt", "data/0"))
    said = shell("repair", home, "--yes")
    assert said.code == 1 and "about to be committed" in said.out and "data/0" in said.out
    assert aside.exists() and (step_in(home, 3) / "state.pt").exists(), "it is evidence"
    assert (home / "latest").read_text() == "step-000000000002\n", "which stands"


def test_a_number_that_is_taken_is_not_given_twice(shell: Shell, home: Path, tmp_path: Path) -> None:
    save_steps(tmp_path / "other", 7, 8, 9)
    shutil.copytree(step_in(tmp_path / "other", 9), step_in(home, 9))  # the third commit there, as step 3 is here
    unname_manifest(step_in(home, 9))
    said = shell.json("repair", home, "--yes", code=1)
    assert (step_in(home, 9) / "state.pt").exists()
    first = next(action for action in said["actions"] if action["path"].startswith(str(step_in(home, 9))))
    assert first["do"] == "leave" and "has its number" in first["why"]


def test_latest_names_the_newest(shell: Shell, home: Path) -> None:
    for wrong in ("step-000000000001\n", "nonsense", None):
        (home / "latest").unlink()
        if wrong is not None:
            (home / "latest").write_text(wrong)
        said = shell("repair", home, "--yes")
        assert said.code == 0 and "mend" in said.out and (home / "latest").read_text() == "step-000000000003\n"


def test_files_of_others_stay(shell: Shell, home: Path) -> None:
    for path in (home / "notes.txt", step_in(home, 2) / "notes.txt", home / ".tmp-mine", home / "plots" / "a.png"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert "nothing is to be mended" in shell("repair", home, "--yes").out
    assert (step_in(home, 2) / "notes.txt").exists() and (home / ".tmp-mine").exists() and (home / "plots" / "a.png").exists()


def test_a_replaced_bundle_gets_its_name_back(shell: Shell, tmp_path: Path) -> None:
    with ckpt.BundleCheckpointer(options=options()) as bundles:
        bundle = bundles.begin(tmp_path, "one")
        bundle.save({"w": torch.ones(2)}, tmp_path / "one" / "a.pt")
        bundle.commit().result()
    late_names.partial_of(tmp_path, "one").mkdir()
    (tmp_path / "one").rename(tmp_path / ".lazyckpt-one.replaced")
    repair(shell, tmp_path)
    assert shell.json("list", tmp_path)["checkpoints"][0]["name"] == "one"


def test_who_may_not(shell: Shell, home: Path, tmp_path: Path) -> None:
    with in_use(home):
        for words in ((), ("--yes",)):
            said = shell("repair", home, *words)
            assert said.code == 4 and "is being written to by process 1 on elsewhere" in said.err
    assert shell("repair", home).code == 0
    assert shell("repair", tmp_path / "nothing").code == shell("repair", step_in(home, 1)).code == 3
    (tmp_path / "job").mkdir()
    assert shell("repair", Job(tmp_path / "job").roots[0]).code == 1


def test_what_cannot_be_done_is_told(shell: Shell, home: Path, native: Any) -> None:
    (home / "latest").write_text("nonsense")
    native.set_fault("rename", "/latest", error=errno.EROFS)
    document = shell.json("repair", home, "--yes", code=5)
    assert list(document["failed"]) == [str(home / "latest")]
    native.clear_faults()
    assert shell("repair", home, "--yes").code == 0


def test_latest_does_not_name_what_could_not_be_finalised(shell: Shell, home: Path, native: Any) -> None:
    unname_manifest(step_in(home, 3))
    (home / "latest").write_text("step-000000000002\n")
    native.set_fault("rename", "step-000000000003/manifest.json", error=errno.EACCES)
    document = shell.json("repair", home, "--yes", code=5)
    assert {*document["failed"]} == {str(step_in(home, 3)), str(home / "latest")}
    assert (home / "latest").read_text() == "step-000000000002\n"
    native.clear_faults()
    assert repair(shell, home) == ["finalise", "mend"]


def test_nothing_is_finalised_through_a_link(shell: Shell, home: Path, tmp_path: Path) -> None:
    """Where it leads, another job may be about to give the manifest its name."""
    elsewhere = tmp_path / "elsewhere"
    step_in(home, 3).rename(elsewhere)
    aside = unname_manifest(elsewhere)
    step_in(home, 3).symlink_to(elsewhere)
    assert repair(shell, home) == ["mend"]
    assert aside.exists() and not (elsewhere / "manifest.json").exists()
    assert (home / "latest").read_text() == "step-000000000002\n"


def test_what_another_job_saves_below_is_left_alone(shell: Shell, home: Path, tmp_path: Path) -> None:
    """Above directories of several jobs nothing is mended in those: each has a lock of its own."""
    aside, parent = unname_manifest(step_in(home, 3)), home.parent
    begun = step_in(home, 2) / ".tmp-state.pt-00000000-1-000000000"
    begun.touch()
    with in_use(home):
        assert shell.json("repair", parent)["actions"] == []
    assert shell.json("repair", parent, "--yes")["actions"] == []
    assert aside.exists() and begun.exists()
    assert repair(shell, home) == ["remove", "finalise"] and not begun.exists()
