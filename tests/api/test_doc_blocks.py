"""The code in README and in the pages of docs/ does what it says there."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dist.trainer_nursery import TrainerNursery
from doc_pages import blocks_of, commands_of, pages
from nursery import Child, Nursery, shared_nursery
from places import ROOT
from sources import each
from support import patience
from test_node_saves import end_drains

LANGUAGES = {"before", "json", "python", "sh", "text", "yaml", "{eval-rst}", "{toctree}"}
RUN = [page for page in pages() if {block.kind for block in blocks_of(page)} & {"python", "sh"}]
START = ROOT / "docs" / "start.md"
NEEDS = {"accelerate", "deepspeed", "lightning", "transformers"}  # pages of packages that may not be installed
MOST_LEFT_OUT = 6  # blocks of Python that are not run


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with shared_nursery(optimizer=True, sharded=True) as made:
        yield made


@pytest.fixture(scope="module")
def trainer_nursery() -> Iterator[Nursery]:
    with shared_nursery(TrainerNursery) as made:
        yield made


def run(nursery: Nursery, page: Path, directory: Path) -> str:
    """What it has printed."""
    program = f"import doc_pages, pathlib; doc_pages.run_page(*map(pathlib.Path, {(str(page), str(directory))!r}))"
    ended = nursery.run(f"{program}; doc_pages.end()")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@each([page for page in RUN if page != START])
def test_the_blocks_of_a_page_run(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if path.stem in NEEDS and importlib.util.find_spec(path.stem) is None:
        pytest.skip(f"{path.stem} is not installed")
    of_trainers = path.stem in ("accelerate", "transformers")
    try:
        run(request.getfixturevalue("trainer_nursery" if of_trainers else "nursery"), path, tmp_path)
    finally:
        end_drains(tmp_path, "nvme/ckpt")


def test_the_program_of_the_first_page_is_killed_and_resumed(nursery: Nursery, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = run(nursery, START, tmp_path / "whole")
    program = next(block.text for block in blocks_of(START) if block.kind == "python")
    (tmp_path / "killed" / "train.py").write_text(program)
    start = f"import os, runpy; os.chdir({str(tmp_path / 'killed')!r}); runpy.run_path('train.py', run_name='__main__')"
    child = nursery.start(start)
    wait_for_checkpoint(child, tmp_path / "killed" / "checkpoints")
    child.kill_after(0)
    child.wait()
    resumed = nursery.run(start)
    assert resumed.returncode == 0, resumed.stderr
    first, last = re.fullmatch(r"(\d+) steps are done\n(weights: .+)\n", resumed.stdout).groups()  # type: ignore[union-attr]
    assert 0 < int(first) < 1000 and last in whole.splitlines()


def wait_for_checkpoint(child: Child, directory: Path) -> None:
    deadline = time.monotonic() + patience(60)
    while not list(directory.glob("step-*/manifest.json")):
        assert not child.ends_within(0.002) and time.monotonic() < deadline


# ---- what is not run -------------------------------------------------------------------------------------------------


@each(pages())
def test_blocks_say_what_they_are(path: Path) -> None:
    """And what is no code of ours is good, too, as far as can be seen without running it."""
    for block in blocks_of(path):
        assert block.kind in LANGUAGES, f"line {block.line}"
        if block.kind == "json":
            json.loads(block.text)
        if block.kind == "python":
            compile(block.text, str(path), "exec")


def test_few_blocks_are_left_out() -> None:
    blocks = [(page, block) for page in RUN for block in blocks_of(page) if block.kind == "python"]
    left_out = [f"{page.name}, line {block.line}: {block.reason}" for page, block in blocks if block.reason]
    assert len(left_out) <= MOST_LEFT_OUT and len(blocks) > 6 * MOST_LEFT_OUT, left_out


def words_of_shell_blocks() -> list[tuple[str, list[str]]]:
    return [
        (f"{page.name}, line {block.line}", words)
        for page in RUN
        for block in blocks_of(page)
        if block.kind == "sh"
        for words in commands_of(block)
    ]


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {words[1] for _, words in words_of_shell_blocks() if words[0] == "make"}
    assert called >= {"demo", "test"} and called <= targets


def test_files_in_commands_exist() -> None:
    named = [word for _, words in words_of_shell_blocks() for word in words if word.startswith(("examples/", "bench/"))]
    assert named and [word for word in named if not (ROOT / word).is_file()] == []


def test_extras_in_commands_exist() -> None:
    known = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert known is not None
    extras = set(re.findall(r"^([a-z]+) = \[", known[1], re.MULTILINE))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages())
    named = set(re.findall(r"'(?:lazyckpt|\.)\[([a-z]+)\]'", text))
    assert named >= {"object", "cli", "lightning"} and named <= extras
