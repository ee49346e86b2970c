"""Stands in for a job of the core where a file is not written, but linked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class LinkedJob:
    """As far as those ask who publish a file that is durable. See Job.

    Attributes:
        size, crc32: of the file.
        archives: as of Job.
        checksums: of its pieces, as checksums_of() gives them.
    """

    size: int
    crc32: int
    archives: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    checksums: bytes = b""
    finished: bool = True
    captured: bool = True
    released: bool = True
    error: BaseException | None = None
    limits: None = None

    @property
    def stats(self) -> Mapping[str, Any]:
        return {"reused_bytes": self.size}

    def drop_baseline(self) -> None:
        """There is none."""
