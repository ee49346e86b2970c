"""What saves for a framework in this process: bundles, and the sharded states in them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ckpt
from ckpt.coordinator import make_coordinator

from .open_bundle import OpenBundle

logger = logging.getLogger("ckpt")

_LONG_S = 30.0  # after so long a rank says for whom it waits


class Session:
    """All ranks make it together, and make the same calls in the same order.

    Args:
        options: see ckpt.Options.
        alone: this process saves for itself, however many there are.
        what: the call that all ranks must make, as a message names it.
        advice: what to do if only one does.

    Raises:
        CheckpointError: the ranks cannot agree.
    """

    def __init__(self, options: ckpt.Options | None, *, alone: bool, what: str, advice: str) -> None:
        self.options = options or ckpt.Options()
        self.alone = alone
        self.owner = os.getpid()
        self._what, self._advice = what, advice
        which = "local" if alone else "auto"
        with self._telling():
            self._coordinator = make_coordinator(which)
            self.bundles = ckpt.BundleCheckpointer(options=self.options, coordinator=which)
        self._sharded: Any = None
        self._decisions = 0

    @property
    def rank(self) -> int:
        return self._coordinator.rank

    def begin(self, root: Path, name: str, *, step: int, named_last: bool) -> OpenBundle:
        """A checkpoint that is to be `root / name`. Unless that gets its name last, others may have files there, too.

        Raises:
            CheckpointError: as BundleCheckpointer.begin().
        """
        begun = None if named_last else time.time()
        with self._telling():
            bundle = self.bundles.begin(root, name, step=step, move_latest=False, named_last=named_last)
        return OpenBundle(bundle, self._saver_of_shards, begun)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Says so if it takes long, before the deadline does."""
        text = "%s has waited %g s for the same call on the other ranks: all of them must make it. %s"
        told = threading.Timer(_LONG_S, logger.warning, (text, self._what, _LONG_S, self._advice))
        told.daemon = True
        if not self.alone:
            told.start()
        try:
            yield
        finally:
            told.cancel()

    def _saver_of_shards(self) -> Any:
        """Made by all ranks when the first of them needs it, which is at the same call."""
        if self._sharded is None:
            from ckpt.dcp import DcpCheckpointer

            self._sharded = DcpCheckpointer(options=self.options, alone=self.alone)
        return self._sharded

    def decide(self, choose: Callable[[], Any]) -> Any:
        """What rank 0 finds, on all ranks: directories may look different elsewhere, or a moment later.

        Args:
            choose: called on rank 0; gives what JSON can hold. What it raises, all raise.
        """
        self._decisions += 1
        said, error = None, None
        if self.rank == 0:
            try:
                said = choose()
            except Exception as caught:
                error = caught
        if self._coordinator.world_size > 1:
            payload = {"said": said, "error": None if error is None else f"{type(error).__name__}: {error}"}
            key = f"decision/{self._decisions}"
            heard = json.loads(self._coordinator.broadcast(key, json.dumps(payload).encode(), self.options.timeout_s))
            if self.rank != 0 and heard["error"] is not None:
                raise ckpt.CheckpointError(f"rank 0: {heard['error']}")
            said = heard["said"]
        if error is not None:
            raise error
        return said

    def close(self) -> None:
        """Waits for what is in flight. Safe to call again.

        Raises:
            CheckpointError: the newest save did not become durable.
        """
        try:
            self.bundles.close()  # which waits for the sharded states that belong to them
        finally:
            if self._sharded is not None:
                with contextlib.suppress(ckpt.CheckpointError):  # the bundle that it belongs to has said so
                    self._sharded.close()
            self._coordinator.close()
