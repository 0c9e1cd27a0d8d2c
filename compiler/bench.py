"""``bench``: two models take turns in ONNX Runtime; a bundle's artifact against its own model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright.compiler.bundle.bundle import MODEL_FILE, Bundle
from bitwright.compiler.bundle.manifest import MANIFEST_FILE
from bitwright.compiler.errors import DataError, UsageError
from bitwright.compiler.ingest.dataset import open_dataset, random_dataset
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.ort.session import SessionConfig, open_session
from bitwright.compiler.ort.timing import time_paired

TIMED_SAMPLES = 4
ARTIFACT_CALLS = 50
SESSION_KEYS = ("providers", "graph_optimization_level", "session_config_entries", "disabled_optimizers")

Samples = list[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Contestant:
    """A model to be timed.

    Attributes:
        label: What the user called it.
        path: Its .onnx file.
        model: The model.
        config: Session options: those of the .session.json beside it, if there is one.
        session_file: That file, or None.
        bundle: The bundle it is in, or None.
    """

    label: str
    path: Path
    model: ir.Model
    config: SessionConfig
    session_file: Path | None
    bundle: Bundle | None = None


@dataclass(frozen=True)
class BenchResult:
    """Two ways of running a model, timed.

    Attributes:
        first: Label of the candidate.
        second: Label of the reference.
        ratio: Time of the first over time of the second.
        spread: Interquartile range of the ratio; None where the two could not take turns.
        first_s: Best seconds of one call of the first.
        second_s: Best seconds of one call of the second.
        data: What the samples are.
        notes: How each was run.
    """

    first: str
    second: str
    ratio: float
    spread: float | None
    first_s: float
    second_s: float
    data: str
    notes: tuple[str, ...] = ()


def load_session_config(path: Path) -> SessionConfig:
    """Return the session options of a .session.json, for one thread.

    Raises:
        UsageError: The file is no such JSON, or holds keys or values that are not known.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        what = f"cannot be read as JSON: {error}"
        raise UsageError(what, where=str(path), fix="quantize the model again, or remove the file") from error
    problem = _problem(record)
    if problem:
        raise UsageError(problem, where=str(path), fix=f"known keys: {', '.join(SESSION_KEYS)}")
    return SessionConfig(
        threads=1,
        optimize=record.get("graph_optimization_level", "ORT_ENABLE_ALL") == "ORT_ENABLE_ALL",
        session_config_entries=record.get("session_config_entries", {}),
        disabled_optimizers=record.get("disabled_optimizers", []),
        provider=record.get("providers", ["CPUExecutionProvider"])[0],
    )


def _problem(record: Any) -> str:
    """Return which rule of a .session.json is broken, or ""."""
    if not isinstance(record, dict):
        return "is not a JSON object"
    unknown = [key for key in record if key not in SESSION_KEYS]
    if unknown:
        return f"unknown key '{unknown[0]}'"
    if record.get("graph_optimization_level", "ORT_ENABLE_ALL") not in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL"):
        return "'graph_optimization_level' must be ORT_ENABLE_ALL or ORT_DISABLE_ALL"
    if not _texts(record.get("providers", [""])) or not record.get("providers", [""]):
        return "'providers' must be a list of names"
    if not _texts(record.get("disabled_optimizers", [])):
        return "'disabled_optimizers' must be a list of names"
    entries = record.get("session_config_entries", {})
    if not isinstance(entries, dict) or not _texts(list(entries.values())):
        return "'session_config_entries' must map names to strings"
    return ""


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, str) for v in values)


def contestant(path: str | Path) -> Contestant:
    """Open an .onnx file or a bundle for timing.

    Raises:
        BitwrightError: It is neither, or is refused.
    """
    given = Path(path)
    bundle = Bundle.open(given) if given.is_dir() or (given / MANIFEST_FILE).is_file() else None
    file = given if bundle is None else given / MODEL_FILE
    session = file.with_name(file.name.removesuffix(".onnx") + ".session.json")
    found = session if session.is_file() else None
    config = load_session_config(session) if found else SessionConfig(threads=1)
    return Contestant(str(path), file, read_model(file).model, config, found, bundle)


def bench(first: str | Path, second: str | Path | None = None, *, data: str | None = None) -> BenchResult:
    """Time two models, or a bundle's artifact against its model in ONNX Runtime.

    Args:
        first: An .onnx file or a bundle: the candidate.
        second: Another: the reference. None times the artifact of the bundle ``first``.
        data: Samples as the command line names them; without, a bundle's golden inputs, else random ones.

    Raises:
        BitwrightError: A model is refused, the two differ in their inputs, or there is no artifact to run here.
    """
    a = contestant(first)
    if second is None:
        return _bench_artifact(a)
    b = contestant(second)
    _check_inputs(a, b)
    samples, source = _samples(a, b, data)
    timing = time_paired(open_session(a.path, a.config), open_session(b.path, b.config), samples)
    notes = (_how(a), _how(b))
    return BenchResult(
        a.label, b.label, timing.ratio, timing.spread, timing.first_s, timing.second_s, source, notes
    )


def _how(c: Contestant) -> str:
    options = "default session options" if c.session_file is None else f"options of {c.session_file.name}"
    return f"{c.label}: {c.config.provider}, one thread, {options}"


def _inputs(c: Contestant) -> dict[str, str]:
    return {v.name or "": "?" if v.dtype is None else v.dtype.name.lower() for v in c.model.graph.inputs}


def _check_inputs(a: Contestant, b: Contestant) -> None:
    """Refuse two models that cannot take the same samples."""
    if _inputs(a) != _inputs(b):
        ours, theirs = (", ".join(f"{k}: {v}" for k, v in _inputs(c).items()) for c in (a, b))
        what = f"the two models take different inputs ({ours}; {theirs})"
        raise DataError(what, where=f"{a.label}, {b.label}", fix="compare two forms of the same model")


def _samples(a: Contestant, b: Contestant, data: str | None) -> tuple[Samples, str]:
    if data is not None:
        return list(islice(open_dataset(data, a.model).batches(1), TIMED_SAMPLES)), data
    bundle = a.bundle or b.bundle
    if bundle is not None and (golden := list(bundle.golden())):
        return [g.inputs for g in golden[:TIMED_SAMPLES]], "golden inputs"
    return list(random_dataset(a.model, TIMED_SAMPLES, seed=0).batches(1)), "random inputs"


def _bench_artifact(c: Contestant) -> BenchResult:
    if c.bundle is None:
        what = "there is nothing to compare it with"
        raise UsageError(what, where=c.label, fix="give a second model, or a bundle whose artifact is timed")
    reason = c.bundle.why_not_executable()
    if reason:
        msg = f"its artifact cannot be timed here: {reason}"
        raise UsageError(msg, where=c.label, fix="give a second model")
    golden = next(c.bundle.golden(), None)
    if golden is None:
        msg = "the bundle holds no golden inputs"
        raise UsageError(msg, where=c.label, fix="give a second model")
    execution = c.bundle.execute(golden.inputs, repeat=ARTIFACT_CALLS)
    if execution.seconds is None:
        msg = "the time of an emulated artifact means nothing"
        raise UsageError(msg, where=c.label, fix="give a second model")
    session = open_session(c.path, c.config)
    own = time_paired(session, session, [golden.inputs]).second_s
    notes = ("the two ran one after the other: wall time of the artifact, CPU time of ONNX Runtime", _how(c))
    names = (f"{c.label} (artifact)", f"{c.label} (ONNX Runtime)")
    return BenchResult(*names, execution.seconds / own, None, execution.seconds, own, "golden inputs", notes)
