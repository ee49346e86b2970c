"""What Lightning links and removes while saves are in flight: never without a good one, and in the end as it has asked."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from ckpt.errors import DeadlineError
from ckpt.integrations.lightning.pending_paths import PendingPaths


class Desk:
    """PendingPaths in a directory, with saves that end when a test says so."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.noted: list[BaseException | None] = []
        self.paths = PendingPaths(lambda pending, error: self.noted.append(error), timeout_s=10.0)
        self._pending: dict[str, Future[Any]] = {}

    def at(self, name: str) -> str:
        return str(self.directory / name)

    def save(self, name: str) -> None:
        future: Future[Any] = Future()
        self._pending[name] = future
        self.paths.begin(self.at(name), lambda: future)

    def end(self, name: str, error: BaseException | None = None) -> None:
        """As the library does: it has its name, and then its result."""
        if error is None:
            Path(self.at(name)).write_text(f"saved as {name}")
            self._pending[name].set_result(self.at(name))
        else:
            self._pending[name].set_exception(error)

    def saved(self, *names: str) -> None:
        for name in names:
            self.save(name)
            self.end(name)

    def there(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_a_removal_waits_for_the_save_before_it(desk: Desk) -> None:
    desk.saved("1")
    desk.save("2")
    desk.paths.remove(desk.at("1"))
    assert desk.there() == {"1"}
    assert not desk.paths.exists(desk.at("1")) and desk.paths.exists(desk.at("2"))
    desk.end("2")
    desk.paths.wait()
    assert desk.there() == {"2"}
    desk.paths.remove(desk.at("2"))  # nothing is under way
    assert desk.there() == set()


def test_what_is_in_flight_itself_is_removed_behind_what_takes_its_place(desk: Desk) -> None:
    desk.save("1")
    desk.save("2")
    desk.paths.remove(desk.at("1"))
    desk.end("1")
    assert desk.there() == {"1"}
    desk.end("2")
    assert desk.there() == {"2"}


def test_one_that_ends_out_of_turn_goes_when_it_has_ended(desk: Desk) -> None:
    desk.save("1")
    desk.save("2")
    desk.paths.remove(desk.at("1"))
    desk.end("2")
    assert desk.there() == {"2"}
    desk.end("1")
    assert desk.there() == {"2"}


def test_the_newest_itself_is_removed_when_it_has_ended(desk: Desk) -> None:
    desk.save("1")
    desk.paths.remove(desk.at("1"))
    assert not desk.paths.exists(desk.at("1"))
    desk.end("1")
    assert desk.there() == set()


def test_what_a_failed_save_was_to_replace_stays_until_its_place_is_taken(desk: Desk) -> None:
    desk.saved("1")
    desk.save("2")
    desk.paths.remove(desk.at("1"))
    desk.end("2", OSError("full"))
    assert desk.there() == {"1"} and not desk.paths.exists(desk.at("2"))
    assert str(desk.paths.failure_of(desk.at("2"))) == "full"
    desk.save("3")  # in the place of 2
    desk.paths.remove(desk.at("2"))
    assert desk.there() == {"1"} and desk.paths.failure_of(desk.at("2")) is None
    desk.end("3")
    assert desk.there() == {"3"}
    assert [str(error) for error in desk.noted] == ["None", "full", "None"]


def test_it_stays_through_several_failures(desk: Desk) -> None:
    desk.saved("1")
    for before, name in (("1", "2"), ("2", "3"), ("3", "4")):
        desk.save(name)
        desk.paths.remove(desk.at(before))
        desk.end(name, OSError("full"))
        assert desk.there() == {"1"}
    desk.save("5")
    desk.paths.remove(desk.at("4"))
    desk.end("5")
    assert desk.there() == {"5"}


def test_it_goes_when_the_same_path_is_saved_after_all(desk: Desk) -> None:
    desk.saved("1")
    desk.save("2")
    desk.paths.remove(desk.at("1"))
    desk.end("2", OSError("full"))
    desk.save("2")
    assert desk.there() == {"1"} and desk.paths.failure_of(desk.at("2")) is None
    desk.end("2")
    assert desk.there() == {"2"}


def test_a_removal_behind_a_failure_that_is_known_waits_too(desk: Desk) -> None:
    desk.saved("1")
    desk.save("2")
    desk.end("2", OSError("full"))
    desk.paths.remove(desk.at("1"))
    assert desk.there() == {"1"}
    desk.paths.remove(desk.at("2"))
    assert desk.there() == {"1"}
    desk.saved("2")
    assert desk.there() == {"2"}


def test_a_name_that_is_used_again_is_not_removed_behind_its_new_owner(desk: Desk) -> None:
    desk.saved("1")
    desk.save("2")
    desk.paths.remove(desk.at("1"))
    desk.save("1")
    desk.end("2")
    desk.end("1")
    assert desk.there() == {"1", "2"} and desk.paths.exists(desk.at("1"))


def test_a_directory_loses_its_name_before_anything_in_it_goes(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = desk.directory / "sharded"
    whole.mkdir()
    (whole / "meta.pt").write_text("")
    from ckpt.integrations.lightning import pending_paths

    seen: list[set[str]] = []
    monkeypatch.setattr(pending_paths.names, "remove", lambda path: seen.append({"sharded"} & desk.there()))
    desk.paths.remove(str(whole))
    assert seen == [set()]


def test_a_link_is_made_when_what_it_leads_to_is_durable(desk: Desk) -> None:
    desk.saved("1")
    desk.paths.link(desk.at("last"), desk.at("1"))
    assert os.readlink(desk.at("last")) == "1"
    desk.save("2")
    desk.paths.link(desk.at("last"), desk.at("2"))
    assert os.readlink(desk.at("last")) == "1" and desk.paths.exists(desk.at("last"))
    desk.end("2")
    assert os.readlink(desk.at("last")) == "2"
    desk.save("3")
    desk.paths.link(desk.at("last"), desk.at("3"))
    desk.end("3", OSError("full"))
    desk.paths.link(desk.at("last"), desk.at("3"))  # and one that comes later
    assert os.readlink(desk.at("last")) == "2"


def test_a_link_that_was_removed_meanwhile_is_not_made(desk: Desk) -> None:
    desk.save("1")
    desk.paths.link(desk.at("last"), desk.at("1"))
    desk.paths.remove(desk.at("last"))
    assert not desk.paths.exists(desk.at("last"))
    desk.end("1")
    assert desk.there() == {"1"}


def test_wait_returns_when_all_is_done_behind_the_saves(desk: Desk) -> None:
    desk.saved("1")
    desk.save("2")
    desk.paths.remove(desk.at("1"))
    waiting = threading.Thread(target=desk.paths.wait)
    waiting.start()
    desk.end("2")
    waiting.join(10)
    assert not waiting.is_alive() and desk.there() == {"2"}


def test_wait_has_a_deadline(tmp_path: Path) -> None:
    paths = PendingPaths(lambda pending, error: None, timeout_s=0.01)
    paths.begin(str(tmp_path / "1"), Future)
    with pytest.raises(DeadlineError, match="still in flight after"):
        paths.wait()


def test_a_save_that_cannot_be_begun_changes_nothing(desk: Desk) -> None:
    desk.saved("1")
    desk.save("2")
    desk.paths.remove(desk.at("1"))

    def refuse() -> Any:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        desk.paths.begin(desk.at("1"), refuse)
    desk.end("2")
    assert desk.there() == {"2"}


FULL = OSError("full")


def late_removal(desk: Desk) -> None:
    desk.save("2")
    desk.paths.remove(desk.at("1"))
    desk.end("2", FULL)
    desk.saved("3")
    desk.paths.remove(desk.at("2"))


def removal_of_what_is_in_flight(desk: Desk) -> None:
    desk.save("2")
    desk.paths.remove(desk.at("1"))
    desk.save("3")
    desk.paths.remove(desk.at("2"))
    desk.end("2", FULL)
    desk.end("3")


def out_of_turn(desk: Desk) -> None:
    desk.save("2")
    desk.paths.remove(desk.at("1"))
    desk.save("3")
    desk.paths.remove(desk.at("2"))
    desk.end("3")
    desk.end("2", FULL)


def given_up_in_flight(desk: Desk) -> None:
    desk.save("2")
    desk.paths.remove(desk.at("1"))
    desk.paths.remove(desk.at("2"))
    desk.end("2", FULL)
    assert desk.there() == {"1"}
    desk.saved("3")


def given_up_when_it_has_failed(desk: Desk) -> None:
    desk.save("2")
    desk.end("2", FULL)
    desk.paths.remove(desk.at("1"))
    desk.paths.remove(desk.at("2"))
    assert desk.there() == {"1"}
    desk.saved("3")


@pytest.mark.parametrize(
    "fail_once",
    [late_removal, removal_of_what_is_in_flight, out_of_turn, given_up_in_flight, given_up_when_it_has_failed],
)
def test_nothing_is_left_for_good_by_one_save_that_failed(fail_once: Callable[[Desk], None], desk: Desk) -> None:
    desk.saved("1")
    fail_once(desk)
    assert desk.there() == {"3"}
