"""The site of docs/ builds without a warning, has an entry of each public name, and README leads to it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from places import ROOT
from sources import dotted, parse
from support import patience
from test_layers import PUBLIC_NAMES

import ckpt
from ckpt import errors
from ckpt.cli.main import COMMANDS

DOCS = ROOT / "docs"
OWN_KEYS = {"host_cache_size", "wait_before_return", "tiers"}  # of the section in a DeepSpeed config, beside Options
LONGEST_README = 130


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ---- the site --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it."""
    for module in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", out / "trees", DOCS, out / "html"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(300))
    assert done.returncode == 0, done.stderr
    return out / "html"


def names_in_reference(site: Path) -> set[str]:
    """Those of Python in the inventory, by which other sites would link to them."""
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = zlib.decompress(inventory).decode().splitlines()
    return {line.split(" ")[0] for line in lines if " py:" in line}


def public_objects() -> list[set[str]]:
    """All public names, in sets of those that name the same."""
    found: dict[object, set[str]] = {}
    for module, own in PUBLIC_NAMES.items():
        for name in own:
            found.setdefault(id(getattr(importlib.import_module(module), name)), set()).add(f"{module}.{name}")
    for path in (ROOT / "integrations").glob("*/__init__.py"):
        for node in parse(path).body:
            if isinstance(node, ast.Assign) and [dotted(target) for target in node.targets] == ["__all__"]:
                names = [f"ckpt.integrations.{path.parent.name}.{name}" for name in ast.literal_eval(node.value)]
                found |= {name: {name} for name in names}
    return list(found.values())


def test_each_public_name_has_an_entry(site: Path) -> None:
    there, public = names_in_reference(site), public_objects()
    assert {"ckpt.Checkpointer.save", "ckpt.Checkpointer.wait", "ckpt.Tier.node"} <= there
    assert {"ckpt.integrations.torchtitan.LazyCheckpointManager"} in public
    assert [sorted(names) for names in public if not names & there] == []


# ---- pages that list something ---------------------------------------------------------------------------------------


def test_each_error_has_a_section() -> None:
    classes = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.CheckpointError)
    }
    sections = set(re.findall(r"^## (\w+)$", read("docs/operating/errors.md"), re.MULTILINE))
    assert sections - classes == {"Preempted"} and classes - sections == set()


def test_all_keys_of_the_section_of_deepspeed_are_listed() -> None:
    rows = re.findall(r"^\| (`.+?`) \|", read("docs/guides/deepspeed.md"), re.MULTILINE)
    keys = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert keys == {field.name for field in dataclasses.fields(ckpt.Options)} | OWN_KEYS


def test_all_commands_have_a_section() -> None:
    sections = set(re.findall(r"^## ckpt (\w+)", read("docs/operating/command_line.md"), re.MULTILINE))
    assert sections == set(COMMANDS)


# ---- README ----------------------------------------------------------------------------------------------------------


def test_readme_is_one_page() -> None:
    assert len(read("README.md").splitlines()) <= LONGEST_README


def test_links_of_readme_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", read("README.md")) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).is_file()] == []


def test_figures_in_readme_are_those_of_the_benchmarks() -> None:
    """Row by row, with the command that measures them."""
    rows = [row for row in read("README.md").splitlines() if row.startswith("| ") and not row.startswith("| what")]
    assert 6 <= len(rows) <= 10
    assert [row for row in rows if row not in read("docs/benchmarks.md").splitlines()] == []
    assert [row for row in rows if "`make bench ARGS=" not in row or row.startswith("| the same")] == []
