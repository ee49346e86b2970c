"""Methods of somebody else's that run while a Trainer writes a checkpoint, and what they may do with its files."""

from __future__ import annotations

from typing import Any

from .transformers_private import KNOWN_PACKAGES

# What a writer calls that is made to be overridden, too.
_CALLED = {"save_model": ("save_model", "_save")}


def may_look(trainer: Any, writer: str) -> bool:
    """Whether somebody has overridden a method that writes, of the Trainer or of its model.

    Such a method may read, remove, rename or rewrite what the Trainer itself has just written, so that has to be there. One
    that does not says so: `reads_checkpoints = False` in the class.
    """
    if not getattr(trainer, "reads_checkpoints", True):
        return False
    methods = _CALLED.get(writer, (writer,))
    return any(_is_own(trainer, name) for name in methods) or (
        writer == "save_model" and _is_own(trainer.model, "save_pretrained")
    )


def _is_own(owner: Any, name: str) -> bool:
    """Whether a method is not as one of the known packages has it."""
    return name in vars(owner) or any(
        name in vars(each) and each.__module__.partition(".")[0] not in KNOWN_PACKAGES for each in type(owner).__mro__
    )
