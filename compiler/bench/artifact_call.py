"""The artifact of a bundle as a call without arguments, in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from bitwright.compiler.bundle.bundle import LIBRARY_FOLDER
from bitwright.compiler.bundle.segments import SegmentRecord, read_segments
from bitwright.compiler.lower.loaded import LoadedLibrary, load_library
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.targets.toolchain.interface import Interface
from bitwright.targets.toolchain.runner import LIBRARY_FILE
from bitwright.targets.toolchain.shape_rules import Dispatch, ShapeRules

Arrays = Mapping[str, np.ndarray]
Segment = Callable[[Arrays], Arrays]


def artifact_call(bundle: Path, feeds: Arrays, session: SessionConfig) -> Callable[[], object]:
    """Return a call of a bundle's artifact on fixed inputs.

    Args:
        bundle: The bundle's folder.
        feeds: Input name -> array.
        session: Options for the segments that ONNX Runtime executes.

    Raises:
        DataError: ``feeds`` does not fit the model.
        ToolchainError: A library cannot be loaded.
    """
    lib = bundle / LIBRARY_FOLDER
    found, interface, rules = read_segments(lib), Interface.read(lib), ShapeRules.read(lib)
    if rules is not None:
        return _dispatched(lib, rules.dispatch(feeds))
    arrays = interface.arrange(feeds)
    if found is None:
        return load_library(lib / LIBRARY_FILE, lib).bind(arrays)
    segments = [(s, _segment(lib, s, session)) for s in found.segments]
    given = {port.name: array for port, array in zip(interface.inputs, arrays, strict=True)}

    def call() -> object:
        values = dict(given)
        for record, execute in segments:
            values |= execute({name: values[name] for name in record.inputs})
        return values

    return call


def _dispatched(lib: Path, dispatch: Dispatch) -> Callable[[], object]:
    """Return the calls that inputs of one size take in an artifact of several sizes, one after the other."""
    interface = Interface.read(lib / dispatch.function.folder)
    library = load_library(lib / LIBRARY_FILE, lib, interface.function)
    bound = [library.bind(interface.arrange(inputs)) for inputs in dispatch.calls]
    return lambda: [call() for call in bound]


def _segment(lib: Path, record: SegmentRecord, config: SessionConfig) -> Segment:
    if record.executor == "onnxruntime":
        session = open_session(lib / record.path, config)
        return lambda inputs: run(session, inputs)
    folder = lib / record.path
    return _library(load_library(folder / LIBRARY_FILE, lib), Interface.read(folder))


def _library(library: LoadedLibrary, interface: Interface) -> Segment:
    names = [port.name for port in interface.outputs]

    def execute(inputs: Arrays) -> Arrays:
        return dict(zip(names, library.run(interface.arrange(inputs)), strict=True))

    return execute
