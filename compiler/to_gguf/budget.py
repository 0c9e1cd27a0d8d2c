"""Our own mixture: a type for every matrix, of least predicted loss under a number of bits for each weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.allocate.problem import Budget, Choice, Group, Problem, Totals
from bitwright.compiler.allocate.solve import allocate
from bitwright.compiler.calibrate.stream import Dataset
from bitwright.compiler.errors import DataError, InfeasibleBudgetError, UsageError
from bitwright.compiler.gguf import types
from bitwright.compiler.gguf.rounding import dequantize, quantize, square_error
from bitwright.compiler.gguf.types import F32, TensorType
from bitwright.compiler.llama.decoder import Decoder
from bitwright.compiler.llama.tensors import ModelTensor, in_graph
from bitwright.compiler.ort.session import SessionConfig, open_session, run

CANDIDATES = (
    types.Q2_K, types.Q3_K, types.Q4_K, types.Q5_K, types.Q6_K, types.Q8_0, types.IQ4_NL, types.Q4_0, types.Q4_1,
    types.Q5_0, types.Q5_1,
)  # fmt: skip
# The perturbation by which a matrix's effect on the model is measured; errors of other types are scaled to it.
PROBE = types.Q4_K
JUDGING = 8
LOSS_UNIT = 1e3
# Rows of a matrix that its errors are taken from; more say nothing new.
ERROR_WEIGHTS = 1 << 21

Importance = Mapping[str, NDArray[np.float64]]
Progress = Callable[[int, int], None]


def spend(
    tensors: Sequence[ModelTensor], importance: Importance, sensitivities: Mapping[str, float], bits: float,
    *, threads: int = 1, progress: Progress | None = None,
) -> dict[str, TensorType]:  # fmt: skip
    """Choose the types of all tensors.

    A matrix's loss in a type is its measured sensitivity (:func:`measure`) times the type's weighted square error
    over that of the probe: for small errors a Kullback-Leibler divergence is quadratic in them. Losses of matrices
    add up; the sum is minimised exactly.

    Args:
        tensors: All tensors of the file.
        importance: Mean squares of inputs, by tensor.
        sensitivities: Loss of each matrix in the probe's type.
        bits: Of all tensors' bytes for each element, vectors included.
        threads: For rounding.
        progress: Called with (matrices done, all matrices).

    Raises:
        InfeasibleBudgetError: Even the smallest types take more.
    """
    matrices = [t for t in tensors if t.is_matrix]
    # Divergences of good types are far below the solver's tolerances; only their proportions matter.
    largest = max((sensitivities[t.name] for t in matrices), default=0.0) or 1.0
    groups = []
    for done, tensor in enumerate(matrices, start=1):
        groups.append(
            _group(
                tensor, importance.get(tensor.name), LOSS_UNIT * sensitivities[tensor.name] / largest, threads
            )
        )
        if progress is not None:
            progress(done, len(matrices))
    vectors = sum(4.0 * t.elements for t in tensors if not t.is_matrix)
    limit = bits * sum(t.elements for t in tensors) / 8
    problem = Problem(tuple(groups), fixed=Totals(weight_bytes=vectors))
    found = allocate(problem, Budget(weight_bytes=limit), prices=False)
    chosen = {name: types.BY_NAME[fmt] for name, fmt in found.formats.items()}
    return {t.name: chosen.get(t.name, F32) for t in tensors}


def check_feasible(tensors: Sequence[ModelTensor], bits: float) -> None:
    """Refuse a budget before anything is measured.

    Raises:
        InfeasibleBudgetError: Even the smallest types take more; the message says how much.
    """
    least = sum(
        min(_bytes(t, k) for k in (*CANDIDATES, types.F16) if k.fits(t.shape[1]))
        if t.is_matrix
        else 4 * t.elements
        for t in tensors
    )
    needed = 8 * least / sum(t.elements for t in tensors)
    if needed > bits:
        msg = f"{bits:g} bits a weight are too few: the smallest types take {needed:.3f}"
        raise InfeasibleBudgetError(msg, where="--budget", fix=f"allow bits={needed + 0.01:.2f} or more")


def _group(tensor: ModelTensor, share: NDArray[np.float64] | None, loss: float, threads: int) -> Group:
    """Return what a matrix may be stored as."""
    rows = tensor.load()
    rows = rows[:: max(1, rows.size // ERROR_WEIGHTS)]
    probe = types.fitting(PROBE, tensor.shape[1])
    kinds = [k for k in (*CANDIDATES, types.F16) if k.fits(tensor.shape[1])]
    errors = {
        k: square_error(rows, quantize(rows, k, share, threads=threads), k, share) for k in {*kinds, probe}
    }
    scale = loss / errors[probe] if errors[probe] > 0 else 0.0
    choices = [Choice(k.name, scale * errors[k], weight_bytes=float(_bytes(tensor, k))) for k in kinds]
    return Group(tensor.name, (tensor.name,), tuple(choices))


def _bytes(tensor: ModelTensor, kind: TensorType) -> int:
    return tensor.shape[0] * kind.row_bytes(tensor.shape[1])


def measure(
    model: ir.Model, decoder: Decoder, tensors: Sequence[ModelTensor], dataset: Dataset, importance: Importance,
    *, threads: int = 1, progress: Progress | None = None,
) -> dict[str, float]:  # fmt: skip
    """Measure what rounding each matrix alone to the probe's type does to the model's predictions.

    The matrices become inputs of one session whose defaults are the float weights, so that nothing is loaded twice.

    Returns:
        Mean Kullback-Leibler divergence of the next token's distribution from the float model's, by tensor.

    Raises:
        UsageError: There are no samples.
    """
    samples = [sample for sample, _ in zip(dataset.batches(1), range(JUDGING), strict=False)]
    if not samples:
        msg = "without samples nobody knows which matrices matter"
        raise UsageError(msg, where="--budget", fix="pass --data")
    session = open_session(_with_inputs(model, tensors), SessionConfig(threads=threads))
    name = decoder.logits.name or ""

    def predictions(changed: Mapping[str, NDArray[np.float32]]) -> Iterable[NDArray[np.float32]]:
        for sample in samples:
            yield _log_softmax(run(session, {**sample, **changed})[name])

    expected = list(predictions({}))
    found: dict[str, float] = {}
    matrices = [t for t in tensors if t.is_matrix]
    for done, tensor in enumerate(matrices, start=1):
        kind = types.fitting(PROBE, tensor.shape[1])
        values = dequantize(quantize(tensor.load(), kind, importance.get(tensor.name), threads=threads), kind)
        changed = {v.name or "": a for v, a in in_graph(tensor, values).items()}
        losses = [_divergence(p, q) for p, q in zip(expected, predictions(changed), strict=True)]
        found[tensor.name] = max(float(np.mean(losses)), 0.0)
        if progress is not None:
            progress(done, len(matrices))
    return _checked(found)


def _checked(found: dict[str, float]) -> dict[str, float]:
    bad = next((name for name, loss in found.items() if not np.isfinite(loss)), None)
    if bad is not None:
        msg = f"rounding '{bad}' makes the predictions infinite"
        raise DataError(
            msg, where="calibration data", fix="check the samples: the float model's logits must be finite"
        )
    return found


def _with_inputs(model: ir.Model, tensors: Sequence[ModelTensor]) -> ir.Model:
    """Return a copy whose matrices may be fed; what is not fed keeps its value."""
    names = {v.name for t in tensors if t.is_matrix for v in (*t.tables, *(r.stored() for r in t.readers))}
    copy = model.clone()
    copy.graph.inputs.extend(value for key, value in copy.graph.initializers.items() if key in names)
    return copy


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = logits.reshape(-1, logits.shape[-1]).astype(np.float32)
    flat = flat - flat.max(axis=-1, keepdims=True)
    found: NDArray[np.float32] = flat - np.log(np.exp(flat).sum(axis=-1, keepdims=True))
    return found


def _divergence(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    return float(np.mean(np.sum(np.exp(expected) * (expected - found), axis=-1)))
