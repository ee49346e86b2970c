"""What of a save goes to files of its own: tensors that it was told not to change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ckpt.commit.target import SavedFile
from ckpt.directory.manifest import FROZEN, SHARDED
from ckpt.formats.dcp_file import DcpFile
from ckpt.formats.frozen_apart import StateWithoutFrozen
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.frozen_file import FrozenFile
from ckpt.saving.frozen_files import FrozenFiles


def set_apart(
    file: FileInFlight,
    target: Path,
    files: FrozenFiles,
    key: str,
    like: Path | None = None,
    sharded_format: DcpFile | None = None,
) -> None:
    """Of one file; see FrozenFile.

    Args:
        target: of that of its frozen tensors.
        sharded_format: if it is of a sharded state.
    """
    beside = FileInFlight(target, limits=file.limits, with_directory=True, number=file.number, like=like)
    file.apart = FrozenFile(beside, files, key)
    if sharded_format is None:
        file.made = StateWithoutFrozen(file.apart.choose)
    else:
        file.made = sharded_format.without(file.apart.choose_archives)


def all_files(saved: Sequence[SavedFile]) -> tuple[SavedFile, ...]:
    """These, and those of their frozen tensors, once they are written or linked."""
    more = [(each.file.apart, SHARDED if each.kind == SHARDED else FROZEN) for each in saved]
    return (*saved, *(SavedFile(each.file, kind, apart=True) for each, kind in more if each is not None and each.is_there))
