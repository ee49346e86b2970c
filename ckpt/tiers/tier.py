"""A place beside home where checkpoints lie: what the user says of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ckpt.quantities import parse_duration, parse_size
from ckpt.storage.mounts import Mount, mount_of, nearest_existing
from ckpt.storage.object_urls import parse_url

AUTO = "auto"
NODE, OBJECT = "node", "object"  # also what on_tier() calls them
_LATER_SCOPES = ("shared",)
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
    """Make one by node() or remote(). Sizes are bytes or texts such as "500GB".

    Attributes:
        url: where it is: an absolute path, or the URL of a place in an object store.
        scope: who sees what lies there. "node": this node alone. "object": whoever may read the store.
        keep: how many committed checkpoints stay there; None: all. What is not home yet stays in any case.
        every: which saves come there, the same on all ranks; None: all. Of a node: those of each n-th step; the others go
            straight home. Of an object store: those of each n-th step, or one at least each so long, as in "1h".
        rate: bytes a second that leave a node for home, or home for an object store; "auto": as many as the training does not
            feel.
        max_bytes: how many bytes may lie there; None: as many as the file system has room for. Of a node.
        when_full: what becomes of a save that has no room there. "through": it goes straight home. "wait": it waits until
            there is room. "skip": it is not made. Of a node.
        required: of a node: whether a save fails if it cannot land there; else it goes straight home, with a warning. Of an
            object store: whether the next save() raises if a checkpoint could not be carried there, for a reason that a person
            has to remove; else it warns.
        address: of this node, a name or a number of the network on which the other nodes are to fetch from it what they lack at
            a restore; None: the name of the host, at any of its addresses.
        options: of the object store, for obstore, beside what that finds in the environment.
        scratch: a directory for what a restore fetches from the object store.

    Raises:
        ValueError: a value is impossible; the message names it.
    """

    url: str
    scope: str = NODE
    keep: int | None = 2
    every: int | str | None = None
    rate: int | str = AUTO
    max_bytes: int | str | None = None
    when_full: str = "through"
    required: bool = False
    address: str | None = None
    options: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False, hash=False)
    scratch: str | None = None

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

    @classmethod
    def remote(
        cls,
        url: str,
        *,
        every: int | str | None = None,
        keep: int | None = 10,
        rate: int | str = AUTO,
        required: bool = False,
        options: Mapping[str, str] | None = None,
        scratch: str | os.PathLike[str] | None = None,
    ) -> Tier:
        """A place in an object store, behind home: a process of its own carries checkpoints there once they are home.

        Needs the package obstore: `pip install 'lazyckpt[object]'`.

        Args:
            url: such as "s3://bucket/run1"; "gs://" and "az://" are known, too. Of one job: two must not have the same.
            every: a number of steps, a duration such as "30min", or None: always the newest.
            options: what obstore is to be told beside what it finds in the environment, such as
                {"endpoint": "https://minio:9000"}. Texts. Those that may be secret are neither logged nor written to a disk.
            scratch: where a restore puts what it fetches, until it has read it; as large as the files that a node reads. None:
                the disk of the node, if there is a tier of nodes; else the directory of temporary files.

        Raises:
            ValueError: see Tier.
        """
        place = None if scratch is None else os.path.abspath(os.fspath(scratch))
        more: dict[str, Any] = {"options": {} if options is None else options, "scratch": place}
        return cls(url, OBJECT, keep, every, rate, required=required, **more)

    def __post_init__(self) -> None:
        if self.scope in _LATER_SCOPES:
            raise ValueError(f"Tier.scope {self.scope!r} is not supported yet; make tiers by Tier.node() or Tier.remote()")
        self._need(self.scope in (NODE, OBJECT), "scope", "must be 'node' or 'object'")
        self._need(self.keep is None or _is_count(self.keep), "keep", "must be None (all) or at least 1")
        self._set_size("rate", "must be 'auto' or bytes a second such as '200MB'", AUTO)
        self._need(isinstance(self.required, bool), "required", "must be True or False")
        if self.scope == NODE:
            self._check_node()
        else:
            self._check_object()

    def _check_node(self) -> None:
        self._need(isinstance(self.url, str) and bool(self.url.strip()), "url", "must be a path such as '/nvme/ckpt'")
        self._need("://" not in self.url, "url", "must be a path such as '/nvme/ckpt', because the scope is 'node'")
        self._need("\0" not in self.url, "url", "must be a path without zero bytes")
        self._set("url", os.path.abspath(self.url))
        self._need(self.every is None or _is_count(self.every), "every", "must be None or a number of steps from 1")
        self._set_size("max_bytes", "must be None or a size such as '500GB'", None)
        self._need(self.when_full in _WHEN_FULL, "when_full", "must be 'through', 'wait' or 'skip'")
        named = isinstance(self.address, str) and bool(self.address.strip())
        self._need(self.address is None or named, "address", "must be None, or a host name or IP address of this node")
        if self.options or self.scratch is not None:
            raise ValueError("Tier.options and Tier.scratch are of object stores: give them to Tier.remote()")

    def _check_object(self) -> None:
        try:
            self._set("url", str(parse_url(self.url)))
        except ValueError as error:
            raise ValueError(f"Tier.url {error}") from None
        self._need(self.max_bytes is None, "max_bytes", "is of Tier.node() alone")
        self._need(self.when_full == "through", "when_full", "is of Tier.node() alone")
        self._need(self.address is None, "address", "is of Tier.node() alone")
        try:
            fine = self.every is None or _is_count(self.every) or self.every_s is not None
        except (TypeError, ValueError):
            fine = False
        self._need(fine, "every", "must be None, a number of steps from 1, or a duration such as '1h'")
        texts = isinstance(self.options, Mapping) and all(
            isinstance(each, str) for option in self.options.items() for each in option
        )
        if not texts:  # without the values: they may be secret
            raise ValueError("Tier.options must be a mapping of texts to texts, such as {'endpoint': 'https://minio:9000'}")
        self._set("options", dict(self.options))

    @property
    def path(self) -> Path:
        return Path(self.url)

    @property
    def every_steps(self) -> int | None:
        return None if self.every is None or isinstance(self.every, str) else self.every

    @property
    def every_s(self) -> float | None:
        return parse_duration(self.every, "Tier.every") if isinstance(self.every, str) else None

    @property
    def rate_bytes(self) -> int | None:
        """Bytes a second; None: "auto"."""
        return None if self.rate == AUTO else int(self.rate)

    @property
    def limit_bytes(self) -> int | None:
        return None if self.max_bytes is None else int(self.max_bytes)

    def wants(self, step: int) -> bool:
        """Whether the save of this step lands here."""
        return self.every_steps is None or step % self.every_steps == 0

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


class Tiers(NamedTuple):
    """What a Checkpointer was given."""

    node: Tier | None
    remote: Tier | None


def sort_tiers(tiers: Sequence[Tier]) -> Tiers:
    """
    Raises:
        ValueError: they are not what `tiers` can be.
    """
    if isinstance(tiers, (str, bytes, Tier)) or not isinstance(tiers, Sequence):
        raise ValueError(f"tiers must be a list such as [Tier.node('/nvme/ckpt')], but is {tiers!r}")
    for tier in tiers:
        if not isinstance(tier, Tier):
            raise ValueError(f"tiers must hold Tier objects such as Tier.node('/nvme/ckpt'), but holds {tier!r}")
    found = {scope: [tier for tier in tiers if tier.scope == scope] for scope in (NODE, OBJECT)}
    for scope, made in ((NODE, "node"), (OBJECT, "remote")):
        if len(found[scope]) > 1:
            places = ", ".join(f"'{tier.url}'" for tier in found[scope])
            text = f"tiers may hold one Tier.{made}() at most, but holds {len(found[scope])}: {places}; choose one"
            raise ValueError(text)
    if [tier.scope for tier in tiers] == [OBJECT, NODE]:
        raise ValueError("tiers must be in the order in which saves come to them: Tier.node() before Tier.remote()")
    return Tiers(*(next(iter(found[scope]), None) for scope in (NODE, OBJECT)))


def node_tier(tiers: Sequence[Tier]) -> Tier | None:
    """The one that who knows no others was given; None: none.

    Raises:
        ValueError: they are not what `tiers` can be.
    """
    found = sort_tiers(tiers)
    if found.remote is not None:
        raise ValueError(f"Tier.remote('{found.remote.url}') is for a Checkpointer; here tiers may hold a Tier.node() alone")
    return found.node


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
