"""What tests of commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Shell, copied, save_steps


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture(scope="session")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 to 3. To look at only."""
    directory = tmp_path_factory.mktemp("steps") / "run"
    save_steps(directory, 1, 2, 3)
    return directory


@pytest.fixture
def home(three_steps: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return copied(three_steps, tmp_path / "home")
