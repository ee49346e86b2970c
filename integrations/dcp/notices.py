"""What is said once in the log."""

from __future__ import annotations

import logging

logger = logging.getLogger("ckpt")
_said: set[str] = set()


def say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        logger.warning(text)
