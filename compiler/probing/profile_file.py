"""The profile that a probe writes: it extends the measured target and adds times and where they come from."""

from __future__ import annotations

import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from bitwright import __version__
from bitwright.compiler.errors import UsageError, nearest
from bitwright.compiler.plan.planner import RuntimeName
from bitwright.targets.loader import load_profile, profile_names
from bitwright.targets.schema import MeasuredTimes, Profile
from bitwright.targets.verbs import write_new

PACKAGES = {"onnxruntime": ("onnxruntime",), "artifact": ("apache-tvm",)}
WIDTH = 160


def versions(runtime: RuntimeName) -> dict[str, str]:
    """Return the versions that decide the times of a runtime."""
    return {"bitwright": __version__, **{name: version(name) for name in PACKAGES[runtime]}}


def today() -> str:
    """Return the ISO date."""
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def default_output(target: str) -> Path:
    """Return where the profile goes unless the user says: beside a profile file, else here."""
    if target in profile_names():
        return Path(f"{target}-measured.yaml")
    path = Path(target)
    return path.with_name(f"{path.stem}-measured.yaml")


def base_of(target: str, output: Path) -> str:
    """Return what the written profile extends.

    Raises:
        UsageError: The target is a file in another folder, or the output is no new .yaml file.
    """
    if output.suffix not in (".yaml", ".yml"):
        msg = "a profile's file name ends in .yaml"
        raise UsageError(msg, where=f"--output {output}", fix=f"write {output.name}.yaml")
    if output.exists():
        msg = "the file exists already"
        raise UsageError(msg, where=f"--output {output}", fix="choose another name")
    if target in profile_names():
        return target
    path = Path(target)
    if path.suffix not in (".yaml", ".yml"):
        what = f"unknown target '{target}'"
        raise UsageError(what, fix=nearest(target, profile_names()))
    if path.resolve().parent != output.resolve().parent:
        what = f"it would extend '{path.name}', which lies in another folder"
        raise UsageError(what, where=f"--output {output}", fix=f"write {path.with_name(output.name)}")
    return path.name


def write_profile(
    profile: Profile, base: str, runtime: RuntimeName, times: MeasuredTimes, source: str, path: Path
) -> Profile:
    """Write the profile, and read it back.

    Args:
        profile: What was measured.
        base: What the new profile extends.
        runtime: Which runtime was measured.
        times: The measurements.
        source: How they were made, for the provenance.
        path: A new file; an existing one is not overwritten.

    Raises:
        UsageError: The file exists, or cannot be written.
    """
    record: dict[str, Any] = {
        "schema": 1,
        "name": path.stem.lower(),
        "extends": base,
        "description": f"{profile.description.rstrip('.')}; with measured times."[:200],
        "provenance": {"measured": {"source": source, "confidence": "measured", "date": times.date}},
        "measured": {runtime: times.model_dump(mode="json")},
    }
    text = yaml.safe_dump(record, sort_keys=False, width=WIDTH, default_flow_style=None)
    write_new(path, "# Written by 'bitwright targets probe'.\n" + text)
    return load_profile(path)
