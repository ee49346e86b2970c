"""What lies under the name of a checkpoint before the Trainer saves it: files of a callback, or of an override."""

from __future__ import annotations

from collections.abc import Iterable

from .transformers_private import is_of_trainer

_COMPLETE = {"manifest.json", "trainer_state.json"}  # what has one of them is a checkpoint


def is_checkpoint(names: Iterable[str]) -> bool:
    """Whether a directory with these names in it is to be replaced as a whole."""
    return not _COMPLETE.isdisjoint(names)


def of_others(names: Iterable[str]) -> list[str]:
    """Those that no Trainer gives to what it writes."""
    return sorted(name for name in names if not is_of_trainer(name) and name not in _COMPLETE)
