"""Where a state is saved, and what lies there."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NoReturn

from . import accelerate_private as private
from . import hooked_files


@dataclasses.dataclass(frozen=True)
class Place:
    """A directory for a state.

    Attributes:
        root: where the lock lies, and what is on its way. Not the directory in which accelerate numbers others: accelerate
            takes all that is there for checkpoints.
        name: from there.
        number: that accelerate has given it, if it has.
    """

    root: Path
    name: str
    number: int | None = None

    @property
    def path(self) -> Path:
        return self.root / self.name


def place_at(directory: Any) -> Place:
    path = Path(os.path.abspath(directory))
    if private.is_numbered(path):
        return Place(path.parent.parent, f"{private.FOLDER}/{path.name}", private.number_of(path.name))
    return Place(path.parent, path.name)


def next_place(accelerator: Any) -> Place:
    """Of a state whose directory accelerate names."""
    number = int(accelerator.save_iteration)
    return Place(Path(os.path.abspath(accelerator.project_dir)), private.numbered(number), number)


def numbered_in(folder: Path) -> list[Path]:
    """What accelerate takes for checkpoints there, the oldest first. None, if there is no such directory."""
    try:
        found = [path for path in folder.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []
    numbers = [(number, path.name, path) for path in found if (number := private.number_of(path.name)) is not None]
    return [path for _, _, path in sorted(numbers)]


def highest_beside(place: Place) -> int:
    """The highest number in the directory of a state that accelerate numbers; -1 if there is none, or it cannot be seen."""
    try:
        numbers = [private.number_of(path.name) for path in numbered_in(place.path.parent)[-1:]]
    except OSError:
        return -1
    return next((number for number in numbers if number is not None), -1)


def refuse_taken(place: Place) -> NoReturn:
    """
    Raises:
        ValueError: as accelerate does, if the next number has a directory.
    """
    raise ValueError(
        f"Checkpoint directory {place.path} ({place.number}) already exists. Please manually override "
        "`self.save_iteration` with what iteration to start with."
    )


def why_in_place(place: Place) -> str | None:
    """Why only the state's files there may be replaced; None: another directory may take its place as a whole."""
    directory = place.path
    try:
        if not _is_on_one_device(place):
            return "lies on another file system than the directory that it is put together in"
        if directory.is_symlink() or os.path.ismount(directory):
            return "is a link or a mount"
        if Path.cwd().is_relative_to(directory):
            return "holds the working directory"
        others = hooked_files.strangers_in(directory)
    except FileNotFoundError:
        return "may hold the working directory, which is gone" if directory.exists() else None
    return f"holds {', '.join(others[:4])} beside a state" if others else None


def _is_on_one_device(place: Place) -> bool:
    """Whether it can be renamed: what accelerate numbers lies in FOLDER, which may be a link to elsewhere, or a mount."""
    folder = place.path.parent
    return folder == place.root or not folder.exists() or folder.stat().st_dev == place.root.stat().st_dev
