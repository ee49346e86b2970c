"""Bundles that were saved again by something else, which knows nothing of the manifest and has left it as it was."""

from __future__ import annotations

from pathlib import Path

from ckpt.directory import manifest as manifests

_REMEDY = (
    "; but all files that its manifest lists were written after that: if something else has saved the checkpoint again, remove "
    f"the {manifests.NAME} there"
)


def remedy_for(directory: Path) -> str:
    """What to add to a message that says how a bundle is damaged; often nothing."""
    manifest = manifests.read_if_any(directory)
    try:
        written = (directory / manifests.NAME).stat().st_mtime_ns
        files = manifest.files if manifest is not None else ()
        newer = [(directory / file.name).stat().st_mtime_ns > written for file in files]
    except OSError:
        return ""
    return _REMEDY if newer and all(newer) else ""
