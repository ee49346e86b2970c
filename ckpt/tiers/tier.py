"""A place beside home where checkpoints lie: what the user says of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckpt.quantities import parse_size
from ckpt.storage.mounts import Mount, mount_of, nearest_existing

AUTO = "auto"
NODE = "node"
_LATER_SCOPES = ("shared", "object")
_WHEN_FULL = ("through", "wait", "skip")
# File systems that other nodes see, too, or that a server may take away. As /proc/self/mountinfo names them; FUSE: see below.
_SHARED_KINDS = {
    **{"nfs": "NFS", "nfs4": "NFS", "cifs": "SMB", "smb3": "SMB", "smbfs": "SMB", "afs": "AFS", "ceph": "Ceph"},
    **{"lustre": "Lustre", "gpfs": "GPFS", "mmfs": "GPFS", "beegfs": "BeeGFS", "fhgfs": "BeeGFS", "panfs": "PanFS"},
    **{"pvfs2": "OrangeFS", "orangefs": "OrangeFS", "wekafs": "WekaFS", "glusterfs": "GlusterFS", "gfs2": "GFS2"},
    **{"ocfs2": "OCFS2", "coda": "Coda", "ncpfs": "NCP", "quobyte": "Quobyte", "daos": "DAOS"},
}
_LOST_AT_REBOOT = ("tmpfs", "ramfs")


@dataclasses.dataclass(frozen=True)
class Tier:
    """Make one by node(). Sizes are bytes or texts such as "500GB".

    Attributes:
        url: where it is: an absolute path.
        scope: who sees what lies there. "node": this node alone.
        keep: how many committed checkpoints stay there; None: all. What is not home yet stays in any case.
        every: which saves land there: those of each n-th step, the same on all ranks; None: all. The others go straight home.
        rate: bytes a second that leave it for home; "auto": as many as the training does not feel.
        max_bytes: how many bytes may lie there; None: as many as the file system has room for.
        when_full: what becomes of a save that has no room there. "through": it goes straight home. "wait": it waits until
            there is room. "skip": it is not made.
        required: whether a save fails if it cannot land there. Else it goes straight home, with a warning.
        address: of this node, a name or a number of the network on which the other nodes are to fetch from it what they lack at
            a restore; None: the name of the host, at any of its addresses.

    Raises:
        ValueError: a value is impossible; the message names it.
    """

    url: str
    scope: str = NODE
    keep: int | None = 2
    every: int | None = None
    rate: int | str = AUTO
    max_bytes: int | str | None = None
    when_full: str = "through"
    required: bool = False
    address: str | None = None

    @classmethod
    def node(
        cls,
        path: str | os.PathLike[str],
        *,
        keep: int | None = 2,
        every: int | None = None,
        rate: int | str = AUTO,
        max_bytes: int | str | None = None,
        when_full: str = "through",
        required: bool = False,
        address: str | None = None,
    ) -> Tier:
        """A directory on a disk of each node, faster than home: saves land there, and are carried home in the background.

        Args:
            path: the same on all nodes; made if it is not there. Several jobs may share it.

        Raises:
            ValueError: see Tier.
        """
        try:
            url = os.fspath(path)
        except TypeError:
            raise ValueError(
                f"the path of Tier.node() must be a text or a Path such as '/nvme/ckpt', but is {path!r}"
            ) from None
        return cls(url, NODE, keep, every, rate, max_bytes, when_full, required, address)

    def __post_init__(self) -> None:
        if self.scope in _LATER_SCOPES:
            raise ValueError(f"Tier.scope {self.scope!r} is not supported yet; make tiers by Tier.node()")
        self._need(self.scope == NODE, "scope", "must be 'node'")
        self._need(isinstance(self.url, str) and bool(self.url.strip()), "url", "must be a path such as '/nvme/ckpt'")
        self._need("://" not in self.url, "url", "must be a path such as '/nvme/ckpt', because the scope is 'node'")
        self._need("\0" not in self.url, "url", "must be a path without zero bytes")
        self._set("url", os.path.abspath(self.url))
        self._need(self.keep is None or _is_count(self.keep), "keep", "must be None (all) or at least 1")
        self._need(self.every is None or _is_count(self.every), "every", "must be None or a number of steps from 1")
        self._set_size("rate", "must be 'auto' or bytes a second such as '200MB'", AUTO)
        self._set_size("max_bytes", "must be None or a size such as '500GB'", None)
        self._need(self.when_full in _WHEN_FULL, "when_full", "must be 'through', 'wait' or 'skip'")
        self._need(isinstance(self.required, bool), "required", "must be True or False")
        named = isinstance(self.address, str) and bool(self.address.strip())
        self._need(self.address is None or named, "address", "must be None, or a host name or IP address of this node")

    @property
    def path(self) -> Path:
        return Path(self.url)

    @property
    def rate_bytes(self) -> int | None:
        """Bytes a second; None: "auto"."""
        return None if self.rate == AUTO else int(self.rate)

    @property
    def limit_bytes(self) -> int | None:
        return None if self.max_bytes is None else int(self.max_bytes)

    def wants(self, step: int) -> bool:
        """Whether the save of this step lands here."""
        return self.every is None or step % self.every == 0

    def _set_size(self, name: str, demand: str, instead: str | None) -> None:
        """Bytes, whatever it was given as."""
        given = getattr(self, name)
        if given is instead or given == instead:
            return
        try:
            size = parse_size(given.strip().removesuffix("/s") if isinstance(given, str) and name == "rate" else given)
        except (TypeError, ValueError):
            size = 0
        self._need(size > 0, name, demand)
        self._set(name, size)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _need(self, fine: bool, name: str, demand: str) -> None:
        if not fine:
            raise ValueError(f"Tier.{name} {demand}, but is {getattr(self, name)!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def node_tier(tiers: Sequence[Tier]) -> Tier | None:
    """The one that a Checkpointer was given; None: none.

    Raises:
        ValueError: they are not what `tiers` can be.
    """
    if isinstance(tiers, (str, bytes, Tier)) or not isinstance(tiers, Sequence):
        raise ValueError(f"tiers must be a list such as [Tier.node('/nvme/ckpt')], but is {tiers!r}")
    for tier in tiers:
        if not isinstance(tier, Tier):
            raise ValueError(f"tiers must hold Tier objects such as Tier.node('/nvme/ckpt'), but holds {tier!r}")
    if len(tiers) > 1:
        paths = ", ".join(f"'{tier.url}'" for tier in tiers)
        raise ValueError(f"tiers may hold one Tier.node() at most, but holds {len(tiers)}: {paths}; choose one")
    return tiers[0] if tiers else None


def check_place(path: Path, home: Path) -> None:
    """
    Raises:
        ValueError: the path, which may not be there yet, is no place of a "node" tier: other nodes would see it, too, or it is
            no directory, or a part of home.
    """
    inner, outer = Path(os.path.realpath(path)), Path(os.path.realpath(home))
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise ValueError(
            f"Tier.node('{path}') must not lie in '{home}', where its checkpoints are carried, nor around it; choose another "
            "path"
        )
    there = nearest_existing(path)
    if not there.is_dir():
        raise ValueError(f"Tier.node('{path}') must be a directory, but '{there}' is none; choose another path")
    mount = mount_of(there)
    if mount is not None and (kind := _shared_kind(mount)) is not None:
        raise ValueError(
            f"Tier.node('{path}') must lie on a disk of the node, but lies on {kind} (type {mount.kind}, mounted at "
            f"'{mount.point}'); give a path on a local disk, or leave the tier out"
        )


def _shared_kind(mount: Mount) -> str | None:
    if mount.kind == "fuse" or mount.kind.startswith(("fuse.", "fuseblk")):
        return "FUSE"
    return _SHARED_KINDS.get(mount.kind)


def warnings_about(path: Path, home: Path) -> list[str]:
    """What is allowed for a "node" tier, but hardly meant: texts for the log."""
    found = []
    mount, other = mount_of(path), mount_of(home)
    if mount is not None and other is not None and mount.device == other.device:
        found.append(
            f"Tier.node('{path}') lies on the same device as '{home}' ({mount.source}): each checkpoint is written there "
            "twice, and a disk that is lost takes both copies; give a path on another disk, or leave the tier out"
        )
    if mount is not None and mount.kind in _LOST_AT_REBOOT:
        found.append(
            f"Tier.node('{path}') lies in memory ({mount.kind}): checkpoints there do not survive a reboot of the node, and "
            "take memory from the training"
        )
    return found
