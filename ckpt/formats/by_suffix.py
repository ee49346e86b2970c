"""Which format a file has, by its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckpt.formats.format import FileFormat
from ckpt.formats.safetensors_file import SafetensorsFile

SAFETENSORS = ".safetensors"


def format_of(target: Path, metadata: Mapping[str, str] | None = None) -> FileFormat | None:
    """None: as torch.save makes files.

    Args:
        metadata: texts for the header, of a format that has room for them.

    Raises:
        ValueError: this one has none.
        TypeError: they are something else.
    """
    if target.suffix == SAFETENSORS:
        return SafetensorsFile(target, metadata)
    if metadata is not None:
        raise ValueError(
            f"metadata= is for files that are called '*{SAFETENSORS}', and '{target}' is not: put it into the object"
        )
    return None
