"""A restore of one step, whatever else is there."""

from __future__ import annotations

from pathlib import Path

from ckpt.directory.step_names import step_name, step_of
from ckpt.errors import CheckpointError
from ckpt.restore.candidates import Candidate, Seen

_SHOWN = 20  # steps that a message names


class OneStep:
    """
    Args:
        directory: of the checkpoints.

    Raises:
        TypeError, ValueError: step is not a count.
    """

    def __init__(self, step: int, directory: Path) -> None:
        self.step = step
        self._name = step_name(step)
        self._directory = directory
        self._seen: list[Candidate] = []

    def among(self, seen: Seen) -> Seen:
        """What is to be tried of all that rank 0 has found."""
        self._seen = [*seen.candidates]
        candidates = [candidate for candidate in seen.candidates if candidate.name == self._name]
        rejected = [text for text in seen.rejected if self._name in text]
        return Seen(candidates, rejected, "" if candidates or rejected else self._absent(seen))

    def _absent(self, seen: Seen) -> str:
        there = sorted({step_of(candidate.name) for candidate in seen.candidates})
        shown = ", ".join(map(str, there[-_SHOWN:]))
        earlier = f"{len(there) - _SHOWN} earlier ones and " if len(there) > _SHOWN else ""
        text = f"there is no checkpoint of step {self.step} in '{self._directory}'"
        text += f": there are {earlier}those of steps {shown}" if there else ", nor of any other step"
        if self._name in seen.lost:
            return (
                f"{text}; '{self._name}' holds no manifest.json: it was not committed, or that is lost, or has not arrived yet"
            )
        return f"{text}. {seen.lost}" if seen.lost and not there else text

    def expect(self, candidate: Candidate) -> None:
        """
        Raises:
            CheckpointError: rank 0 names one that this rank has not asked for.
        """
        if candidate.name != self._name:
            raise CheckpointError(
                f"this rank asks for step {self.step}, and rank 0 for '{candidate.name}': give restore() the same step= on all "
                "ranks"
            )

    def newer(self, found: Candidate) -> list[int]:
        """On rank 0: steps that were committed behind the one that was taken."""
        return sorted({step_of(candidate.name) for candidate in self._seen if candidate.sequence > found.sequence})

    def say_newer(self, found: Candidate) -> str:
        """What a log is to say of them; empty: there are none."""
        newer = self.newer(found)
        if not newer:
            return ""
        return (
            f"step {self.step} of '{self._directory}' is restored, as it was asked for, although there are newer checkpoints "
            f"(of {len(newer)} steps: {', '.join(map(str, newer[-_SHOWN:]))}). They stay until their steps are saved again, or "
            "keep= no longer wants them. The next save is the newest; until then restore() without step= takes one of them"
        )
