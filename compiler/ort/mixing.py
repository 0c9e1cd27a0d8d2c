"""Which node of a model lets the elements of a batch influence each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from bitwright.compiler.ort.equality import largest_difference
from bitwright.compiler.ort.session import SessionConfig, open_session, run


def first_mixing_node(
    model: ir.Model,
    together: Mapping[str, np.ndarray],
    apart: Sequence[Mapping[str, np.ndarray]],
    *,
    bound: float,
    threads: int,
) -> ir.Node | None:
    """Return the first node that computes something else for a batch than for each of its elements.

    Args:
        model: Free in the size of the batch.
        together: Inputs of the batch.
        apart: Inputs of its elements.
        bound: Largest difference that is rounding, as a share of the largest value.
        threads: Of the session.
    """
    shown = model.clone()
    known = {value.name for value in shown.graph.outputs}
    inner = [value for node in shown.graph for value in node.outputs if value.name not in known]
    shown.graph.outputs.extend(value for value in inner if value.name and value.dtype is not None)
    session = open_session(shown, SessionConfig(threads=threads))
    whole, parts = run(session, together), [run(session, feeds) for feeds in apart]
    for node in model.graph:
        names = [value.name for value in node.outputs if value.name in whole]
        if not all(_is_joined(whole[name], [part[name] for part in parts], bound) for name in names):
            return node
    return None


def _is_joined(whole: np.ndarray, parts: Sequence[np.ndarray], bound: float) -> bool:
    """Tell whether one array is several put together along some axis, or no element of the batch is in it."""
    expected = [parts[0], *(np.concatenate(parts, axis) for axis in range(whole.ndim))]
    fitting = [array for array in expected if array.shape == whole.shape]
    return any(largest_difference({"": whole}, {"": array}) <= bound for array in fitting)
