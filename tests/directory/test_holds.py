"""What stays at home for an object store, as whoever removes steps reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt.directory import holds
from ckpt.directory.going_back import GoingBack
from ckpt.directory.holds import FOLDER, Holds, held_at
from ckpt.directory.manifest import NAME, FileEntry, Manifest
from ckpt.directory.run_file import write_run
from ckpt.drain.remote_place import release_unused


def saved(*steps: int) -> list[Manifest]:
    """Newest first; sequences are ten times the step."""
    return [Manifest(step, 10 * step, 1, (FileEntry("state.pt", 1, 1),)) for step in sorted(steps, reverse=True)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    made = tmp_path / FOLDER / "one"
    made.mkdir(parents=True)
    return made


def test_what_is_held_and_what_may_be_wanted(place: Path) -> None:
    home, there = place.parent.parent, saved(1, 2, 3, 4, 5, 6)
    assert held_at(home, there) == set()
    holds.write(place, Holds((10, 20, 30), (10,)))
    assert held_at(home, there) == {10}
    holds.write(place, Holds((10, 20, 30), (10, 20), every_steps=2))
    assert held_at(home, there) == {10, 40, 60}, "three at most: the one on its way, and the newest"
    holds.write(place, Holds((10, 20, 30), (99, 20), every_steps=2))
    assert held_at(home, there) == {20, 40, 60}
    holds.write(place, Holds((10, 20, 30, 40), all_others=True))
    assert held_at(home, there) == {50, 60}
    assert holds.read(place) == Holds((10, 20, 30, 40), all_others=True)


def test_what_comes_late_is_wanted_as_if_it_had_come_in_time(place: Path) -> None:
    """Nodes bring home what a rule wants, although newer ones are there already."""
    home, there = place.parent.parent, saved(1, 2, 3, 4)
    holds.write(place, Holds((40, 30), every_steps=2))
    assert held_at(home, there) == {20}
    holds.write(place, Holds((40, 30), all_others=True))
    assert held_at(home, there) == {10, 20}


def test_each_place_has_its_own(place: Path) -> None:
    other = place.with_name("two")
    other.mkdir()
    holds.write(place, Holds((10, 20, 30), (10,)))
    holds.write(other, Holds((10, 20, 30), (20,)))
    assert held_at(place.parent.parent, saved(1, 2, 3)) == {10, 20}


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"held": 1}', '{"decided": [1], "held": [], "more": 1}', "\udcff"])
def test_what_cannot_be_understood_holds_nothing(place: Path, content: str) -> None:
    (place / holds.NAME).write_bytes(content.encode(errors="surrogateescape"))
    assert holds.read(place) == Holds() and held_at(place.parent.parent, saved(1, 2)) == set()


def test_a_home_without_one(tmp_path: Path) -> None:
    assert held_at(tmp_path, saved(1)) == set()
    holds.write(tmp_path / "gone", Holds((1,)))


def test_who_goes_back_to_a_step_does_not_let_go_of_it_for_others(tmp_path: Path) -> None:
    """An evaluation, or another node, goes back to the same step, and ends first."""
    (step,) = saved(3)
    directory = tmp_path / "step-000000000003"
    directory.mkdir()
    (directory / NAME).write_bytes(step.to_json())
    write_run(tmp_path, "run")
    training, node, evaluation = (GoingBack(tmp_path, leads=leads) for leads in (True, False, True))
    for each in (training, node, evaluation):
        each.hold_step(3)
    evaluation.pin(step.sequence)
    for each in (evaluation, node):
        assert held_at(tmp_path, [step]) == {step.sequence}
        each.release()
    assert held_at(tmp_path, [step]) == {step.sequence}
    release_unused(tmp_path, None, training.places)
    assert held_at(tmp_path, [step]) == {step.sequence}
    training.release()
    assert held_at(tmp_path, [step]) == set() and not [*(tmp_path / FOLDER).iterdir()]


def test_what_a_killed_job_had_gone_back_to_goes_with_the_next_claim(tmp_path: Path) -> None:
    (step,) = saved(3)
    write_run(tmp_path, "run")
    GoingBack(tmp_path, leads=True).pin(step.sequence)
    assert held_at(tmp_path, [step]) == {step.sequence}
    release_unused(tmp_path, None)
    assert held_at(tmp_path, [step]) == set() and not [*(tmp_path / FOLDER).iterdir()]
