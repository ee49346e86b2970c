"""How fast a sharded state comes back from a disk whose bytes are not cached, on as many ranks as saved it or on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.measure.disk_pages import drop_from_cache
from bench.measure.ranks import Ranks
from bench.measure.sampling import Settings, Side, Values, clock, interleave
from bench.rivals.base import Rival
from bench.rivals.dcp import DcpSaveInGroup
from bench.rivals.sharded import CkptInPlaceOfDcp, CkptSharded
from bench.sharded.plan import Plan
from bench.sharded.state import Shape, State, blank_state, difference, known_state, local_tensors

KINDS: tuple[type[Rival], ...] = (CkptSharded, CkptInPlaceOfDcp, DcpSaveInGroup)


class Loads:
    """Each loads what it has saved itself, in place, into one and the same state."""

    def __init__(self, plan: Plan, ranks: Ranks, settings: Settings) -> None:
        self._ranks, self._settings = ranks, settings
        self.shape = Shape.of(plan.tensors, plan.nbytes)
        self._known = known_state(self.shape, ranks)
        self._into: State = blank_state(self.shape, ranks)
        self.rivals = [kind(Path(plan.directory) / f"load{number}") for number, kind in enumerate(KINDS)]
        for rival in self.rivals:
            rival.open()
            if plan.write:
                rival.save(self._known)
                rival.finish()
            else:
                rival.adopt(1)

    def check(self) -> None:
        """
        Raises:
            RuntimeError: what one of them brings is not what was saved, on some rank.
        """
        expected = local_tensors(self._known)
        for rival in self.rivals:
            for tensor in local_tensors(self._into).values():
                tensor.zero_()
            rival.load(self._into)
            errors = [error for error in self._ranks.gather(difference(expected, self._into)) if error]
            if errors:
                raise RuntimeError(f"{rival.name}: {errors[0]}")

    def side(self, rival: Rival) -> Side:
        def measure() -> Values:
            if self._ranks.rank == 0:
                drop_from_cache(rival.directory)
            self._ranks.meet()
            started = clock()
            rival.load(self._into)
            each = self._ranks.gather(clock() - started)
            return {"load_s": max(each), "rank0_load_s": each[0]}

        return Side(rival.name, measure)

    def settle(self) -> None:
        self._settings.settle()
        self._ranks.meet()

    def close(self) -> None:
        for rival in self.rivals:
            rival.close()


def measure_loads(plan: Plan, ranks: Ranks, settings: Settings) -> dict[str, Any]:
    loads = Loads(plan, ranks, settings)
    loads.check()
    samples = interleave([loads.side(rival) for rival in loads.rivals], plan.rounds, loads.settle)
    loads.close()
    rows = {
        side: [{"started_s": each.started_s, "values": each.values} for each in measured] for side, measured in samples.items()
    }
    return {"samples": rows, "tensors": loads.shape.tensors, "nbytes": loads.shape.nbytes}
