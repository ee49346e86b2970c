"""Whether a framework is as the versions that an adapter was tested with."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable

from ckpt.errors import UnsupportedError


def require(package: str, tested: str, needed: Iterable[str], adapter: str) -> None:
    """Looks for all that an adapter replaces or calls.

    Args:
        package: as pip calls it.
        tested: the versions that the adapter was tested with.
        needed: dotted names, each of a module and what is in it, as "accelerate.checkpointing:save".
        adapter: how a user calls it.

    Raises:
        ImportError: the package is not installed.
        UnsupportedError: it lacks one of them; before anything is replaced.
    """
    missing = [name for name in needed if not _is_there(name)]
    if missing:
        version = importlib.metadata.version(package)
        raise UnsupportedError(
            f"{adapter} does not know this {package} ({version}): it has no {', '.join(missing)}. Tested with {tested}: "
            f"install that, or leave {adapter} out, and {package} saves by itself"
        )


def _is_there(name: str) -> bool:
    module, _, path = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name) and "." in error.name:
            return False  # a module of the package; the package itself is not installed, or broken: that is said as it is
        raise
    for part in path.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True
