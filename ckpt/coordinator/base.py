"""What every coordinator does, and the errors that they share."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping

from ckpt.errors import PeerError

VERDICT_S = 1.0  # how much longer than rank 0 gathers the others wait for its verdict, so that it still reaches them
MOST_NAMED = 8  # ranks that a message names


class Coordinator(abc.ABC):
    """The one primitive by which the ranks of a job agree.

    Small messages go to rank 0 (gather) and a small verdict comes back (broadcast); both cost an amount of work that is linear
    in the number of ranks. It may be used from a background thread while the main thread trains, and from several threads
    at once with different keys.

    A key is `stream/name`: what stands before the first slash names its stream (a key without a slash is a stream of its own).
    Every key is used once in a job. On each rank the calls of one stream come one after the other and in the same order; ranks
    may be several keys apart, and different streams may overlap in any way.

    What is deleted, and when. Rank 0 removes the answers to a gather when it has read them. A broadcast is removed when every
    rank has answered a later gather of its stream: it has then returned from the broadcast. If ranks are missing, nobody
    knows what they have read, so broadcasts stay until all answer again, but at most 1,024: the oldest goes first, and who
    still wants it gets PeerError. A late answer to a gather that failed is removed when the late rank has answered a later one.
    So a stream that only broadcasts keeps 1,024 keys, and rank 0 must not run further ahead in it than that.

    Attributes:
        name: of the implementation: "local", "torch", "mpi" or "file".
        rank: this process's, from 0.
        world_size: the number of ranks.
    """

    name: str
    rank: int
    world_size: int

    @abc.abstractmethod
    def gather(self, key: str, payload: bytes, timeout_s: float) -> list[bytes] | None:
        """Rank 0 gets the payloads of all, in the order of ranks; the others post theirs and get None at once.

        Args:
            timeout_s: how long rank 0 waits for answers, and how long a post may take, seconds.

        Raises:
            PeerError: on rank 0, ranks have not answered in time: it names them and carries the payloads of the others. On
                another rank, the post did not, or may not, get through to where rank 0 would read it.
            StorageError: on another rank, the message could not be written; rank 0 will not get it.
            ClosedError: on rank 0, interrupt() has been called.
        """

    @abc.abstractmethod
    def broadcast(self, key: str, payload: bytes | None, timeout_s: float) -> bytes:
        """Rank 0 gives the payload and returns at once; the others wait for it. All return it.

        Args:
            payload: ignored but on rank 0.
            timeout_s: how long to wait for rank 0, seconds. Where the broadcast is the verdict on a gather, it must be longer
                than the timeout of that gather.

        Raises:
            PeerError: rank 0 has not given it in time; `ranks` is (0,).
            ClosedError: on another rank than 0, interrupt() has been called.
        """

    @abc.abstractmethod
    def interrupt(self) -> None:
        """Ends every wait for other ranks, for good: those in progress at once, and those that begin later.

        They raise ClosedError. For the end of the process, and for a drain whose deadline is over; from any thread, at any
        time, and more than once. What is only posted still goes out: the answer of a rank to a gather, and what rank 0
        broadcasts; but whatever its timeout, it fails after 5 seconds, as far as it waits for a server and not for a file
        system. close() is still to be called, and stays for as long as ever.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Ends the use of it; closing again does nothing.

        It may take up to 5 seconds: rank 0 stays until the others have closed too, if its last word may still be unread.
        """


# ---- errors -----------------------------------------------------------------------------------------------------------


def given(payload: bytes | None, key: str) -> bytes:
    """What rank 0 broadcasts."""
    if payload is None:
        raise ValueError(f"rank 0 must give the payload of the broadcast '{key}'")
    return payload


def missing_error(
    key: str, missing: Iterable[int], answers: Mapping[int, bytes], timeout_s: float, advice: str = ""
) -> PeerError:
    """Of a gather."""
    ranks = sorted(missing)
    return PeerError(
        f"{named(ranks)} did not answer '{key}' within {timeout_s:g} s: dead, stopped, or held up before it; "
        f"look at the logs of those ranks{advice}",
        ranks,
        answers,
    )


def silent_error(key: str, rank: int, timeout_s: float, why: str = "") -> PeerError:
    """Of a rank that has heard nothing from rank 0."""
    cause = why or "dead, stopped, or held up before it"
    return PeerError(f"rank {rank} heard nothing from rank 0 about '{key}' within {timeout_s:g} s: {cause}", (0,))


def unposted_error(key: str, rank: int, why: str) -> PeerError:
    """Of a rank whose post did not, or may not, get through."""
    return PeerError(f"rank {rank} could not post '{key}' to rank 0: {why}", (0,))


def named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:MOST_NAMED]))
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"
