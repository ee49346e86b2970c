"""The blocks of code in README and in the pages of docs/, and what runs those of a page.

A page is run from top to bottom in one namespace, which begins with PRELUDE, in a process and a directory of its own. Comments
that no reader sees say more: `<!-- run before` has code that a block needs, `<!-- not run: REASON -->` leaves one out.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from places import ROOT

# Paths that pages name, and that are none of this machine: they are made below the directory of the page.
FOREIGN_PLACES = re.compile(r"(?<![\w.])/(nvme|lustre)\b")

PRELUDE = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
dataset = torch.utils.data.TensorDataset(torch.randn(32, 8), torch.randn(32, 1))
sampler = torch.utils.data.RandomSampler(dataset, generator=torch.Generator().manual_seed(0))
steps = 3


def train_one_iteration(model, optimizer):
    inputs, targets = dataset[:]
    optimizer.zero_grad()
    (model(inputs) - targets).square().mean().backward()
    optimizer.step()
"""


class Block(NamedTuple):
    """
    Attributes:
        kind: the language of a fenced block, or "before", of code that no reader sees.
        line: of the page, on which its text begins.
        reason: why it is not run; empty if it is.
    """

    kind: str
    line: int
    text: str
    reason: str = ""


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    return list(_blocks(page.read_text(encoding="utf-8").split("\n")))


def _blocks(lines: list[str]) -> Iterator[Block]:
    number, reason = 0, ""
    while number < len(lines):
        line, number = lines[number], number + 1
        if left_out := re.fullmatch(r"<!-- not run: (.+) -->", line):
            reason = left_out[1]
        elif line == "<!-- run before":
            end = lines.index("-->", number)
            yield Block("before", number + 1, "\n".join(lines[number:end]))
            number = end + 1
        elif line.startswith("```"):
            end = lines.index("```", number)
            yield Block(line.removeprefix("```"), number + 1, "\n".join(lines[number:end]), reason)
            number, reason = end + 1, ""


def commands_of(block: Block) -> list[list[str]]:
    """The words of each line of a shell block."""
    return [words for line in block.text.replace("\\\n", " ").split("\n") if (words := shlex.split(line, comments=True))]


# ---- running ---------------------------------------------------------------------------------------------------------


def run_page(page: Path, directory: Path) -> None:
    """For a process of its own.

    Raises:
        whatever a block raises, at the lines of the page.
        AssertionError: a command has ended with another code than 0.
    """
    os.chdir(directory)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(PRELUDE, namespace)
    for block in blocks_of(page):
        if block.reason:
            continue
        text = FOREIGN_PLACES.sub(lambda place: f"{directory}{place[0]}", block.text)
        if block.kind in ("python", "before"):
            exec(compile("\n" * (block.line - 1) + text, str(page), "exec"), namespace)
        elif block.kind == "sh":
            for line in text.replace("\\\n", " ").split("\n"):
                _run_command(line)


def _run_command(line: str) -> None:
    """If it is one of ours."""
    from ckpt.cli.main import main

    command = re.match(r"(python -m )?ckpt ", line)
    if command is None:
        return
    code = main(shlex.split(line[command.end() :], comments=True))
    assert code == 0, f"exit code {code} of: {line}"


def end() -> NoReturn:
    """All is durable. Torch's process groups are not always over when the interpreter is."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
