"""What stays at home for an object store, as whoever removes steps reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt.directory import holds
from ckpt.directory.holds import FOLDER, Holds, held_at
from ckpt.directory.manifest import FileEntry, Manifest


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
