"""A report that was written earlier, and the plan beside it: a bundle's, or those of a quantized .onnx file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.compiler.bundle.bundle import PLAN_FILE, REPORT_FILE, Bundle
from bitwright.compiler.errors import UsageError

LARGEST_FILE = 256 << 20
SECTIONS = ("model", "target", "summary", "phases", "layers", "noise", "advice", "sizes", "float", "warnings")


@dataclass(frozen=True)
class Written:
    """What compile or quantize left for reading.

    Attributes:
        report: The content of the report.
        plan_text: The plan, None if it is not there any more.
        plan: Where the plan is, or was.
        page: The HTML page of a bundle; None for a quantized file, whose page has no fixed name.
        place: The report's own file.
    """

    report: dict[str, Any]
    plan_text: str | None
    plan: Path
    page: Path | None
    place: Path


def companion(model: Path, suffix: str) -> Path:
    """Return the path of a file beside a model: ``q.onnx``, ``.plan.yaml`` -> ``q.plan.yaml``."""
    return model.with_name(model.name.removesuffix(".onnx") + suffix)


def open_written(path: Path) -> Written:
    """Open a bundle's report, or that beside a quantized .onnx file.

    Raises:
        UsageError: There is no report, or it is not one of this version.
    """
    if path.name.endswith(".onnx"):
        return _beside(path)
    bundle = Bundle.open(path)
    text, place = bundle.plan_text, bundle.path / REPORT_FILE
    return Written(
        _checked(bundle.report, place), text, bundle.path / PLAN_FILE, bundle.path / "report.html", place
    )


def _beside(model: Path) -> Written:
    place, plan = companion(model, ".report.json"), companion(model, ".plan.yaml")
    text = _read(place, f"no report is beside {model.name}", "name what 'bitwright quantize -o' wrote")
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"not JSON: {error}"
        raise UsageError(what, where=str(place), fix="quantize the model again") from error
    found = _read(plan, "", "") if plan.is_file() else None
    return Written(_checked(content, place), found, plan, None, place)


def _read(path: Path, missing: str, fix: str) -> str:
    try:
        if not path.is_file():
            raise UsageError(missing, where=str(path), fix=fix)
        if path.stat().st_size > LARGEST_FILE:
            what = f"larger than {LARGEST_FILE >> 20} MiB"
            raise UsageError(what, where=str(path), fix="check that this is the right file")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read: {error}"
        raise UsageError(what, where=str(path), fix="check that this is the right file") from error


def _checked(content: Any, place: Path) -> dict[str, Any]:
    if not isinstance(content, Mapping) or any(name not in content for name in SECTIONS):
        what = "not a report of this version"
        raise UsageError(what, where=str(place), fix="compile or quantize the model again")
    return dict(content)
