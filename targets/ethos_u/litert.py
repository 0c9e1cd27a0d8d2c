"""Executing a TFLite file by TensorFlow Lite's reference kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.compiler.errors import ToolchainError


class ReferenceSession:
    """A file, opened with the reference kernels.

    Args:
        path: The file.
        everything: Return every activation, not the outputs alone.

    Raises:
        ToolchainError: LiteRT is missing, or refuses the file.
    """

    def __init__(self, path: Path, *, everything: bool = False) -> None:
        self._path, self._everything = path, everything
        try:
            from ai_edge_litert.interpreter import Interpreter, OpResolverType
        except ImportError as error:
            what = "LiteRT, which has the reference kernels, is not installed"
            raise ToolchainError(what, fix="pip install 'bitwright[ethos-u]'") from error
        with self._guarded():
            self._session: Any = Interpreter(
                str(path),
                experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
                experimental_preserve_all_tensors=everything,
                num_threads=1,
            )
            self._session.allocate_tensors()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Execute the file once.

        Args:
            feeds: Name of an input tensor of the file -> integers as they are stored.

        Returns:
            Name of a tensor of the file -> integers as they are stored.

        Raises:
            ToolchainError: An input is missing or of another shape or type.
        """
        session = self._session
        with self._guarded():
            for detail in session.get_input_details():
                if detail["name"] not in feeds:
                    msg = f"no value for the input '{detail['name']}'"
                    raise ValueError(msg)
                session.set_tensor(detail["index"], feeds[detail["name"]])
            session.invoke()
        details = session.get_tensor_details() if self._everything else session.get_output_details()
        results = {}
        for detail in details:
            with contextlib.suppress(ValueError):  # a kernel's own tensor, without data
                results[str(detail["name"])] = np.array(session.get_tensor(detail["index"]))
        return results

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn the library's errors into ours, and keep what it prints about itself off the user's terminal."""
        saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        except (RuntimeError, ValueError) as error:
            what = f"TensorFlow Lite's reference kernels do not execute the file: {error}"
            raise ToolchainError(what, where=str(self._path)) from error
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(nowhere)
