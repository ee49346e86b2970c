"""Whether what was given as replicated is the same on all ranks: structure, layout, and samples of the tensors' bytes."""

from __future__ import annotations

import array
import dataclasses
import pickletools
import re
import zlib
from base64 import b85decode, b85encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ckpt.commit.conversation import Failure
from ckpt.commit.record_path import name_of_instance, name_of_record
from ckpt.commit.shared_file import WrittenShare, find_disagreement
from ckpt.saving.file_in_flight import FileInFlight

_NOT_ALIKE = "the replicated state is not the same on all ranks: "
_SHARDED_NOT_ALIKE = "the sharded state is not the same on all ranks, as it must be beside the contents of shards: "
_SHARDED_REMEDY = (
    ". What each rank has for itself goes to state= of save(); keys, shapes, placements, and whatever is no shard of a DTensor "
    "must be the same everywhere"
)
_REMEDY = (
    ". Give what differs as the rank's own state (state= of save(), data= of the callback), or make it the same on every rank, "
    "to the byte"
)
# Other differences between pickles show in their digests.
_REMEDY_FOR_DEVICES = (
    ": the devices of its tensors have other names there. Let each process see its own device alone (CUDA_VISIBLE_DEVICES), or "
    "let rank 0 write it all (Options.replicated_writers='rank0')"
)
_OF_RANKS = ("DTensor", "ShardedTensor", "DeviceMesh")  # classes whose pickles say which rank has made them
_MOST_NAMED = 8  # ranks in a message
_LARGEST_COMPARED = 4 << 20  # bytes of a pickle, or of samples, that are sent to all ranks to find the first difference
_CONTEXT = 3  # values before the difference that a message shows
_LONGEST_VALUE = 40  # characters of each
_CONSTANTS = {"NONE": "None", "NEWTRUE": "True", "NEWFALSE": "False", "EMPTY_DICT": "{", "EMPTY_LIST": "[", "EMPTY_TUPLE": "()"}
# A rank's tensors lie on a device of its own; the file says that of the rank which wrote it.
_DEVICE = re.compile(rb"X....(cuda|xpu|npu|hpu|privateuseone):\d+", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Digest:
    """Of one replicated state on one rank."""

    pickle_crc: int
    pickle_bytes: int
    sizes_crc: int
    records: int
    layout_crc: int
    samples_crc: int


def digest_of(pickle: bytes, sizes: Sequence[int], layout_crc: int, samples: bytes = b"") -> Digest:
    """
    Args:
        sizes: of the records, bytes.
        layout_crc: of where they lie in the file; 0 if this rank does not write it.
        samples: of their bytes, see `FileInFlight.samples`; none if these are not to be compared.
    """
    plain = without_devices(pickle)
    sizes_crc = zlib.crc32(array.array("Q", sizes).tobytes())
    return Digest(zlib.crc32(plain), len(plain), sizes_crc, len(sizes), layout_crc, zlib.crc32(samples))


@dataclasses.dataclass(frozen=True)
class Replica:
    """One rank's replicated state, as far as it takes to find what differs. What is too large to be sent is missing there."""

    digest: Digest
    pickle: bytes  # without devices
    samples: bytes

    def to_message(self) -> dict[str, Any]:
        texts = {"pickle": _pack(self.pickle), "samples": _pack(self.samples)}
        return {"digest": dataclasses.asdict(self.digest), **texts}

    @staticmethod
    def from_message(message: Mapping[str, Any]) -> Replica:
        return Replica(Digest(**message["digest"]), *(zlib.decompress(b85decode(message[it])) for it in ("pickle", "samples")))


def digest_of_replica(file: FileInFlight) -> Digest:
    """Where this rank writes a share of the file, its layout must be the same, too."""
    layout_crc = 0 if file.write_share is None else file.job.layout_crc32
    return digest_of(file.pickle, file.sizes, layout_crc, file.samples)


def replica_of(file: FileInFlight) -> Replica:
    return Replica(digest_of_replica(file), without_devices(file.pickle), file.samples)


def explain(
    ours: Replica | None, number: int, differing: tuple[int, ...], ask: Callable[[Mapping[str, Any]], list[str]], sharded: bool
) -> Failure:
    """On rank 0: asks the ranks whose replicated state is not that of rank 0 for the first difference.

    Args:
        number: of the state, among those of the save that must be the same on all ranks.
        sharded: it is what must be the same of a sharded state.
    """
    texts = ask({"replica": None if ours is None else ours.to_message(), "ranks": differing, "number": number})
    first = differing[0]
    found = texts[first] if first < len(texts) else ""
    who = f"that of {_in_words(differing)} differs" if len(differing) == 1 else f"those of {_in_words(differing)} differ"
    beginning, remedy = (_SHARDED_NOT_ALIKE, _SHARDED_REMEDY) if sharded else (_NOT_ALIKE, _REMEDY)
    text = f"{beginning}{who} from that of rank 0" + (f", {found}" if found else "")
    return Failure(text + remedy, differing)


def reply(question: Mapping[str, Any], ours: Replica | None, rank: int) -> str:
    """On another rank: what explain() asks for."""
    if rank not in question["ranks"]:
        return ""
    theirs = None if question["replica"] is None else Replica.from_message(question["replica"])
    return difference(ours, theirs, rank, 0)


def compare_shares(files: Sequence[FileInFlight], shares: Sequence[Sequence[WrittenShare]]) -> Failure | None:
    """What samples have not seen, of the records that several ranks write.

    Args:
        files: that all ranks write together.
        shares: of each rank, in the order of the files.
    """
    for number, file in enumerate(files):
        found = find_disagreement([of_rank[number] for of_rank in shares])
        if found is not None:
            key = found.record - file.first_record
            wrote = f"{_in_words(found.writers)} {'has' if len(found.writers) == 1 else 'have'} written"
            if key >= 0:
                what = name_of_record(file.pickle, key)
                text = f"rank {found.reader} holds other values of {what} than {wrote}{_REMEDY}"
            else:
                text = f"rank {found.reader} has pickled it otherwise than {wrote}{_REMEDY_FOR_DEVICES}"
            return Failure(_NOT_ALIKE + text, (found.reader,))
    return None


def _in_words(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    named = [str(rank) for rank in ranks[:_MOST_NAMED]]
    named += [f"{len(ranks) - _MOST_NAMED} more"] if len(ranks) > _MOST_NAMED else []
    return f"ranks {', '.join(named[:-1])} and {named[-1]}"


def _pack(content: bytes) -> str:
    return b85encode(zlib.compress(content if len(content) <= _LARGEST_COMPARED else b"")).decode()


def difference(ours: Replica | None, theirs: Replica | None, our_rank: int, their_rank: int) -> str:
    """What differs first, in words; nothing if it cannot be told."""
    if ours is None or theirs is None:
        return f"rank {our_rank if ours is None else their_rank} gave no replicated state"
    mine, other = ours.digest, theirs.digest
    if (mine.pickle_crc, mine.pickle_bytes) != (other.pickle_crc, other.pickle_bytes):
        return first_difference(ours.pickle, theirs.pickle, our_rank, their_rank) if theirs.pickle else ""
    if dataclasses.replace(mine, samples_crc=other.samples_crc) != other:
        return f"in the sizes or the layout of its tensors: what is lazy must be the same on rank {our_rank} and {their_rank}"
    return _differing_tensors(ours, theirs)


def _differing_tensors(ours: Replica, theirs: Replica) -> str:
    pairs = zip(array.array("I", ours.samples), array.array("I", theirs.samples), strict=False)
    differing = [key for key, (mine, other) in enumerate(pairs) if mine != other]
    if not differing:
        return "in the values of its tensors"
    more = f" and of {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"in the values of {name_of_record(ours.pickle, differing[0])}{more}"


def without_devices(pickle: bytes) -> bytes:
    return _DEVICE.sub(b"X\x06\0\0\0device", pickle)


def without_numbers(pickle: bytes, keys: Iterable[str]) -> bytes:
    """Without the integers that stand under these keys, where a key is used for the first time."""
    for key in map(str.encode, keys):
        head = b"X" + len(key).to_bytes(4, "little") + key
        number = re.compile(re.escape(head) + rb"(?:q.|r....)?(?:K.|M..|J....)", re.DOTALL)
        pickle = number.sub(lambda _, head=head: head, pickle)  # type: ignore[misc]
    return pickle


def first_difference(ours: bytes, theirs: bytes, our_rank: int, their_rank: int) -> str:
    """Where two pickles part, in words: the values just before, then both values."""
    if (mesh := name_of_instance(ours, _OF_RANKS)) is not None:
        return (
            f"as it must where it holds a {mesh[0]}, in '{mesh[1]}', of which each rank has its own: give what is sharded as "
            "sharded= of save()"
        )
    before: list[str] = []
    for mine, other in zip(_values(ours), _values(theirs), strict=False):
        if mine != other:
            where = " after " + ", ".join(before[-_CONTEXT:]) if before else " at the beginning"
            return f"{where.strip()}: {mine} on rank {our_rank}, {other} on rank {their_rank}"
        before.append(mine)
    return "only in which objects are shared, in the order of a set (give sorted lists), or in where one of them ends"


def _values(pickle: bytes) -> list[str]:
    """The values in the order in which they stand in the pickle; what has been seen before is not repeated."""
    found = []
    for opcode, value, _ in pickletools.genops(pickle):
        if opcode.name in _CONSTANTS:
            found.append(_CONSTANTS[opcode.name])
        elif value is not None and "PUT" not in opcode.name and "GET" not in opcode.name and opcode.name != "PROTO":
            found.append(_show(value))
    return found


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."
