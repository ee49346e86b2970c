"""What a file of torch.save is made of, beside its pickle and the bytes of its tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

SHARED_ARCHIVE = b"replicated"  # the same on all ranks, whatever the file will be called


def serialization_id(token: str) -> str:
    """40 digits that tell this file from every other one. torch.save derives them from the content, which we have not read."""
    return f"{int.from_bytes(hashlib.sha256(token.encode()).digest(), 'big') % 10**40:040d}"


def archive_name(path: Path) -> str:
    """The folder inside the zip: as torch.save, the base name up to its last dot."""
    name = path.name
    dot = name.rfind(".")
    return name[:dot] if dot > 0 else name
