"""ckpt.names: directories that get their names when they are complete, links, and what killed processes have left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import PYTHONPATH

from ckpt import names
from ckpt.errors import StorageError
from ckpt.storage import exchange


def make(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_a_directory_gets_its_name_and_the_one_before_goes(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(exchange, "_renameat2", lambda: None)
    final = tmp_path / "saved"
    for content in ("first", "second"):
        hidden = make(names.hidden_directory(final), content)
        names.name_directory(hidden, final)
        assert (final / "file").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_at_no_time_is_there_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = make(tmp_path / "saved", "old")
    if not exchange.exchange(make(tmp_path / "a", "a"), make(tmp_path / "b", "b")):
        pytest.skip("this file system cannot exchange two names")
    assert (tmp_path / "a" / "file").read_text() == "b"
    seen = []
    real = exchange.durable.give_name
    monkeypatch.setattr(exchange.durable, "give_name", lambda *paths: (seen.append(paths), real(*paths)))
    names.name_directory(make(names.hidden_directory(final), "new"), final)
    assert seen == [] and (final / "file").read_text() == "new"


def test_an_exchange_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot exchange") as caught:
        exchange.exchange(tmp_path / "not there", make(tmp_path / "there", ""))
    assert caught.value.errno == errno.ENOENT


def test_a_link_replaces_what_has_its_name(tmp_path: Path) -> None:
    target = make(tmp_path / "target", "content")
    (tmp_path / "file").write_text("old")
    make(tmp_path / "directory", "old")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "directory", "link", "new"):
        names.replace_link(tmp_path / name, target)
        assert os.readlink(tmp_path / name) == "target"
        assert (tmp_path / name / "file").read_text() == "content"
    assert len(list(tmp_path.iterdir())) == 5
    with pytest.raises(StorageError, match="cannot link"):
        names.replace_link(tmp_path / "no directory" / "link", target)


def test_what_goes_loses_its_name_first_and_links_go_as_links(tmp_path: Path) -> None:
    saved = make(tmp_path / "saved", "content")
    (tmp_path / "link").symlink_to("saved")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        names.remove(tmp_path / name)
    assert (saved / "file").exists() and len(list(tmp_path.iterdir())) == 1
    retired = names.retire(saved)
    assert retired is not None and not saved.exists() and (retired / "file").exists()
    names.remove(retired)
    assert list(tmp_path.iterdir()) == [] and names.retire(saved) is None
    names.remove(saved)


LEAVE = """
import sys
from pathlib import Path
from ckpt import names
hidden = names.hidden_directory(Path(sys.argv[1]))
hidden.mkdir()
(hidden / "file").write_text("half")
print(hidden.name)
"""


def test_what_a_killed_process_has_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVE, str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": PYTHONPATH})
    own = make(names.hidden_directory(tmp_path / "saved"), "on its way")
    make(tmp_path / "other", "not ours")
    assert (tmp_path / done.stdout.strip() / "file").exists()
    names.remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {own.name, "other"}
    names.remove_abandoned(tmp_path / "not there")


REPLACE = """
import os, sys
from pathlib import Path
from ckpt import names
from ckpt.storage import exchange
final = Path(sys.argv[1])
hidden = names.hidden_directory(final)
hidden.mkdir()
exchange._renameat2 = lambda: None
rename = exchange.durable.give_name
exchange.durable.give_name = lambda one, other: os._exit(0) if other == final else rename(one, other)
names.name_directory(hidden, final)
"""


def test_what_had_the_name_gets_it_back_if_nothing_took_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill came between the two renames of a file system that cannot exchange names; or the second one has failed."""
    final = make(tmp_path / "saved", "old")
    command = [sys.executable, "-c", REPLACE, str(final)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": PYTHONPATH})
    assert not final.exists() and len(list(tmp_path.iterdir())) == 2
    names.remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"] and (final / "file").read_text() == "old"
    monkeypatch.setattr(exchange, "_renameat2", lambda: None)
    with pytest.raises(StorageError):
        names.name_directory(make(tmp_path / "new", "new") / "not there", final)
    assert (final / "file").read_text() == "old"
