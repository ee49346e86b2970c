"""Whether the ranks are about to save one and the same bundle: what each says, and what rank 0 makes of that."""

from __future__ import annotations

from typing import Any

from ckpt.commit.agreement import Refusal
from ckpt.errors import CheckpointError, FailedSavesError, PeerError

REFUSALS = {kind.__name__: kind for kind in (CheckpointError, FailedSavesError, PeerError)}


def judge(answers: list[dict[str, Any]]) -> Refusal | None:
    """Why the ranks, which are given in their order, cannot make one bundle."""
    for own in answers:
        if own["text"]:
            kind = FailedSavesError if own["kind"] == FailedSavesError.__name__ else PeerError
            return {"kind": kind.__name__, "text": f"rank {own['rank']} may not save: {own['text']}"}
    leaders: dict[str, dict[str, Any]] = {}
    for own in answers:
        if own["tiers"] != answers[0]["tiers"]:
            text = f"rank {own['rank']} and rank 0 are not given the same tiers=: all ranks must be"
            return {"kind": CheckpointError.__name__, "text": text}
        if own["name"] != answers[0]["name"]:
            text = f"rank {own['rank']} saves '{own['name']}' where rank 0 saves '{answers[0]['name']}'"
            return {"kind": CheckpointError.__name__, "text": f"{text}: all ranks must give a checkpoint the same name"}
        first = leaders.setdefault(own["node"], own)
        if own["roots"] != first["roots"] and not {*own["roots"]} & {*first["roots"]}:
            text = f"rank {own['rank']} saves to '{own['roots'][0]}' where rank {first['rank']} saves to '{first['roots'][0]}'"
            remedy = "Give all ranks the same directory; for one of each rank's own, use the framework's own checkpoint engine"
            return {"kind": CheckpointError.__name__, "text": f"{text}: a checkpoint of all ranks has one directory. {remedy}"}
    return None
