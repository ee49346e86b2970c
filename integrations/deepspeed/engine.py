"""The checkpoint engine that DeepSpeed is given. What it calls, and when, is in its runtime/engine.py."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import socket
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

import ckpt
from ckpt.state_dicts import supposedly_frozen

from .config import options_from, tiers_from, waits_from
from .lazy_tensors import lazy_tensors
from .readers import note_save

logger = logging.getLogger("ckpt")

_OPTIMIZER_FILES = "_optim_states.pt"
# Several ranks write the file of an expert that is replicated, each with its own number among those that do.
_VARYING = ("zero_partition_rank",)
_collected: contextvars.ContextVar[list[ckpt.PendingSave] | None] = contextvars.ContextVar("_collected", default=None)


class LazyCheckpointEngine:
    """A checkpoint engine of DeepSpeed; made by enable() or attach(). All ranks make it together.

    Args:
        config: a DeepSpeedConfig, or None.
        options, tiers: for what the config does not say.

    Raises:
        ValueError, TypeError: the section in the config is wrong.
        CheckpointError: the ranks cannot agree, see BundleCheckpointer.
    """

    def __init__(self, config: Any = None, options: ckpt.Options | None = None, tiers: Sequence[ckpt.Tier] = ()) -> None:
        section = getattr(getattr(config, "datastates_config", None), "config", None)
        self.name = "LazyCheckpointEngine"
        self.options = options_from(section, options)
        self._waits = waits_from(section)
        self._newest: ckpt.PendingSave | None = None  # that save_checkpoint() has begun
        self._saved_to: str | None = None  # where the last checkpoint was saved
        local = bool(getattr(config, "use_node_local_storage", False))
        tiers = tiers_from(section, tiers)
        if local and tiers:
            logger.warning("tiers have no effect with use_node_local_storage: all saves go to the nodes' own disks anyway")
            tiers = ()
        self._checkpointer = ckpt.BundleCheckpointer(
            options=self.options,
            node=os.environ.get("GROUP_RANK", socket.gethostname()) if local else None,
            leads_node=os.environ.get("LOCAL_RANK", "0") == "0",
            varying=_VARYING,
            tiers=tiers,
        )
        self._engine: weakref.ref[Any] = weakref.ref(self)  # of DeepSpeed, once bound
        self._bundle: Any = None  # that is being put together
        self._root: Any = None  # where it goes, as the user gave it
        self._moves_latest = True
        self._client_keys: tuple[str, ...] = ()
        self._exporting = False  # in save_16bit_model(), which waits for its file
        self._is_lazy = True
        self._reads_nearest = False  # in load_checkpoint(), where files are read by load() alone

    def bind(self, engine: Any) -> None:
        """Lets it know the DeepSpeedEngine that it works for: its buffers, and how it updates."""
        self._engine = weakref.ref(engine)
        self._is_lazy = not (ask(engine, "super_offload") or getattr(engine, "zenflow", False))

    # ---- what DeepSpeed calls --------------------------------------------------------------------------------------

    def create(self, info: Any) -> None:
        """Begins a checkpoint."""
        self.end_save()
        engine = self._engine()
        self._root, self._moves_latest = info.save_dir, bool(info.save_latest)
        step = int(getattr(engine, "global_steps", 0))
        self._bundle = self._checkpointer.begin(
            self._root,
            str(info.tag),
            step=step,
            move_latest=self._moves_latest,
            may_skip=not self._exporting,
            together=not self._exporting,
            by_nodes=not ask(engine, "zero_nvme_offload_optimizer"),  # DeepSpeed itself copies those states to save_dir
        )

    def save(self, state_dict: Any, path: str) -> None:
        """Begins to save one file. All but the lazy tensors is captured before it returns."""
        if self._bundle is None:
            raise ckpt.CheckpointError(f"save('{path}') without create(): DeepSpeed begins a checkpoint with create()")
        lazy: Any = False
        module = getattr(self._engine(), "module", None)
        module = module if isinstance(module, torch.nn.Module) else None
        if self._is_lazy:
            lazy = lazy_tensors(state_dict, module, self._client_keys)
        frozen = None if module is None else supposedly_frozen([module], _learning(module))
        self._bundle.save(state_dict, path, lazy=lazy, frozen=frozen)

    def commit(self, info: Any) -> bool:
        """Waits until the checkpoint is durable. DeepSpeed calls it for save_16bit_model() only."""
        pending = self.end_save()
        if pending is not None:
            pending.result()
        return True

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads a file after verifying its checksums, from the nearest place that has it; what is in flight is waited for."""
        self.drain()

        def read(place: Any) -> Any:
            return ckpt.load(place, map_location=map_location, weights_only=False)

        return self._checkpointer.read(path, read) if self._reads_nearest else read(path)

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        bundle = self._bundle
        if bundle is not None and bundle.lands_on_node and os.path.abspath(path) == str(bundle.directory):
            return  # it is made when the checkpoint comes home: the training is not to wait for that
        from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

        CheckpointEngine.makedirs(self, path, exist_ok)

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """True: DeepSpeed leaves commit and `latest` to us. It asks at the end of save_checkpoint(), which ends the save."""
        self.end_save()
        return True

    def set_commit_info(self, info: Any) -> None:
        pass

    def get_commit_info(self) -> None:
        """DeepSpeed asks before each update: the fence. None: nothing to commit, on any rank."""
        self.end_save()
        ckpt.fence()

    def preserves_storage_sharing(self) -> bool:
        """False: DeepSpeed need not clone what it gives us, each tensor's bytes are written once and no others."""
        return False

    def cleanup(self) -> None:
        """Waits for the saves in flight, and closes. It logs what failed."""
        self.end_save()
        try:
            self._checkpointer.close()
        except ckpt.CheckpointError as error:
            logger.error("the newest checkpoint did not become durable: %s", error)

    # ---- for the functions below -----------------------------------------------------------------------------------

    def begin_save(self, client_keys: Iterable[str], exporting: bool = False) -> None:
        self._client_keys = tuple(client_keys)
        self._exporting = exporting

    def end_save(self, error: BaseException | None = None) -> ckpt.PendingSave | None:
        """Hands the checkpoint that is being put together to the background; safe to call at any time."""
        bundle, self._bundle = self._bundle, None
        if bundle is None:
            return None
        engine: Any = self._engine()
        if ask(engine, "zero_nvme_offload_optimizer"):
            # DeepSpeed has copied the swapped states there itself, without an fsync.
            rank = engine.local_rank if ask(engine, "use_node_local_storage") else engine.global_rank
            bundle.include(bundle.directory / "offloaded_tensors" / f"rank{rank:02d}")
        if error is not None:
            bundle.fail(ckpt.CheckpointError(f"{type(error).__name__} in save_checkpoint: {error}"))
        pending: ckpt.PendingSave = bundle.commit()
        if not self._exporting:
            note_save(self._root, pending, self._moves_latest, self.options.drain_timeout_s)
            self._newest = pending
        return pending

    def finish_save(self, save_dir: Any) -> None:
        """Ends save_checkpoint(), and waits if the config says so. By default it waits for a save to another directory than
        before: whoever names a new one each time may remove the old one at once.

        Raises:
            CheckpointError: it was waited for, and did not become durable; on all ranks.
        """
        pending, self._newest = self._newest, None
        if (collected := _collected.get()) is not None:
            collected += [] if pending is None else [pending]
            return
        root, before = os.path.abspath(save_dir), self._saved_to
        self._saved_to = root
        waits = before not in (None, root) if self._waits is None else self._waits
        if waits and pending is not None:
            pending.result()

    def find(self, load_dir: Any, tag: Any, optimizer: bool = True, nearest: bool = False) -> str | None:
        """The tag to load.

        Args:
            optimizer: whether the files of the optimizer's states are going to be read; users remove them to save space.
            nearest: whether load() alone reads files until end_load(): then it may take them from the own node.
        """
        self.end_save()
        self._reads_nearest = nearest
        reads = None if optimizer else lambda name: not name.endswith(_OPTIMIZER_FILES)
        return self._checkpointer.find(load_dir, None if tag is None else str(tag), reads=reads)

    def end_load(self) -> None:
        self._reads_nearest = False

    def drain(self) -> None:
        """Waits until nothing is in flight, whatever came of it."""
        self.end_save()
        self._checkpointer.wait_quietly()

    def wait(self, timeout: float | None = None, tier: str | None = None) -> None:
        """See wait() of the module."""
        self.end_save()
        if tier not in (None, "node"):
            raise ValueError(f"tier must be None or 'node', but is {tier!r}")
        (self._checkpointer.wait if tier is None else self._checkpointer.wait_on_node)(timeout)


@contextlib.contextmanager
def collecting() -> Iterator[list[ckpt.PendingSave]]:
    """Meanwhile save_checkpoint() of this thread waits for nothing, whatever the config says.

    What it begins is in the list, for whoever makes it a part of a larger checkpoint and waits for that.
    """
    begun: list[ckpt.PendingSave] = []
    token = _collected.set(begun)
    try:
        yield begun
    finally:
        _collected.reset(token)


def _learning(module: torch.nn.Module) -> list[torch.Tensor]:
    """DeepSpeed's optimizers own all of these, or flat copies of them, and no others."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def ours_of(engine: Any) -> LazyCheckpointEngine | None:
    found = getattr(engine, "checkpoint_engine", None)
    return found if isinstance(found, LazyCheckpointEngine) else None


def ask(engine: Any, question: str) -> bool:
    """A question that some engines cannot answer."""
    try:
        return bool(getattr(engine, question)())
    except (AttributeError, TypeError):
        return False
