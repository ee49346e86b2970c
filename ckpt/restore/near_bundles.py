"""Copies of bundles on the disk of this rank's node. Home says which bundle is wanted; its files may be nearer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ckpt.directory import manifest as manifests
from ckpt.directory.manifest import FileEntry, Manifest
from ckpt.drain.node import Generation
from ckpt.restore.places import HOME, NODE, DirectoryPlace, StepPlaces


class NearBundles:
    """
    Args:
        generations: what is complete on this node.
        one_node: all ranks of the job see the same disk.
    """

    def __init__(self, generations: Iterable[Generation] = (), one_node: bool = False) -> None:
        self.one_node = one_node
        self._here = {(each.sequence, manifests.identity(each.manifest)): each for each in generations if each.manifest.bundle}

    def places_of(self, directory: Path, manifest: Manifest) -> StepPlaces:
        """Where the files of a bundle are, the nearest place first.

        Args:
            directory, manifest: of the bundle at home.
        """
        home = DirectoryPlace(directory, HOME)
        found = self._here.get((manifest.sequence, manifests.identity(manifest)))
        if found is None:
            return StepPlaces([home], directory)
        names = {entry.called: entry.name for entry in found.manifest.files}
        return StepPlaces([_NearPlace(found.directory, names), home], directory)


class _NearPlace(DirectoryPlace):
    """
    Args:
        names: of the files there, by what they are called at home.
    """

    def __init__(self, directory: Path, names: Mapping[str, str]) -> None:
        super().__init__(directory, NODE, finished=False)
        self._names_here = names

    def manifest(self) -> None:
        """It names files otherwise than home."""
        return None

    def _name_of(self, entry: FileEntry) -> str:
        return self._names_here.get(entry.name, entry.name)
