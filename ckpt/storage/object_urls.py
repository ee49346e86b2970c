"""Where in an object store something lies: "s3://bucket/run1". Always a text: pathlib makes one slash of the two."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

SCHEMES = {"s3": "Amazon S3 and what speaks like it", "gs": "Google Cloud Storage", "az": "Azure Blob Storage"}
_URL = re.compile(r"(?P<scheme>[a-z0-9]+)://(?P<bucket>[^/]*)/?(?P<prefix>.*)", re.IGNORECASE | re.DOTALL)
_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,221}[a-zA-Z0-9]")
# What no client and no server writes otherwise. A "%" or a "?" would be read as something else by one of them.
_PART = re.compile(r"[A-Za-z0-9._=+@:-]+")


class ObjectUrl(NamedTuple):
    """`prefix`: without slashes at its ends; may be empty."""

    scheme: str
    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    def split_file(self) -> tuple[str, str]:
        """The URL of what is above the last part, and that part."""
        above, _, name = self.prefix.rpartition("/")
        return str(self._replace(prefix=above)), name


def is_url(path: Any) -> bool:
    """Whether it is meant to lie in an object store."""
    return isinstance(path, str) and "://" in path


def parse_url(url: Any) -> ObjectUrl:
    """
    Raises:
        ValueError: it is none; says what is wrong.
    """
    match = _URL.fullmatch(url) if isinstance(url, str) else None
    if match is None:
        raise ValueError(f"must be a URL such as 's3://bucket/run1', but is {url!r}")
    scheme, bucket, prefix = match["scheme"].lower(), match["bucket"], match["prefix"].strip("/")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}:// ({what})" for name, what in SCHEMES.items())
        raise ValueError(f"must begin with one of {known}, but is {_shown(url)}")
    if "@" in bucket:
        raise ValueError("must not hold a user or a password: credentials come from the environment, or from options=")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(f"must name a bucket, as in '{scheme}://bucket/run1', but is {_shown(url)}")
    for part in prefix.split("/") if prefix else ():
        if part in (".", "..") or not _PART.fullmatch(part):
            raise ValueError(
                f"must have letters, digits and ._=+@:- between its slashes, and {part!r} in {_shown(url)} is none of that"
            )
    return ObjectUrl(scheme, bucket, prefix)


def _shown(url: str) -> str:
    """What follows a "?" or an "@" may be secret."""
    return repr(re.sub(r"\?.*", "?...", re.sub(r"//[^/]*@", "//...@", url), flags=re.DOTALL))
