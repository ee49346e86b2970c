"""The answers of several ranks as one message, and messages as frames that many write into one value."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping

PART_BYTES = 4 << 20  # a store's server takes values of at most 8 MiB
_ANSWER = struct.Struct("<IQ")  # rank, length; then so many bytes
_FRAME = struct.Struct("<QIII")  # number of the message, part, parts, length; then so many bytes


def pack_answers(answers: Mapping[int, bytes]) -> bytes:
    return b"".join(piece for rank, answer in answers.items() for piece in (_ANSWER.pack(rank, len(answer)), answer))


def unpack_answers(message: bytes) -> dict[int, bytes]:
    answers = {}
    place = 0
    while place < len(message):
        rank, length = _ANSWER.unpack_from(message, place)
        place += _ANSWER.size
        answers[rank] = message[place : place + length]
        place += length
    return answers


def join_answers(messages: Iterable[bytes]) -> dict[int, bytes]:
    """An answer may have come twice: from a rank, and from the leader of its node."""
    answers: dict[int, bytes] = {}
    for message in messages:
        answers.update(unpack_answers(message))
    return answers


# ---- frames ----------------------------------------------------------------------------------------------------------


def frames(number: int, message: bytes) -> list[bytes]:
    """
    Args:
        number: that no other message in the same value has, whoever has sent it.
    """
    parts = [message[place : place + PART_BYTES] for place in range(0, len(message), PART_BYTES)] or [b""]
    return [_FRAME.pack(number, part, len(parts), len(piece)) + piece for part, piece in enumerate(parts)]


def frames_of(box: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(number of the message, part, parts, piece) in order of arrival."""
    place = 0
    while place < len(box):
        number, part, parts, length = _FRAME.unpack_from(box, place)
        place += _FRAME.size
        yield number, part, parts, box[place : place + length]
        place += length


def parts_of(frame: bytes) -> int:
    """How many there are of the message of which this is one."""
    return int(_FRAME.unpack_from(frame)[2])


def whole_messages(box: bytes) -> Iterator[bytes]:
    """Those all of whose frames have arrived. The frames of one come in their order, with those of others between them."""
    pieces: dict[int, list[bytes]] = {}
    for number, part, parts, piece in frames_of(box):
        if part == 0:
            pieces[number] = []
        pieces[number].append(piece)
        if part + 1 == parts:
            yield b"".join(pieces.pop(number))
