"""Tests that wait for most of their time: the cases of a module run side by side, and begin before the first is asked for."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

Result = Callable[[pytest.FixtureRequest], Any]


@contextlib.contextmanager
def side_by_side(
    request: pytest.FixtureRequest,
    bodies: Mapping[str, Callable[..., Any]],
    lanes: Sequence[Any],
    directories: pytest.TempPathFactory,
) -> Iterator[Result]:
    """Gives what returns, or raises, what has come of the case of the test that asks.

    Args:
        request: of a fixture of the module.
        bodies: by the name of a test: what runs in its place, with a lane, a directory and the parameters of the case.
        lanes: what a body has for itself while it runs. So many run at once.
    """
    idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for lane in lanes:
        idle.put(lane)

    def run(body: Callable[..., Any], *arguments: Any, **parameters: Any) -> Any:
        lane = idle.get()
        try:
            return body(lane, *arguments, **parameters)
        finally:
            idle.put(lane)

    made: dict[str, Future[Any]] = {}
    pool = ThreadPoolExecutor(len(lanes))
    try:
        for item in request.session.items:  # without what is not to run
            if isinstance(item, pytest.Function) and item.path == request.path and item.originalname in bodies:
                directory = directories.mktemp("side-by-side")
                made[item.name] = pool.submit(run, bodies[item.originalname], directory, **item.callspec.params)
        yield lambda asking: made[asking.node.name].result()
    finally:
        pool.shutdown(cancel_futures=True)
