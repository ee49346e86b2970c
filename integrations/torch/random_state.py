"""The random number generators of a process: Python's, numpy's, torch's on the host and on every CUDA device.

A state holds tensors and plain values only, so that it loads with weights_only=True.
"""

from __future__ import annotations

import logging
import random
import sys
from typing import Any

import torch

logger = logging.getLogger("ckpt")


def rng_state() -> dict[str, Any]:
    """The generators in use: numpy's only if it has been imported, those of CUDA only if it has been initialised."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = (str(kind), keys.tolist(), *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
        state["cuda_device"] = torch.cuda.current_device()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Takes up all streams of `state` again; says in the log which of them this process cannot take up."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        _set_numpy(state["numpy"])
    if "cuda" in state:
        _set_cuda(state["cuda"], state["cuda_device"])


def _set_numpy(state: tuple[Any, ...]) -> None:
    try:
        import numpy
    except ImportError:
        logger.warning("the checkpoint holds the state of numpy's random numbers, but numpy is not installed here")
        return
    kind, keys, *rest = state
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))


def _set_cuda(states: list[torch.Tensor], device: int) -> None:
    """All devices where they are as they were; else the stream of the device then in use goes to the one now in use."""
    if not torch.cuda.is_available():
        logger.warning("the checkpoint holds the states of CUDA random numbers, but there is no CUDA device here")
    elif len(states) == torch.cuda.device_count() and device == torch.cuda.current_device():
        torch.cuda.set_rng_state_all(states)
    else:
        torch.cuda.set_rng_state(states[device], torch.cuda.current_device())
