"""How a bad model is refused: at once, with file, place, rule and fix; and how a good one is accepted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from bitwright.compiler.errors import ModelError
from bitwright.compiler.ingest.limits import Limits
from bitwright.compiler.ingest.model_reader import read_model

from . import build
from .memory import takes_at_most


@contextmanager
def cheap_refusal() -> Iterator[pytest.ExceptionInfo[ModelError]]:
    """Expect a ModelError that comes quickly and without taking memory, whatever the file claims."""
    start = time.monotonic()
    with takes_at_most(200_000), pytest.raises(ModelError) as caught:
        yield caught
    assert time.monotonic() - start < 5.0


def refusal(path: Path, *needles: str, limits: Limits | None = None) -> str:
    """Read a bad model, check the form of the refusal, and return its text."""
    started = time.process_time()
    with pytest.raises(ModelError) as caught:
        read_model(path, limits or Limits())
    # Processor time, so that a loaded machine does not matter: no work may grow with what the file claims.
    assert time.process_time() - started < 1.0
    error = caught.value
    assert error.exit_code == 3
    assert error.where.startswith(str(path))
    assert error.fix
    for needle in needles:
        assert needle in error.message, error.message
    return error.message


def refuse(model: onnx.ModelProto, folder: Path, *needles: str, limits: Limits | None = None) -> str:
    return refusal(build.write(model, folder), *needles, limits=limits)


def accept(model: onnx.ModelProto, folder: Path) -> tuple[ir.Model, tuple[str, ...]]:
    source = read_model(build.write(model, folder))
    onnx.checker.check_model(ir.to_proto(source.model), full_check=True)
    return source.model, source.warnings
