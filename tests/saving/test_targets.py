"""What stands at the path of a save decides: it is replaced, kept as it is, or refused with words that help."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, options
from test_ranks_apart import PATIENT

import ckpt
from ckpt.errors import MismatchError, StorageError
from ckpt.integrations.torch import CheckpointCallback

STATE = {"weights": torch.arange(50_000), "step": 3}
SMALL = options()
NOBODY = 65534


# ---- what is no regular file -----------------------------------------------------------------------------------------


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_device(path: Path) -> None:
    """Another /dev/null."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root may make devices")


NODES = {"FIFO": make_fifo, "socket": make_socket, "device": make_device}


@contextmanager
def nothing_changes_in(directory: Path) -> Iterator[None]:
    def found() -> list[tuple[str, int, int]]:
        return sorted((path.name, os.lstat(path).st_ino, os.lstat(path).st_mode) for path in directory.iterdir())

    before = found()
    yield
    assert found() == before


@pytest.mark.parametrize("through_link", [False, True], ids=["itself", "link"])
@pytest.mark.parametrize("kind", NODES)
def test_a_save_does_not_replace_it(kind: str, through_link: bool, tmp_path: Path) -> None:
    target = tmp_path / "node"
    NODES[kind](target)
    if through_link:
        (tmp_path / "link").symlink_to("node")
    with nothing_changes_in(tmp_path), pytest.raises(StorageError, match=f"node'.*{kind}") as caught:
        ckpt.save(STATE, tmp_path / ("link" if through_link else "node"), options=SMALL)
    assert caught.value.filename == str(target)


@pytest.mark.parametrize("through_link", [False, True], ids=["itself", "link"])
@pytest.mark.parametrize("kind", NODES)
def test_a_bundle_does_not_replace_it(kind: str, through_link: bool, tmp_path: Path) -> None:
    directory = tmp_path / "a"
    directory.mkdir()
    NODES[kind](directory / "node")
    if through_link:
        (directory / "link").symlink_to("node")
    with closing(ckpt.BundleCheckpointer(options=options(max_failed_saves=0, **PATIENT), coordinator="local")) as saver:
        with nothing_changes_in(directory):
            bundle = saver.begin(tmp_path, "a")
            bundle.save(STATE, directory / "other.pt")
            bundle.save(STATE, directory / ("link" if through_link else "node"))
            error = bundle.commit().exception(60)
        assert isinstance(error, StorageError) and kind in str(error)
        with pytest.raises(StorageError):
            saver.wait()
        bundle = saver.begin(tmp_path, "b")
        bundle.save(STATE, tmp_path / "b" / "model.pt")
        bundle.commit().result(60)
    assert_same(STATE, torch.load(tmp_path / "b" / "model.pt"))


LOADS: dict[str, Callable[[Path], Any]] = {
    "load": ckpt.load,
    "part": lambda path: ckpt.load(path, keys="step"),
    "load_into": lambda path: ckpt.load_into(path, dict(STATE)),
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("kind", NODES)
def test_it_is_not_loaded(kind: str, load: str, tmp_path: Path) -> None:
    """A FIFO that nobody writes to would be waited for for ever."""
    path = tmp_path / "node"
    NODES[kind](path)
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            LOADS[load](path)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    if thread.is_alive():
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # lets it go
        thread.join(20)
        pytest.fail("it hangs")
    assert isinstance(outcome[0], StorageError) and not isinstance(outcome[0], MismatchError)
    assert kind in str(outcome[0]) and str(path) in str(outcome[0])


def test_one_that_took_the_place_of_a_state_is_passed_over(tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, options=SMALL) as checkpointer:
        checkpointer.save(1, STATE).result(60)
        newest = checkpointer.save(2, STATE).result(60) / "state.pt"
        newest.unlink()
        os.mkfifo(newest)
        found = checkpointer.restore()
        assert found is not None and found.step == 1
        assert_same(STATE, found.state)


# ---- paths that cannot be ------------------------------------------------------------------------------------------

LONG_NAME = "n" * 256
LONG_PATH = "/".join(["d" * 200] * 21)


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with nothing_changes_in(tmp_path), pytest.raises(StorageError, match=r"256 bytes.*255.*shorter name") as caught:
        ckpt.save(STATE, tmp_path / LONG_NAME, options=SMALL)
    assert caught.value.errno == errno.ENAMETOOLONG
    longest = tmp_path / ("n" * 255)
    ckpt.save(STATE, longest, options=SMALL).result(60)
    assert_same(STATE, torch.load(longest))


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"4095.*shorter") as caught:
        ckpt.save(STATE, tmp_path / LONG_PATH / "model.pt", options=SMALL)
    assert caught.value.errno == errno.ENAMETOOLONG


def test_a_path_with_a_zero_byte(tmp_path: Path) -> None:
    """The kernel would take what is before it."""
    with nothing_changes_in(tmp_path), pytest.raises(ValueError, match="null"):
        ckpt.save(STATE, tmp_path / "a\0b", options=SMALL)
    with nothing_changes_in(tmp_path), pytest.raises(ValueError, match="null"):
        ckpt.Checkpointer(tmp_path / "a\0b", options=SMALL)


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with nothing_changes_in(tmp_path), pytest.raises(StorageError, match=r"one'.*circle"):
        ckpt.save(STATE, tmp_path / "one", options=SMALL)


def test_a_link_to_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    """As torch.save: the file is made where it leads."""
    (tmp_path / "link.pt").symlink_to("model.pt")
    assert ckpt.save(STATE, tmp_path / "link.pt", options=SMALL).result(60) == tmp_path / "model.pt"
    assert (tmp_path / "link.pt").is_symlink()
    assert_same(STATE, torch.load(tmp_path / "link.pt"))


def test_a_directory_of_the_path_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"file'.*not a directory"):
        ckpt.save(STATE, tmp_path / "file" / "model.pt", options=SMALL)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_of_the_path_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"missing'.*does not exist.*make it") as caught:
        ckpt.save(STATE, tmp_path / "missing" / "model.pt", options=SMALL)
    assert caught.value.errno == errno.ENOENT


def make_checkpointer(directory: Path) -> None:
    ckpt.Checkpointer(directory, options=SMALL)


def make_callback(directory: Path) -> None:
    CheckpointCallback(directory, model=torch.nn.Linear(2, 2), options=SMALL)


def make_bundle(directory: Path) -> None:
    with closing(ckpt.BundleCheckpointer(options=SMALL, coordinator="local")) as saver:
        saver.begin(directory, "a")


OPENERS: dict[str, Callable[[Path], None]] = {
    "Checkpointer": make_checkpointer,
    "callback": make_callback,
    "bundle": make_bundle,
}
opened_by = pytest.mark.parametrize("opener", OPENERS)


@opened_by
def test_a_directory_that_is_a_link_to_nowhere(opener: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with nothing_changes_in(tmp_path), pytest.raises(StorageError, match=r"link'.*link to '.*nowhere', which does not exist"):
        OPENERS[opener](tmp_path / "link")
    with nothing_changes_in(tmp_path), pytest.raises(StorageError, match=r"link'.*link to '.*nowhere', which does not exist"):
        OPENERS[opener](tmp_path / "link" / "below")


@opened_by
def test_a_directory_that_is_a_file(opener: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with nothing_changes_in(tmp_path), pytest.raises(StorageError, match=r"file' is a regular file, not a directory"):
            OPENERS[opener](directory)
    assert (tmp_path / "file").read_text() == "mine"


@opened_by
def test_nobody_is_told_to_take_away_what_is_not_ours(opener: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for path in (Path("/dev/full"), tmp_path / "file", tmp_path / "link"):
        with pytest.raises(StorageError, match="choose another path") as caught:
            OPENERS[opener](path)
        assert "remove" not in str(caught.value)


def test_a_file_system_that_takes_no_new_files() -> None:
    with pytest.raises(StorageError, match=r"'/proc/.*No such file.*no files can be made in its directory.*save elsewhere"):
        ckpt.save(STATE, "/proc/model.pt", options=SMALL).result(60)
    with pytest.raises(StorageError, match=r"'/proc/run'.*no files can be made in its directory"):
        ckpt.Checkpointer("/proc/run", options=SMALL).save(1, STATE).result(60)


@opened_by
def test_a_directory_with_a_name_too_long(opener: str, tmp_path: Path) -> None:
    with nothing_changes_in(tmp_path), pytest.raises(StorageError, match=r"256 bytes.*255") as caught:
        OPENERS[opener](tmp_path / LONG_NAME)
    assert caught.value.errno == errno.ENAMETOOLONG
    with nothing_changes_in(tmp_path), pytest.raises(StorageError, match="4095"):
        OPENERS[opener](tmp_path / LONG_PATH)


def test_what_keeps_a_directory_from_being_made_is_seen_early(tmp_path: Path) -> None:
    """Although only the first save makes it."""
    with nothing_changes_in(tmp_path), pytest.raises(StorageError, match=r"256 bytes.*255"):
        make_checkpointer(tmp_path / "missing" / LONG_NAME)
    tmp_path.chmod(0o555)
    refused = pytest.raises(StorageError, match=r"missing.*permissions")
    with as_nobody(tmp_path / "missing"), nothing_changes_in(tmp_path), refused as caught:
        make_checkpointer(tmp_path / "missing" / "below")
    assert caught.value.errno == errno.EACCES


@contextmanager
def as_nobody(directory: Path) -> Iterator[None]:
    """Root may enter everything."""
    if os.geteuid() != 0:
        yield
        return
    for path in directory.parents:
        if path.stat().st_mode & 0o005 != 0o005:
            path.chmod(path.stat().st_mode | 0o055)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@opened_by
def test_a_directory_that_cannot_be_entered(opener: str, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o600)
    try:
        with as_nobody(closed):
            for directory in (closed, closed / "below"):
                with pytest.raises(StorageError, match=r"closed.*permissions") as caught:
                    OPENERS[opener](directory)
                assert caught.value.errno == errno.EACCES
            with pytest.raises(StorageError, match=r"closed.*permissions"):
                ckpt.save(STATE, closed / "model.pt", options=SMALL)
    finally:
        closed.chmod(0o700)
    assert list(closed.iterdir()) == []
