"""Checkpoints that a framework alone has saved again, over one of this library: it leaves the manifest of what is gone."""

from __future__ import annotations

import json
from pathlib import Path

_MANIFEST = "manifest.json"
_PACKED_ALIKE = ".safetensors"  # the same tensors make the same bytes, whoever writes them; torch.save() packs otherwise


def is_saved_again(directory: Path) -> bool:
    """Whether nothing is left of what the manifest lists: every file is newer than it, and those of torch have other sizes.

    For a checkpoint that was found damaged. A damaged copy is not taken for one: it has files as long as its manifest says. Nor
    is one over which only a part was saved.
    """
    try:
        written = (directory / _MANIFEST).stat().st_mtime_ns
        files = {file["name"]: file["bytes"] for file in json.loads((directory / _MANIFEST).read_bytes())["files"]}
        found = {name: (directory / name).stat() for name in files}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    telling = [name for name in files if not name.endswith(_PACKED_ALIKE)]
    return (
        bool(telling)
        and all(each.st_mtime_ns > written for each in found.values())
        and all(found[name].st_size != files[name] for name in telling)
    )
