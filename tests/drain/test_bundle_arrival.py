"""Bundles that a drain brings home, where names are fixed: killed at each point, a tag is the old one or the new one."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
import zlib
from pathlib import Path

import pytest
from node_roots import Job, crash_at, drain_once, drain_well, fault

from ckpt.directory import bundles
from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.directory.step_names import numbered_name, step_name
from ckpt.drain.bundle_arrival import has_settled

pytestmark = pytest.mark.usefixtures("native")

NAMES = ("model_states.pt", "optim_states.pt")
BEFORE = ("drain-inbox-renamed", "drain-named", "drain-delivered", "drain-plan-written", "drain-placed", "drain-all-placed")
DECIDED = ("manifest-renamed", "placed", "drain-published", "drain-discarded")
POINTS = (*BEFORE, "manifest-written", *DECIDED)
NO_LINKS = fault("link", errno.EPERM, count=-1)


class Bundles(Job):
    """Of one node."""

    def __init__(self, base: Path) -> None:
        super().__init__(base, home_every={"steps": 1})
        self.contents: dict[int, dict[str, bytes]] = {}  # by sequence

    def put(self, tag: str, text: str, moves_latest: bool = True, created: str = "") -> int:
        """Complete on the node; its number."""
        self.sequence += 1
        content = {name: f"{name} of {text}".encode() * 1000 for name in NAMES}
        directory = self.roots[0] / step_name(self.sequence)
        directory.mkdir()
        files = []
        for number, (called, held) in enumerate(content.items(), 1):
            name = numbered_name("rank-00000", number)
            (directory / name).write_bytes(held)
            files.append(FileEntry(name, len(held), zlib.crc32(held), called=called))
        made = created or f"2026-01-01T00:00:{self.sequence:02d}+00:00"
        manifest = Manifest(7, self.sequence, 1, tuple(files), made, bundle=tag, moves_latest=moves_latest)
        (directory / manifests.NAME).write_bytes(manifest.to_json())
        self.contents[self.sequence] = content
        return self.sequence

    def drain(self) -> None:
        drain_well(self.roots[0])

    def kill_at(self, point: str, prepare: str = "pass", skip: int = 0) -> None:
        ended = drain_once(self.roots[0], prepare=f"{prepare}; {crash_at(point, skip)}")
        assert ended.returncode == -signal.SIGKILL, f"it never came to {point}: {ended.stderr}"

    def at_home(self) -> dict[str, int]:
        """Of each tag the number of the commit that it is, to the byte, for whoever looks now."""
        bundles.complete_all(self.home)
        found = {}
        for directory, manifest in bundles.committed_in(self.home):
            content = {name: (directory / name).read_bytes() for name in manifests.names(manifest.files)}
            assert content == self.contents[manifest.sequence], f"{directory} is not what was saved"
            found[directory.name] = manifest.sequence
        return found

    def assert_tidy(self) -> None:
        """Nothing is there but whole tags."""
        for directory, _ in bundles.committed_in(self.home):
            assert {*os.listdir(directory)} == {*NAMES, manifests.NAME}
        assert [*self.home.glob(".tmp-*"), *self.home.glob(".drain/*/*")] == []

    def latest(self) -> str | None:
        return bundles.read_latest(self.home)


@pytest.mark.parametrize("point", ["manifest-renamed", "placed", "latest-renamed"])
def test_a_tag_has_settled_once_all_names_are_right(point: str, tmp_path: Path) -> None:
    """Who is told that it is home opens its files, and what `latest` names."""
    job = Bundles(tmp_path)
    job.put("before", "before")
    job.drain()
    new = job.put("tag", "new")
    job.kill_at(point)
    assert manifests.is_at(job.home / "tag", new)
    assert has_settled(job.home, "tag", new, moves_latest=True) == (point == "latest-renamed")
    job.drain()
    assert has_settled(job.home, "tag", new, moves_latest=True)
    aside = job.put("aside", "aside", moves_latest=False)
    job.drain()
    assert has_settled(job.home, "aside", aside, moves_latest=False)
    assert not has_settled(job.home, "aside", new, moves_latest=False)


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_a_tag_is_replaced(point: str, tmp_path: Path) -> None:
    job = Bundles(tmp_path)
    old = job.put("tag", "old")
    job.drain()
    assert (job.at_home(), job.latest()) == ({"tag": old}, "tag")
    new = job.put("tag", "new")
    job.kill_at(point)
    assert job.at_home() == {"tag": new if point in DECIDED else old}
    job.drain()
    assert (job.at_home(), job.latest(), job.state(new)) == ({"tag": new}, "tag", "committed")
    job.assert_tidy()


@pytest.mark.parametrize("point", ["latest-written", "latest-renamed"])
def test_killed_while_latest_moves(point: str, tmp_path: Path) -> None:
    job = Bundles(tmp_path)
    numbers = {"one": job.put("one", "old")}
    job.drain()
    numbers["two"] = job.put("two", "new")
    job.kill_at(point)
    assert (job.at_home(), job.latest()) == (numbers, "one" if point == "latest-written" else "two")
    job.drain()
    assert (job.at_home(), job.latest()) == (numbers, "two")
    job.assert_tidy()


@pytest.mark.parametrize("point", ["drain-placed", "drain-all-placed", "manifest-renamed", "placed"])
def test_killed_where_there_are_no_links(point: str, tmp_path: Path) -> None:
    job = Bundles(tmp_path)
    job.put("one", "old")
    job.drain()
    number = job.put("two", "new")
    job.kill_at(point, NO_LINKS)
    assert job.latest() == "one"
    ended = drain_once(job.roots[0], prepare=NO_LINKS)
    assert ended.returncode == 0, ended.stderr
    assert (job.at_home()["two"], job.latest()) == (number, "two")
    job.assert_tidy()


def test_all_tags_come_home_and_latest_is_the_newest_that_moves_it(tmp_path: Path) -> None:
    job = Bundles(tmp_path)
    numbers = {tag: job.put(tag, tag) for tag in ("a", "b", "c", "d")}
    numbers["best"] = job.put("best", "best", moves_latest=False)
    job.put("e", "old")
    numbers["e"] = job.put("e", "new")
    job.drain()
    assert (job.at_home(), job.latest()) == (numbers, "e")
    job.assert_tidy()


def test_a_tag_that_is_saved_again_and_again_does_not_fill_the_node(tmp_path: Path) -> None:
    """What is older of the same tag is not wanted any more. Other tags are."""
    job = Bundles(tmp_path)
    other = job.put("other", "other")
    for number in range(6):
        job.put("tag", f"{number}")
    job.drain()
    assert job.at_home() == {"other": other, "tag": job.sequence}
    states = [job.state(number + 1) for number in range(job.sequence)]
    assert states == ["committed", *["superseded"] * 5, "committed"]
    assert len(job.steps_on()) == 2
    job.assert_tidy()


def test_a_tag_whose_files_are_lost_is_not_superseded_by_another_one(tmp_path: Path) -> None:
    """It never comes home, and who waits for it has to know."""
    job = Bundles(tmp_path)
    lost = job.put("lost", "lost")
    job.kill_at("drain-inbox-renamed")
    shutil.rmtree(job.roots[0] / step_name(lost))
    other = job.put("other", "other")
    assert drain_once(job.roots[0]).returncode == 0
    assert (job.at_home(), job.state(lost)) == ({"other": other}, "failed")
    journal = job.journal(lost)
    assert journal is not None and "not on the node any more" in journal.text

    again = job.put("again", "old")
    job.kill_at("drain-inbox-renamed")
    shutil.rmtree(job.roots[0] / step_name(again))
    job.put("again", "new")
    assert drain_once(job.roots[0]).returncode == 0
    assert job.state(again) == "superseded"


@pytest.mark.parametrize("point", ["drain-delivered", "drain-placed"])
def test_a_job_has_saved_the_tag_again_straight_home(point: str, tmp_path: Path) -> None:
    """While the drain had delivered it, or was about to commit it."""
    job = Bundles(tmp_path)
    late = job.put("tag", "late")
    job.kill_at(point)
    job.sequence += 10
    directory = job.home / "tag"
    directory.mkdir(exist_ok=True)
    content = {name: f"{name} straight".encode() for name in NAMES}
    for name, held in content.items():
        (directory / name).write_bytes(held)
    for path in directory.glob(".tmp-*"):  # as a job does that claims home
        path.unlink()
    files = tuple(FileEntry(name, len(held), zlib.crc32(held)) for name, held in content.items())
    (directory / manifests.NAME).write_bytes(Manifest(7, job.sequence, 1, files).to_json())
    job.contents[job.sequence] = content
    job.drain()
    assert (job.at_home(), job.state(late)) == ({"tag": job.sequence}, "superseded")
    job.assert_tidy()


def test_latest_never_goes_back(tmp_path: Path) -> None:
    """What a job has saved straight home meanwhile is newer; so may be what another program has put there."""
    job = Bundles(tmp_path)
    old, new = job.put("old", "old"), job.put("new", "new")
    late = job.roots[0].with_name("late")
    (job.roots[0] / step_name(old)).rename(late)
    job.drain()
    late.rename(job.roots[0] / step_name(old))
    job.drain()
    assert (job.at_home(), job.latest()) == ({"old": old, "new": new}, "new")

    foreign = job.home / "foreign"
    foreign.mkdir()
    (job.home / "latest").write_text("foreign")
    job.put("older", "older")
    job.drain()
    assert job.latest() == "foreign"
    os.utime(job.home / "latest", (time.time() - 10**9,) * 2)
    job.put("newer", "newer")
    job.drain()
    assert job.latest() == "newer"
