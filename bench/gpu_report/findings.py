"""What a step has found, written line by line: what a step had found before it hung or died is not lost."""

from __future__ import annotations

import argparse
import contextlib
import json
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PASS, FAIL, INCONCLUSIVE, SKIPPED, NOT_RUN = "pass", "fail", "inconclusive", "skipped", "not run"
VERDICTS = (FAIL, INCONCLUSIVE, NOT_RUN, PASS, SKIPPED)  # the worst first: of several, it is that of them all


class Findings:
    """The file to which a step's program writes."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def add(self, check: str, verdict: str, reason: str = "", **figures: Any) -> None:
        """
        Args:
            reason: why it is not a pass.
            figures: what was measured or seen, by name, with the unit in the name.
        """
        assert verdict in VERDICTS
        line = {"check": check, "verdict": verdict, "reason": reason, "figures": figures}
        with self._out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def guard(self, check: str) -> Iterator[None]:
        """An error in here is what was found of this check; the step goes on with the next one."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(check, FAIL, f"{type(error).__name__}: {error}")


def read(out: Path) -> list[dict[str, Any]]:
    """All whole lines of a step's file. A step that was killed may have left the last one unfinished."""
    if not out.exists():
        return []
    found = []
    for text in out.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return found


def worst(verdicts: Sequence[str]) -> str:
    return min(verdicts, key=VERDICTS.index)


def step_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all steps' programs have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where findings go, as JSON lines")
    parser.add_argument("--directory", type=Path, required=True, help="where files are written; the caller removes it")
    parser.add_argument("--pretend-cuda", type=Path, metavar="LIBRARY", help="a stand-in for the CUDA driver, instead of a GPU")
    return parser
