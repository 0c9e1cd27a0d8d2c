"""Writing the output folder: built in a hidden folder beside it, moved into place when complete."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from bitwright.compiler.bundle.atomic import (
    STORAGE_ERRORS,
    recover,
    remove,
    replace_folder,
    sibling,
    storage_errors,
    sync_file,
    sync_tree,
)
from bitwright.compiler.bundle.manifest import MANIFEST_FILE, describe, read_manifest
from bitwright.compiler.errors import InternalError, UsageError
from bitwright.targets.schema import Profile


class BundleWriter:
    """Context manager around the making of one bundle.

    ``with BundleWriter(out) as writer:`` gives an empty folder ``writer.path``; the bundle appears at ``out``
    when :meth:`commit` returns. Leaving the block without a commit, or by an exception, leaves ``out`` as it
    was.

    Attributes:
        target: Where the bundle will be.
        path: Where its files are written until then.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.realpath(target))
        self.path = sibling(self.target, "tmp")
        self._committed = False

    def __enter__(self) -> BundleWriter:
        """Create the hidden folder.

        Raises:
            UsageError: ``target`` is a file or a folder that is no bundle, or the place cannot be written.
        """
        with storage_errors(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            recover(self.target)
            _refuse_foreign(self.target)
            self.path.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hidden folder unless it was committed; name a full disk as such."""
        remove(self.path)
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            with storage_errors(self.target):
                raise error

    def commit(self, profile: Profile, tools: Mapping[str, str] | None = None) -> Path:
        """Write the manifest and move the bundle into place; an earlier bundle at ``target`` is replaced.

        Args:
            profile: The target it was compiled for; a copy goes into the manifest.
            tools: Tools besides the Python packages, and their versions.

        Returns:
            ``target``.

        Raises:
            UsageError: The disk is full.
        """
        if self._committed:
            msg = "a bundle was committed twice"
            raise InternalError(msg, where=str(self.target))
        with storage_errors(self.target):
            sync_tree(self.path)
            manifest = describe(self.path, profile.dump(), tools or {})
            (self.path / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1) + "\n")
            sync_file(self.path / MANIFEST_FILE)
            sync_file(self.path)
            replace_folder(self.path, self.target)
        self._committed = True
        return self.target


def _refuse_foreign(target: Path) -> None:
    """Raise unless ``target`` is absent, an empty folder or an earlier bundle."""
    if not target.exists():
        return
    if target.is_dir() and (not any(target.iterdir()) or (target / MANIFEST_FILE).is_file()):
        if any(target.iterdir()):
            read_manifest(target)
        return
    msg = "the output path exists and is not a bitwright bundle, so it is not replaced"
    raise UsageError(
        msg,
        where=str(target),
        fix="choose another -o, or remove it first",
    )
