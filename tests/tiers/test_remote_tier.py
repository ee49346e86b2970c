"""Tier.remote(): what may be said of an object store, and what is refused before a byte is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import PYTHONPATH
from support import patience

import ckpt
from ckpt import Tier
from ckpt.storage.object_urls import ObjectUrl, parse_url
from ckpt.tiers.tier import node_tier, sort_tiers

URL = "s3://bucket/run1"
ONE = Tier.remote(URL)


def test_what_is_given_is_kept() -> None:
    tier = Tier.remote(f"{URL}/", every="1h", keep=None, rate="200MB/s", required=True, options={"region": "x"}, scratch="/big")
    assert (tier.url, tier.scope, tier.keep, tier.rate_bytes, tier.required) == (URL, "object", None, 200_000_000, True)
    assert (tier.every_steps, tier.every_s, tier.options, tier.scratch) == (None, 3600.0, {"region": "x"}, "/big")
    assert (ONE.keep, ONE.every, ONE.rate_bytes, ONE.required) == (10, None, None, False)
    assert Tier.remote(URL, every=100).every_steps == 100 and hash(tier) != hash(ONE)


def test_secrets_are_not_shown() -> None:
    secret = Tier.remote(URL, options={"secret_access_key": "hidden-thing"})
    assert "hidden" not in repr(secret) and "hidden" not in str(secret)
    with pytest.raises(ValueError) as caught:
        Tier.remote(URL, options={"secret_access_key": "hidden-thing", "timeout": 5})  # type: ignore[dict-item]
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        *(("s3://", "must name a bucket"), ("s3:///run1", "must name a bucket"), ("s3://b/run1", "must name a bucket")),
        *(("/lustre/run1", "must be a URL"), ("s3:/bucket/run1", "must be a URL"), (Path("s3://bucket"), "must be a URL")),
        *(("ftp://bucket/run1", "must begin with one of s3://"), ("file:///run1", "must begin with one of s3://")),
        *(("memory://bucket", "must begin with one of s3://"), ("s3://me:pass@bucket/x", "credentials come from")),
        *(
            ("s3://bucket/a/../b", "'..'"),
            ("s3://bucket/a//b", "''"),
            ("s3://bucket/a b", "'a b'"),
            ("s3://bucket/a?x=1", "a?x=1"),
        ),
    ],
    ids=str,
)
def test_a_url_that_is_none(url: Any, says: str) -> None:
    with pytest.raises(ValueError, match=r"Tier\.url") as caught:
        Tier.remote(url)
    assert says in str(caught.value) and ":pass" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("every", 0), ("every", "often"), ("every", -1), ("every", True), ("every", 1.5), ("keep", 0), ("rate", 0)),
        *(("rate", "fast"), ("required", "yes"), ("options", {"a": 1}), ("options", "a=1")),
    ],
    ids=str,
)
def test_a_value_that_is_impossible(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"Tier\.{name}"):
        Tier.remote(URL, **{name: value})


@pytest.mark.parametrize("more", [{"max_bytes": 1}, {"when_full": "skip"}, {"address": "host"}], ids=str)
def test_what_is_of_nodes_alone(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"Tier\.{next(iter(more))} is of Tier\.node\(\) alone"):
        Tier(URL, "object", **more)
    with pytest.raises(ValueError, match="of object stores"):
        Tier("/nvme", options={"region": "x"})


def test_their_order_and_number() -> None:
    node = Tier.node("/nvme")
    assert sort_tiers([node, ONE]) == (node, ONE) and sort_tiers([ONE]) == (None, ONE)
    for given, says in (
        ([ONE, node], "in the order"),
        ([ONE, Tier.remote(URL)], "one Tier.remote"),
        ([ONE, ONE], "choose one"),
    ):
        with pytest.raises(ValueError, match="tiers") as caught:
            sort_tiers(given)
        assert says in str(caught.value)
    with pytest.raises(ValueError, match="is for a Checkpointer"):
        node_tier([node, ONE])


def test_urls_are_taken_apart() -> None:
    assert parse_url("S3://Bucket/a/b/") == ObjectUrl("s3", "Bucket", "a/b") and str(parse_url("gs://bucket")) == "gs://bucket"
    assert parse_url("az://box/a/b.pt").split_file() == ("az://box/a", "b.pt")


def test_an_option_that_obstore_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    for options in ({"no_such_option": "1"}, {"allow_http": "perhaps"}):
        with pytest.raises(ValueError, match=rf"'{URL}' cannot be used with these options"):
            ckpt.Checkpointer(tmp_path / "home", tiers=[Tier.remote(URL, options=options)])
    assert not (tmp_path / "home").exists()


WITHOUT = """
import sys
sys.modules["obstore"] = None
import ckpt
tiers = [ckpt.Tier.remote("s3://bucket/run1")]
for call in (lambda: ckpt.Checkpointer(sys.argv[1], tiers=tiers), lambda: ckpt.load("s3://bucket/run1/step-1/1-2/state.pt")):
    try:
        call()
    except ckpt.errors.StorageError as error:
        print(error)
"""


def test_without_obstore_the_remedy_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path / "home")],
        **{"capture_output": True, "text": True, "timeout": patience(60), "env": {"PYTHONPATH": PYTHONPATH}},
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 2 and all("pip install 'lazyckpt[object]'" in line for line in said)
    assert not (tmp_path / "home").exists()
