"""manifest.json: what a complete bundle consists of."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bitwright.compiler.errors import UsageError
from bitwright.targets.schema import Profile

MANIFEST_FILE = "manifest.json"
PACKAGES = ("bitwright", "onnx", "onnx-ir", "onnxruntime", "numpy", "apache-tvm", "apache-tvm-ffi")


class FileRecord(BaseModel):
    """One file of the bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str
    bytes: int


class Manifest(BaseModel):
    """The content of manifest.json.

    Attributes:
        format: Tells a bundle from any other folder.
        version: Of this layout.
        files: Path below the bundle, with ``/`` -> size and hash; every file but the manifest itself.
        versions: Package or tool -> version that made the bundle.
        profile: The whole target profile.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: str = "bitwright-bundle"
    version: int = 1
    files: dict[str, FileRecord]
    versions: dict[str, str]
    profile: dict[str, Any]

    def load_profile(self) -> Profile:
        """Return the profile the bundle was compiled for."""
        # Through JSON text: a strict model takes lists for tuples only there.
        return Profile.model_validate_json(json.dumps(self.profile))


def hash_file(path: Path) -> FileRecord:
    """Return the size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(sha256=digest, bytes=path.stat().st_size)


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape a bundle."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe(folder: Path, profile: Mapping[str, Any], tools: Mapping[str, str]) -> Manifest:
    """Return the manifest of everything below ``folder``.

    Args:
        folder: The bundle being written.
        profile: ``Profile.dump()``.
        tools: Further tools and their versions, e.g. ``{"linker": "gcc 12.2"}``.
    """
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = {name: hash_file(folder / name) for name in names if name != MANIFEST_FILE}
    return Manifest(files=files, versions={**package_versions(), **tools}, profile=dict(profile))


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json; the files it names are not looked at.

    Raises:
        UsageError: There is none, or it is damaged or from a newer version.
    """
    where = str(folder / MANIFEST_FILE)
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except OSError as error:
        msg = "not a bitwright output folder: it has no readable manifest.json"
        raise UsageError(
            msg,
            where=str(folder),
            fix="give the folder that 'bitwright compile -o' wrote",
        ) from error
    except ValidationError as error:
        msg = f"the manifest is damaged: {error.errors()[0]['msg']}"
        raise UsageError(msg, where=where) from error
    if manifest.format != "bitwright-bundle" or manifest.version != 1:
        msg = f"unknown bundle format {manifest.format} {manifest.version}"
        raise UsageError(msg, where=where)
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest.

    Raises:
        UsageError: A file is missing or was changed.
    """
    for name, record in manifest.files.items():
        where = f"{folder}: {name}"
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            msg = "the manifest names a file outside the bundle"
            raise UsageError(msg, where=where)
        if not (folder / pure).is_file():
            msg = "the bundle is incomplete: this file is missing"
            raise UsageError(msg, where=where, fix="compile again")
        if hash_file(folder / pure) != record:
            msg = "this file was changed after the bundle was written"
            raise UsageError(msg, where=where, fix="compile again")
