"""Running a float model in ONNX Runtime so that chosen intermediate tensors come out, at the least memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass

from bitwright.compiler.errors import DataError, ModelError, UsageError, nearest
from bitwright.compiler.graph.saving import loadable

ORT_ERRORS = (
    ort.capi.onnxruntime_pybind11_state.Fail,
    ort.capi.onnxruntime_pybind11_state.InvalidArgument,
    ort.capi.onnxruntime_pybind11_state.InvalidGraph,
    ort.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    ort.capi.onnxruntime_pybind11_state.NotImplemented,
    ort.capi.onnxruntime_pybind11_state.RuntimeException,
)


@dataclass(frozen=True)
class ObservedModel:
    """An open session whose outputs are exactly the observed tensors.

    Attributes:
        session: The session; None when only graph inputs are observed, which need no run.
        inputs: Names of the session's inputs.
        computed: Observed tensors that the session computes.
        fed: Observed tensors that are graph inputs.
    """

    session: ort.InferenceSession | None
    inputs: tuple[str, ...]
    computed: tuple[str, ...]
    fed: tuple[str, ...]

    def run(self, feeds: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """Run one batch and yield each observed tensor once; a yielded array is not kept.

        Raises:
            DataError: An input is missing, or ONNX Runtime refuses the batch.
        """
        missing = [n for n in (*self.inputs, *self.fed) if n not in feeds]
        if missing:
            msg = f"the data have no array for input '{missing[0]}'"
            raise DataError(
                msg,
                where="calibration data",
                fix=f"name the arrays like the model's inputs; found: {', '.join(sorted(feeds)) or 'none'}",
            )
        for name in self.fed:
            yield name, feeds[name]
        values = self._compute(feeds)
        for name in reversed(self.computed):
            yield name, values.pop()

    def _compute(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if self.session is None:
            return []
        try:
            found: list[np.ndarray] = self.session.run(
                list(self.computed), {n: feeds[n] for n in self.inputs}
            )
        except ORT_ERRORS as error:
            msg = f"ONNX Runtime cannot run the model on a batch of the data: {error}"
            raise DataError(
                msg,
                where="calibration data",
                fix="check the shapes and types of the arrays against the model's inputs",
            ) from error
        return found


@contextmanager
def observe(model: ir.Model, tensors: Sequence[str], *, threads: int = 1) -> Iterator[ObservedModel]:
    """Open a copy of ``model`` that computes ``tensors`` and nothing else; the model itself is not changed.

    Args:
        model: A float model.
        tensors: Names of graph inputs or node outputs of the main graph, in any order.
        threads: Threads of one operator.

    Raises:
        UsageError: A name is unknown, or names a constant.
        ModelError: ONNX Runtime refuses the model.
    """
    check_names(model, tensors)
    inputs = {v.name for v in model.graph.inputs}
    fed = tuple(t for t in tensors if t in inputs)
    computed = tuple(t for t in tensors if t not in inputs)
    if not computed:
        yield ObservedModel(None, (), (), fed)
        return
    session = _open(_with_outputs(model, computed), threads)
    yield ObservedModel(session, tuple(i.name for i in session.get_inputs()), computed, fed)


def check_names(model: ir.Model, tensors: Sequence[str]) -> None:
    """Refuse names that are not activations of the main graph.

    Raises:
        UsageError: Names the first such tensor and the nearest activation.
    """
    constants = set(model.graph.initializers)
    known = {v.name for v in model.graph.inputs if v.name}
    known |= {v.name for node in model.graph for v in node.outputs if v.name}
    for name in tensors:
        if name in constants:
            msg = "the tensor is a constant; its range is known without data"
            raise UsageError(
                msg,
                where=f"tensor '{name}'",
                fix="leave it out of the calibrated set",
            )
        if name not in known:
            msg = "the main graph has no activation of this name"
            raise UsageError(
                msg,
                where=f"tensor '{name}'",
                fix=nearest(name, sorted(known)),
            )


def _with_outputs(model: ir.Model, tensors: Sequence[str]) -> ir.Model:
    """Return a copy that shares the weights, outputs ``tensors`` only, and has lost what they do not need."""
    copy = model.clone()
    values = {v.name: v for node in copy.graph for v in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[t] for t in tensors)
    RemoveUnusedNodesPass()(copy)
    return copy


def _open(model: ir.Model, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Observed tensors are outputs, which no optimization may remove.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # The arena keeps the largest batch's memory until the end and is no faster here.
    options.enable_cpu_mem_arena = False
    try:
        with loadable(model) as source:
            return ort.InferenceSession(source, sess_options=options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        msg = f"ONNX Runtime cannot load the model with its intermediate tensors as outputs: {error}"
        raise ModelError(
            msg,
            where=model.graph.name or "model",
            fix="run the float model in ONNX Runtime first; only models it executes can be calibrated",
        ) from error
