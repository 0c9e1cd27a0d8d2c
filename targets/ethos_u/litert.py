"""Executing a TFLite file by TensorFlow Lite's reference kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from bitwright.compiler.errors import ToolchainError


def run_reference(path: Path, feeds: Mapping[str, np.ndarray], *, everything: bool) -> dict[str, np.ndarray]:
    """Execute a file.

    Args:
        path: The file.
        feeds: Name of an input tensor of the file -> integers as they are stored.
        everything: Return every activation, not the outputs alone.

    Returns:
        Name of a tensor of the file -> integers as they are stored.

    Raises:
        ToolchainError: LiteRT is missing, or refuses the file.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError as error:
        what = "LiteRT, which has the reference kernels, is not installed"
        raise ToolchainError(what, fix="pip install 'bitwright[ethos-u]'") from error
    try:
        with _quiet():
            session = Interpreter(
                str(path),
                experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
                experimental_preserve_all_tensors=everything,
                num_threads=1,
            )
            session.allocate_tensors()
            for detail in session.get_input_details():
                session.set_tensor(detail["index"], feeds[detail["name"]])
            session.invoke()
    except (RuntimeError, ValueError) as error:
        what = f"TensorFlow Lite's reference kernels do not execute the file: {error}"
        raise ToolchainError(what, where=str(path)) from error
    details = session.get_tensor_details() if everything else session.get_output_details()
    results = {}
    for detail in details:
        with contextlib.suppress(ValueError):  # a tensor without data, e.g. a kernel's own
            results[str(detail["name"])] = np.array(session.get_tensor(detail["index"]))
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the library prints about itself off the user's terminal."""
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
