"""PyTorch to ONNX: export a module, run both, and keep the file only if they agree."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.compiler.bundle.model_files import write_model_atomically
from bitwright.compiler.errors import DataError, ModelError, ToolchainError, UsageError
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.ingest.text import one_line
from bitwright.compiler.ingest.user_code import blaming, is_function_spec, load_function
from bitwright.compiler.ort.session import SessionConfig, open_session, run

# Two float32 runtimes sum in different orders; a wrong export is off by far more than this share of the signal.
AGREEMENT_BOUND = 1e-3


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        path: The ONNX file.
        exporter: Which of PyTorch's exporters made it.
        largest_difference: Largest absolute difference to PyTorch over the largest absolute output.
    """

    path: Path
    exporter: str
    largest_difference: float


def export(spec: str, output: Path, *, opset: int = 21) -> Exported:
    """Export the module that a user's factory returns.

    Args:
        spec: ``MODULE.py:FACTORY``; FACTORY() returns (module, example inputs): a tensor, a tuple of tensors, or a
            dictionary of keyword arguments.
        output: The file to write.
        opset: ONNX opset.

    Raises:
        UsageError: The spec has another form, or names nothing.
        ToolchainError: PyTorch is not installed.
        DataError: The factory raises, or returns something else.
        ModelError: No exporter takes the module, or the exported model computes something else.
    """
    if not is_function_spec(spec):
        what = "is neither a folder nor of the form MODULE.py:FACTORY"
        raise UsageError(
            what, where=spec, fix="e.g. net.py:make, where make() returns (module, example_inputs)"
        )
    if find_spec("torch") is None:
        what = "PyTorch is not installed"
        raise ToolchainError(what, where=f"export {spec}", fix="pip install bitwright[torch]")
    module, inputs = _made(spec)
    with tempfile.TemporaryDirectory(prefix="bitwright-") as folder:
        path = Path(folder) / "model.onnx"
        exporter = _export(module, inputs, path, opset, spec)
        model = read_model(path).model
        difference = _difference(module, inputs, path, spec)
        write_model_atomically(model, output, {})
    return Exported(output, exporter, difference)


def _made(spec: str) -> tuple[Any, tuple[Any, ...] | dict[str, Any]]:
    """Return the module in evaluation mode and its example inputs."""
    torch = import_module("torch")
    function, script = load_function(spec)
    with blaming(script, spec):
        made = function()
    fix = "return (module, example_inputs)"
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], torch.nn.Module):
        what = f"returned {type(made).__name__}, not a module and its example inputs"
        raise DataError(what, where=spec, fix=fix)
    module, given = made
    inputs = (
        given if isinstance(given, dict) else tuple(given) if isinstance(given, tuple | list) else (given,)
    )
    values = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    if not values or not all(isinstance(v, torch.Tensor) for v in values):
        msg = "the example inputs are not tensors"
        raise DataError(msg, where=spec, fix=fix)
    return module.eval(), inputs


def _export(module: Any, inputs: tuple[Any, ...] | dict[str, Any], path: Path, opset: int, spec: str) -> str:
    """Try PyTorch's exporters in order; returns the name of the one that worked."""
    torch = import_module("torch")
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
    # The older exporter makes up names for keyword inputs.
    options = {
        "opset_version": opset,
        "input_names": None if kwargs is None else list(kwargs),
        "verbose": False,
    }
    reasons = []
    for name, dynamo in (("torch.export", True), ("TorchScript", False)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(module, args, str(path), kwargs=kwargs, dynamo=dynamo, **options)
        except Exception as error:  # the exporters raise whatever the module makes them raise
            reasons.append(f"{name}: {one_line(error)}")
        else:
            return name
    what = "PyTorch cannot export the module: " + "; ".join(reasons)
    raise ModelError(what, where=spec, fix="export it by hand, or simplify the module's forward()")


def _difference(module: Any, inputs: tuple[Any, ...] | dict[str, Any], path: Path, spec: str) -> float:
    """Return the relative difference between ONNX Runtime and PyTorch on the example inputs.

    Raises:
        ModelError: It is larger than two float runtimes explain.
    """
    torch = import_module("torch")
    with torch.no_grad():
        result = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    expected = [t.detach().cpu().numpy() for t in _tensors(result)]
    session = open_session(path, SessionConfig(optimize=False))
    actual = list(run(session, _feeds(session, inputs)).values())
    difference = _largest(actual, expected)
    if not difference <= AGREEMENT_BOUND:
        what = f"the exported model differs from PyTorch by {difference:.3g} of its largest output"
        raise ModelError(
            what, where=spec, fix="check forward() for what depends on the data or on random numbers"
        )
    return difference


def _feeds(session: Any, inputs: tuple[Any, ...] | dict[str, Any]) -> dict[str, np.ndarray]:
    names = [i.name for i in session.get_inputs()]
    if isinstance(inputs, dict) and set(names) <= set(inputs):
        return {name: inputs[name].detach().cpu().numpy() for name in names}
    values = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    return {name: value.detach().cpu().numpy() for name, value in zip(names, values, strict=False)}


def _tensors(result: Any) -> Iterator[Any]:
    """Yield the tensors of a result in the order in which exporters list them."""
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, list | tuple):
        for part in result:
            yield from _tensors(part)
    elif result is not None:
        yield result


def _largest(actual: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return the largest relative difference; infinite if the outputs do not even have the same shapes."""
    if [a.shape for a in actual] != [e.shape for e in expected]:
        return float("inf")
    found = [0.0]
    for a, e in zip(actual, expected, strict=True):
        scale = max(float(np.abs(e.astype(np.float64)).max(initial=0.0)), 1e-12)
        found.append(float(np.abs(a.astype(np.float64) - e.astype(np.float64)).max(initial=0.0)) / scale)
    return float(np.max(found))
