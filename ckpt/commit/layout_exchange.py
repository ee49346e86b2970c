"""How rank 0 learns where each rank has put the parts of a sharded state.

A rank says the digest of its layout, and the layout itself if that is not the one of its last save. Rank 0 keeps the last
layout of each rank. It may not have one all the same: the save in which the rank sent it may have failed before rank 0 heard of
it. Then it asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckpt.commit.conversation import Failure
from ckpt.directory.manifest import SHARDED, FileEntry
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.sharded import contents
from ckpt.sharded.metadata import MetadataWriter


@dataclasses.dataclass(frozen=True)
class LayoutWord:
    """What a rank says of its layout; `text` is empty if rank 0 has it."""

    digest: str
    text: str = ""


_SEPARATOR = ","  # of the layouts of several files; none holds it


def layout_of(file: FileInFlight) -> str:
    """What a rank has written of a sharded state, to this file and to that of its frozen tensors, if there is one."""
    layouts = [contents.encode(file.contents.items, file.job.archives)]
    if file.apart is not None and file.apart.is_there:
        layouts.append(contents.encode(file.apart.items, file.apart.file.job.archives))
    return _SEPARATOR.join(layouts)


def by_file(answers: Sequence[tuple[FileEntry, ...]], layouts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names and layouts of all files with parts of a sharded state.

    Args:
        answers: the files of each rank.
        layouts: of each rank, from layout_of().
    """
    names = [file.name for files in answers for file in files if file.kind == SHARDED]
    return names, [layout for text in layouts for layout in text.split(_SEPARATOR)]


class LayoutExchange:
    """Of one rank, for all saves of a Checkpointer. Used on the finisher's thread alone."""

    def __init__(self, metadata: MetadataWriter) -> None:
        self.metadata = metadata
        self._own = ""  # of the save at hand
        self._told = ""  # digest of the layout of the last save that was published
        self._known: dict[int, tuple[str, str]] = {}  # on rank 0: digest and layout of each rank

    def say(self, layout: str) -> LayoutWord:
        """This rank's word of it."""
        self._own = layout
        digest = contents.digest(layout)
        return LayoutWord(digest, "" if digest == self._told else layout)

    def reply(self, question: Mapping[str, Any], rank: int) -> str:
        """What complete() asks."""
        return self._own if rank in question["layouts"] else ""

    def note_published(self) -> None:
        self._told = contents.digest(self._own)

    def complete(self, words: Sequence[LayoutWord], ask: Callable[[Mapping[str, Any]], list[str]]) -> list[str] | Failure:
        """On rank 0: the layouts of all ranks."""
        self._note(0, words[0].digest, self._own)
        for rank, word in enumerate(words):
            self._note(rank, word.digest, word.text)
        missing = self._missing(words)
        if missing:
            texts = ask({"layouts": missing})
            for rank in missing:
                self._note(rank, words[rank].digest, texts[rank] if rank < len(texts) else "")
            missing = self._missing(words)
        if missing:
            return Failure("where the parts of the sharded state lie was not told by all ranks", tuple(missing))
        return [self._known[rank][1] for rank in range(len(words))]

    def _note(self, rank: int, digest: str, text: str) -> None:
        if text and contents.digest(text) == digest:
            self._known[rank] = digest, text

    def _missing(self, words: Sequence[LayoutWord]) -> list[int]:
        return [rank for rank, word in enumerate(words) if self._known.get(rank, ("",))[0] != word.digest]
