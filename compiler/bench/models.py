"""What is given to be timed: .onnx files with their session options, and bundles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright.compiler.bundle.bundle import MODEL_FILE, STATIC_MODEL_FILE, Bundle
from bitwright.compiler.bundle.manifest import MANIFEST_FILE
from bitwright.compiler.errors import DataError, UsageError
from bitwright.compiler.ingest.dataset import open_dataset, random_dataset
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.ort.session import SessionConfig

SESSION_KEYS = (
    "providers",
    "provider_options",
    "graph_optimization_level",
    "session_config_entries",
    "disabled_optimizers",
)
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class GivenModel:
    """A model to be timed in ONNX Runtime.

    Attributes:
        label: What the user called it.
        path: Its .onnx file.
        config: Session options: those of the .session.json beside it, if there is one.
        session_file: That file, or None.
        bundle: The bundle it is in, or None.
    """

    label: str
    path: Path
    config: SessionConfig
    session_file: Path | None
    bundle: Bundle | None = None

    @cached_property
    def model(self) -> ir.Model:
        """The model; read when it is first wanted."""
        return read_model(self.path).model

    @property
    def inputs(self) -> dict[str, str]:
        """Input name -> element type."""
        return {
            v.name or "": "?" if v.dtype is None else v.dtype.name.lower() for v in self.model.graph.inputs
        }

    def how(self) -> str:
        """Return a line on how it is run."""
        options = (
            "default session options" if self.session_file is None else f"options of {self.session_file.name}"
        )
        return f"{self.label}: {self.config.provider}, {options}"


def open_given(path: str | Path) -> GivenModel:
    """Open an .onnx file or a bundle for timing.

    Raises:
        BitwrightError: It is neither, or is refused.
    """
    given = Path(path)
    bundle = Bundle.open(given) if given.is_dir() or (given / MANIFEST_FILE).is_file() else None
    file = given if bundle is None else given / MODEL_FILE
    session = file.with_name(file.name.removesuffix(".onnx") + ".session.json")
    found = session if session.is_file() else None
    config = load_session_config(session) if found else SessionConfig()
    opened = GivenModel(str(path), file, config, found, bundle)
    _ = opened.model  # a broken file is refused here
    return opened


def load_session_config(path: Path) -> SessionConfig:
    """Return the session options of a .session.json.

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
        optimize=record.get("graph_optimization_level", "ORT_ENABLE_ALL") == "ORT_ENABLE_ALL",
        session_config_entries=record.get("session_config_entries", {}),
        disabled_optimizers=record.get("disabled_optimizers", []),
        provider=record.get("providers", ["CPUExecutionProvider"])[0],
        provider_options=record.get("provider_options", [{}])[0],
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
    options = record.get("provider_options", [{}])
    if (
        not isinstance(options, list)
        or len(options) != len(record.get("providers", [""]))
        or not all(isinstance(o, dict) and _texts(list(o.values())) for o in options)
    ):
        return "'provider_options' must map names to strings, for each provider"
    entries = record.get("session_config_entries", {})
    if not isinstance(entries, dict) or not _texts(list(entries.values())):
        return "'session_config_entries' must map names to strings"
    return ""


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, str) for v in values)


def check_same_inputs(a: GivenModel, b: GivenModel) -> None:
    """Refuse two models that cannot take the same samples.

    Raises:
        DataError: Their inputs differ.
    """
    if a.inputs != b.inputs:
        ours, theirs = (", ".join(f"{k}: {v}" for k, v in m.inputs.items()) for m in (a, b))
        what = f"the two models take different inputs ({ours}; {theirs})"
        raise DataError(what, where=f"{a.label}, {b.label}", fix="compare two forms of the same model")


def sample_for(given: GivenModel, data: str | None) -> tuple[Feeds, str]:
    """Return inputs for one call and what they are: of the data, golden ones of the bundle, or random ones.

    An artifact takes one size only, which is that of its static model: samples of other sizes are passed over.

    Raises:
        DataError: No sample fits.
    """
    bundle = given.bundle
    if data is None and bundle is not None and (golden := next(bundle.golden(), None)) is not None:
        return golden.inputs, "golden inputs"
    if data is None:
        return next(iter(random_dataset(given.model, 1, seed=0).batches(1))), "random inputs"
    wanted = None if bundle is None else _static_shapes(bundle)
    for feeds in islice(open_dataset(data, given.model).batches(1), 1000):
        if wanted is None or {k: tuple(v.shape) for k, v in feeds.items()} == wanted:
            return feeds, data
    what = f"no sample has the sizes that the artifact was compiled for ({wanted})"
    raise DataError(what, where=data, fix="leave out --data: the bundle has golden inputs")


def _static_shapes(bundle: Bundle) -> dict[str, tuple[int, ...]]:
    graph = read_model(bundle.path / STATIC_MODEL_FILE).model.graph
    return {v.name or "": tuple(v.shape.numpy()) for v in graph.inputs if v.shape is not None}


def float_model_of(bundle: Bundle) -> Path:
    """Return the float model that a bundle was compiled from: in the working folder or beside the bundle.

    Raises:
        UsageError: It is in neither place, or was changed since.
    """
    record = bundle.report["model"]
    name, digest = str(record["file"]), record["sha256"]
    places = [Path.cwd(), bundle.path.resolve().parent, bundle.path.resolve().parent.parent]
    for folder in places:
        path = folder / name
        if path.is_file() and read_model(path).sha256 == digest:
            return path
    what = f"the float model it was compiled from ({name}) is not found here as it was"
    raise UsageError(what, where=str(bundle.path), fix=f"name it: --against PATH/{name}")
