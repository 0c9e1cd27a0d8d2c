"""What ``bitwright targets ...`` does: plain functions that return data; the command line prints it."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import yaml

from bitwright.compiler.errors import ProfileError, UsageError, nearest
from bitwright.targets.extends import OWN_KEYS
from bitwright.targets.loader import inspect_profile, load_profile, profile_names
from bitwright.targets.schema import NAME_PATTERN, Profile
from bitwright.targets.schema_errors import Finding

SCHEMA_URI = "https://json-schema.org/draft/2020-12/schema"


def show(name_or_path: str | Path) -> str:
    """Return a profile as YAML with everything it extends written out; the text loads to the same profile.

    Raises:
        ProfileError: The profile is unknown or broken.
    """
    return dump(load_profile(name_or_path))


def dump(profile: Profile) -> str:
    """Return a profile as YAML text that loads back to an equal profile."""
    return yaml.dump(profile.dump(), Dumper=_Dumper, sort_keys=False, width=110, default_flow_style=None)


class _Dumper(yaml.SafeDumper):
    """Writes no anchors: the reader refuses them."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value out every time it occurs."""
        return True


def check(path: str | Path) -> list[Finding]:
    """Return every broken rule of a profile, nothing if it is good."""
    try:
        return list(inspect_profile(path).findings)
    except ProfileError as error:
        return [Finding(error.where, error.what, error.fix)]


def new(name: str, like: str, path: Path) -> Path:
    """Write a new profile that extends a shipped one, to be edited.

    Args:
        name: The new profile's name.
        like: The shipped profile it starts from.
        path: The file to write; an existing file is never overwritten.

    Returns:
        ``path``.

    Raises:
        UsageError: The file exists or its folder does not.
        ProfileError: ``like`` is unknown, or ``name`` is not a profile name.
    """
    known = profile_names()
    if like not in known:
        msg = f"unknown target '{like}'"
        raise ProfileError(msg, fix=nearest(like, known))
    if re.fullmatch(NAME_PATTERN, name) is None:
        fix = "use lower-case letters, digits, '-', '_' and '.', at most 64"
        msg = f"'{name}' is not a profile name"
        raise ProfileError(msg, fix=fix)
    if path.suffix not in (".yaml", ".yml"):
        msg = "a profile's file name ends in .yaml"
        raise UsageError(msg, where=str(path), fix=f"write {path.name}.yaml")
    write_new(path, _template(name, load_profile(like)))
    return path


def _template(name: str, base: Profile) -> str:
    lines = [
        "# Every key is explained in docs/target-profile.md; 'bitwright targets check FILE' finds mistakes.",
        "schema: 1",
        f"name: '{name}'",
        f"extends: {base.name}",
        f"description: '{name}, started from {base.name}.'",
        yaml.safe_dump({"clock_hz": base.clock_hz}).strip(),
        f"cores: {base.cores}",
        f"codegen: {{mcpu: {base.codegen.mcpu}}}",
        "provenance:",
        f"  clock_hz: {{source: 'copied from {base.name}; replace', confidence: estimate}}",
    ]
    return "\n".join(lines) + "\n"


def write_new(path: Path, text: str) -> None:
    """Write a file that must not exist yet; readers see all of it or nothing.

    Raises:
        UsageError: The file exists, or its folder cannot be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        msg = f"cannot write here ({error.strerror})"
        raise UsageError(msg, where=str(path), fix="create the folder") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(temporary).chmod(0o644)
        os.link(temporary, path)  # fails if the name is taken, unlike a rename
    except FileExistsError as error:
        msg = "the file exists already"
        raise UsageError(msg, where=str(path), fix="choose another name") from error
    except OSError as error:
        what = f"cannot write here ({error.strerror})"
        raise UsageError(
            what, where=str(path), fix="choose a folder on a file system with hard links"
        ) from error
    finally:
        Path(temporary).unlink()


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a profile file, for editors.

    A file may leave out whatever it inherits, so nothing but ``schema`` is required, ``null`` deletes a key,
    and rows of a list need only their name.
    """
    schema = Profile.model_json_schema(by_alias=True)
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
        for key, value in part.get("properties", {}).items():
            if isinstance(value.get("additionalProperties"), dict):
                value["additionalProperties"] = _or_null(value["additionalProperties"])
            part["properties"][key] = _or_null(value) if key not in OWN_KEYS else value
    for row in ("ComputeRow", "MemoryLevel"):
        schema["$defs"][row]["properties"]["remove"] = {"const": True, "title": "Remove"}
        schema["$defs"][row]["required"] = ["name"]
    schema["properties"] |= {
        "extends": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
        "abstract": {"type": "boolean", "default": False},
    }
    schema["required"] = ["schema"]
    return {"$schema": SCHEMA_URI, "title": "Bitwright target profile", **_without(schema, "title")}


def _or_null(value: dict[str, Any]) -> dict[str, Any]:
    if {"type": "null"} in value.get("anyOf", []):
        return value
    return {"anyOf": [value, {"type": "null"}]}


def _without(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in mapping.items() if k != key}
