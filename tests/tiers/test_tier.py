"""What a user may say of a tier, and where it may lie."""

from __future__ import annotations

import datetime
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import PYTHONPATH
from support import patience

import ckpt
from ckpt.storage import mounts
from ckpt.tiers import tier as tiers
from ckpt.tiers.tier import Tier, check_place, node_tier, warnings_about


def test_what_is_given_is_kept_and_sizes_become_bytes() -> None:
    sizes = {"rate": "200MB/s", "max_bytes": "1GiB"}
    tier = ckpt.Tier.node("/nvme/ckpt", keep=None, every=30, when_full="skip", required=True, **sizes)
    assert (tier.path, tier.scope, tier.keep, tier.when_full, tier.required) == (Path("/nvme/ckpt"), "node", None, "skip", True)
    assert tier.every == 30
    assert (tier.rate_bytes, tier.limit_bytes) == (200_000_000, 1 << 30)
    plain = Tier.node(Path("/nvme"))
    assert (plain.keep, plain.every, plain.rate_bytes, plain.limit_bytes, plain.when_full) == (2, None, None, None, "through")
    assert not plain.required and plain == Tier.node("/nvme") and hash(plain) == hash(Tier.node("/nvme"))


def test_a_relative_path_is_that_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tier = Tier.node("ckpt/../nvme")
    monkeypatch.chdir("/")
    assert tier.path == tmp_path / "nvme"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("keep", value) for value in (0, -1, 1.5, True, "2")),
        *(("every", value) for value in (0, -3, True, 2.5, "often", "30min", datetime.timedelta(minutes=1), [])),
        *(("rate", value) for value in (0, -1, "fast", "", None, 1.5, "0")),
        *(("max_bytes", value) for value in (0, -1, "much", 1.5, True)),
        *(("when_full", value) for value in ("", "no", None, 1)),
        *(("required", value) for value in (1, None, "yes")),
        *(("address", value) for value in (1, "", " ", b"10.0.0.1")),
    ],
)
def test_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as raised:
        Tier.node("/nvme", **{name: value})
    assert f"Tier.{name} must" in str(raised.value) and repr(value) in str(raised.value)


@pytest.mark.parametrize("path", ["", " ", "s3://bucket/run", "a\0b", b"/nvme", None, 7])
def test_a_bad_path_is_named(path: Any) -> None:
    with pytest.raises(ValueError, match="path"):
        Tier.node(path)


@pytest.mark.parametrize("scope", ["shared", "else", None])
def test_a_scope_that_is_none_yet(scope: Any) -> None:
    with pytest.raises(ValueError, match=r"Tier\.scope"):
        Tier("/lustre", scope)


def test_every_says_which_saves_land() -> None:
    assert all(Tier.node("/n").wants(step) for step in range(4))
    assert [step for step in range(7) if Tier.node("/n", every=3).wants(step)] == [0, 3, 6]


def test_the_list_holds_one_tier_of_a_node_at_most() -> None:
    one = Tier.node("/a")
    assert node_tier([]) is None and node_tier([one]) is one and node_tier((one,)) is one
    for tiers_given in ([one, Tier.node("/b")], ["/a"], "/a", one, None, {"node": one}):
        with pytest.raises(ValueError, match="tiers"):
            node_tier(tiers_given)  # type: ignore[arg-type]


# ---- places ----------------------------------------------------------------------------------------------------------


def test_a_local_directory_is_a_place_whether_it_is_there_or_not(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    check_place(tmp_path / "there", tmp_path / "home")
    check_place(tmp_path / "to" / "be" / "made", tmp_path / "home")


def test_a_file_and_a_part_of_home_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "home", tmp_path / "link" / "nvme", tmp_path):
        with pytest.raises(ValueError, match=r"Tier\.node\('.*another path"):
            check_place(place, tmp_path / "home")


# As /proc/self/mountinfo has them on machines with these file systems.
TABLE = """\
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
28 27 0:45 / /home rw,relatime shared:2 - nfs4 server:/export/home rw,vers=4.2,proto=tcp
29 27 0:46 / /lustre rw,noatime - lustre 10.0.0.1@o2ib:/fs rw,flock
30 27 0:47 / /gpfs\\040one rw - gpfs gpfs1 rw
31 27 0:48 / /mnt/s3 rw,nosuid - fuse.s3fs s3fs rw,user_id=0
32 27 0:49 / /win rw - cifs //server/share rw
33 27 0:50 / /ceph rw - ceph 10.0.0.2:6789:/ rw
34 27 0:51 / /bee rw - beegfs beegfs_nodev rw
35 28 259:1 / /home/nvme rw - xfs /dev/nvme0n1p1 rw
36 27 0:52 /sub /btrfs rw - btrfs /dev/nvme1n1 rw,subvol=/sub
37 35 0:53 / /home/nvme rw - nfs server:/hides/the/disk rw
this is no mount
"""


@pytest.mark.parametrize(
    ("path", "name"),
    [
        *(("/home/me/x", "NFS"), ("/lustre", "Lustre"), ("/gpfs one/x", "GPFS"), ("/mnt/s3/x", "FUSE"), ("/win", "SMB")),
        *(("/ceph/x", "Ceph"), ("/bee/x", "BeeGFS"), ("/home/nvme/x", "NFS")),
        *(("/homeless", None), ("/btrfs/x", None), ("/mnt/s3x", None)),
    ],
)
def test_what_other_nodes_see_is_no_place(path: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the table of another machine, whose mounts have other numbers than what is there on this one."""
    table = tmp_path / "mountinfo"
    table.write_text(TABLE)
    monkeypatch.setattr(mounts, "_TABLE", table)
    monkeypatch.setattr(mounts, "_mount_number", lambda path: None)
    monkeypatch.setattr(mounts, "nearest_existing", Path)
    monkeypatch.setattr(tiers, "nearest_existing", lambda path: _Anywhere(path))
    if name is None:
        check_place(Path(path), tmp_path)
    else:
        with pytest.raises(ValueError, match=rf"Tier\.node\('{path}'\) must lie on a disk of the node, but lies on {name} "):
            check_place(Path(path), tmp_path)


class _Anywhere(type(Path())):  # type: ignore[misc]
    def is_dir(self) -> bool:
        return True


# A FUSE file system that has a root and nothing else. It answers what the kernel asks on /dev/fuse.
FUSE = """
import ctypes, os, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
if libc.mount(b"test", sys.argv[1].encode(), b"fuse.test", 6, options):
    sys.exit(77)
def serve():
    while True:
        try:
            asked = os.read(fd, 1 << 17)
        except OSError:
            return
        size, code, unique = struct.unpack_from("<IIQ", asked)
        if code == 26:  # INIT
            answer = struct.pack("<IIIIHHIIHHI", 7, 23, 65536, 0, 0, 0, 65536, 0, 0, 0, 0)[:24]
        elif code == 3:  # GETATTR of the root
            answer = struct.pack("<QII", 3600, 0, 0) + struct.pack("<QQQQQQIIIIIIIIII", 1, *[0] * 8, 0o40755, 2, *[0] * 5)
        else:
            answer = None
        error = 0 if answer is not None else -38
        try:
            os.write(fd, struct.pack("<IiQ", 16 + len(answer or b""), error, unique) + (answer or b""))
        except OSError:
            pass
threading.Thread(target=serve, daemon=True).start()
from pathlib import Path
from ckpt.tiers.tier import check_place
try:
    check_place(Path(sys.argv[1]), Path("/elsewhere"))
except ValueError as error:
    print(error)
finally:
    libc.umount2(sys.argv[1].encode(), 2)
"""


@pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs /dev/fuse")
def test_a_real_fuse_file_system_is_no_place(tmp_path: Path) -> None:
    assert struct.calcsize("<QQQQQQIIIIIIIIII") == 88
    done = subprocess.run(
        [sys.executable, "-c", FUSE, str(tmp_path)],
        **{"capture_output": True, "text": True, "timeout": patience(60), "env": os.environ | {"PYTHONPATH": PYTHONPATH}},
    )
    if done.returncode == 77:
        pytest.skip("needs the right to mount")
    assert done.returncode == 0 and "lies on FUSE (type fuse.test" in done.stdout, done.stdout + done.stderr


def test_one_device_for_both_and_memory_are_worth_a_word(tmp_path: Path) -> None:
    (found,) = warnings_about(tmp_path / "nvme", tmp_path / "home")
    assert "same device" in found and str(tmp_path / "home") in found
    memory = mounts.mount_of(Path("/dev/shm"))
    other = mounts.mount_of(tmp_path)
    if memory is None or other is None or memory.kind != "tmpfs" or memory.device == other.device:
        pytest.skip("needs a tmpfs at /dev/shm, and a disk")
    (found,) = warnings_about(Path("/dev/shm/nvme"), tmp_path)
    assert "in memory" in found
    assert warnings_about(tmp_path, Path("/dev/shm")) == []
