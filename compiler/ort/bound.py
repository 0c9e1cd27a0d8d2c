"""A session as a call without arguments: inputs and outputs bound in advance, so that only the model is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnxruntime as ort

from bitwright.compiler.errors import DataError
from bitwright.compiler.ort.session import ORT_ERRORS, run


def bound_call(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
    """Return a call that runs the model on fixed inputs into fixed outputs.

    Args:
        session: An open session.
        feeds: Input name -> array.

    Raises:
        DataError: An input is missing, or the model fails on these inputs.
    """
    missing = [i.name for i in session.get_inputs() if i.name not in feeds]
    if missing:
        what = f"no array was given for the input '{missing[0]}'"
        raise DataError(what, fix="give every input of the model")
    outputs = {k: np.ascontiguousarray(v) for k, v in run(session, feeds).items()}
    inputs = {i.name: np.ascontiguousarray(feeds[i.name]) for i in session.get_inputs()}
    binding = session.io_binding()
    try:
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        session.run_with_iobinding(binding)
    except ORT_ERRORS as error:
        what = f"inputs and outputs cannot be bound: {error}"
        raise DataError(what, fix="give a model whose inputs and outputs are plain tensors") from error
    kept = (inputs, outputs)  # the binding holds addresses only

    def call() -> object:
        session.run_with_iobinding(binding)
        return kept

    return call
