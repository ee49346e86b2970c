"""What is half-written, of others, or nothing at all, given to each command that looks for a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Shell, step_in

COMMANDS = {
    "list {}": 3,
    "show {}": 0,  # its files
    "verify {}": 3,
    "diff {} {home}": 3,
    "export {} -o {out} --format pt": 3,
    "copy {} {out}": 3,
    "status {}": 3,
}


def half(home: Path) -> tuple[Path, str]:
    step_in(home, 4).mkdir()
    (step_in(home, 4) / ".tmp-state.pt-00000000-1-000000000").write_bytes(b"half")
    return step_in(home, 4), "not committed"


def lost(home: Path) -> tuple[Path, str]:
    (step_in(home, 3) / "manifest.json").unlink()
    return step_in(home, 3), "no manifest.json"


def foreign(home: Path) -> tuple[Path, str]:
    (home.parent / "notes").mkdir()
    (home.parent / "notes" / "a.txt").write_text("text")
    return home.parent / "notes", "holds no checkpoint"


@pytest.mark.parametrize("make", [half, lost, foreign])
def test_what_is_no_checkpoint_is_told_as_what_it_is(make: object, shell: Shell, home: Path, tmp_path: Path) -> None:
    assert callable(make)
    path, text = make(home)
    for line, code in COMMANDS.items():
        words = line.format(path, home=home, out=tmp_path / "out").split()
        said = shell(*words)
        # What has a name as weights have is compared and exported, whoever has made it, if it is named itself.
        expected = 1 if make is lost and words[0] == "diff" else code
        assert said.code == expected, f"{line}: {said}"
        if words[0] in ("verify", "export", "copy"):
            assert str(path) in said.err and ("holds no" in said.err), said.err
            assert text in said.err or make is foreign
        document = shell.json(*words, code=expected)
        assert ("error" in document) == (words[0] in ("diff", "verify", "export", "copy") and expected == 3)
    assert not (tmp_path / "out").exists()


def test_what_changes_a_directory_leaves_that_of_others(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for words in (("repair", tmp_path, "--yes"), ("prune", tmp_path, "--keep", "1", "--yes")):
        assert shell(*words).code in (0, 3)
    assert (tmp_path / "a.txt").read_text() == "text"
    (tmp_path / "file").write_text("text")
    for words in (("repair", tmp_path / "file"), ("prune", tmp_path / "file", "--keep", "1"), ("status", tmp_path / "file")):
        assert shell(*words).code == 3
    assert shell("copy", tmp_path / "file", tmp_path / "t").code == 3
