"""The normalization of a model, as one readable list, and its specialization to fixed shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from bitwright.compiler.errors import InternalError
from bitwright.passes.canonicalize_linear import CanonicalizeLinear
from bitwright.passes.contract import Pass, PassResult
from bitwright.passes.convert_float16 import ConvertFloat16
from bitwright.passes.deduplicate_initializers import DeduplicateInitializers
from bitwright.passes.fix_dims import FixDims
from bitwright.passes.fold_batchnorm import FoldBatchNorm
from bitwright.passes.fold_constants import FoldConstants
from bitwright.passes.fold_conv_add import FoldConvAdd
from bitwright.passes.fold_shape_reads import FoldShapeReads
from bitwright.passes.freeze_default_inputs import FreezeDefaultInputs
from bitwright.passes.group_queries import GroupQueries
from bitwright.passes.infer_shapes import InferShapes
from bitwright.passes.inline_functions import InlineFunctions
from bitwright.passes.lift_constants import LiftConstants
from bitwright.passes.mean_to_pool import MeanToPool
from bitwright.passes.merge_data_movement import MergeDataMovement
from bitwright.passes.name_nodes import NameNodes
from bitwright.passes.raise_opset import RaiseOpset
from bitwright.passes.remove_identity import RemoveIdentity
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.sort_nodes import SortNodes
from bitwright.passes.split_packed_attention import SplitPackedAttention

MAX_ROUNDS = 6
DEFAULT_OPSET = 21


def normalization_passes(opset: int = DEFAULT_OPSET) -> tuple[Pass, ...]:
    """Return the passes that bring any model into the form the later phases expect, in order."""
    return (
        InlineFunctions(),
        RaiseOpset(opset),
        FreezeDefaultInputs(),
        LiftConstants(),
        NameNodes(),
        InferShapes(),
        ConvertFloat16(),
        *simplification_passes(),
        FoldBatchNorm(),
        FoldConvAdd(),
        SplitPackedAttention(),
        CanonicalizeLinear(),
        MeanToPool(),
        *tidying_passes(),
    )


def simplification_passes() -> tuple[Pass, ...]:
    """Return the passes that remove arithmetic on constants and nodes without effect."""
    return (
        RemoveIdentity(),
        FoldShapeReads(),
        FoldConstants(),
        LiftConstants(),
        MergeDataMovement(),
        RemoveIdentity(),
    )


def tidying_passes() -> tuple[Pass, ...]:
    """Return the passes that clean up behind rewrites."""
    return (RemoveUnused(), DeduplicateInitializers(), SortNodes(), NameNodes())


def normalize(model: ir.Model, opset: int = DEFAULT_OPSET) -> PassResult:
    """Bring ``model`` into normal form at ``opset``; a model above it keeps its own.

    Returns:
        The model, how many rewrites fired, and the notes of all passes, each behind its pass's name.

    Raises:
        ModelError: The model cannot be converted; the message names the node.
    """
    return run_to_fixed_point(normalization_passes(opset), model)


def specialize(model: ir.Model, dims: Mapping[str, int]) -> PassResult:
    """Fix dynamic input dimensions and fold what becomes constant; quantizers stay where they are.

    Args:
        model: A normalized model, quantized or not, edited in place.
        dims: Dimension name (or ``input:axis``) -> size.

    Returns:
        The model; where a value still has no static shape, a note names the node that makes it.

    Raises:
        UsageError: A name is no dynamic dimension of the model's inputs, or a size is not positive.
    """
    fixed = FixDims(dict(dims)).run(model)
    steps = (InferShapes(), *simplification_passes(), GroupQueries(), *tidying_passes())
    folded = run_to_fixed_point(steps, model)
    notes = (*folded.notes, *(f"specialize: {line}" for line in _still_dynamic(model)))
    return PassResult(model, fixed.changed + folded.changed, notes)


def run_to_fixed_point(passes: Sequence[Pass], model: ir.Model) -> PassResult:
    """Run the list again and again until no pass changes anything.

    Raises:
        InternalError: Passes undo each other, so that the model never settles.
    """
    changed, notes = 0, dict[str, None]()
    for _ in range(MAX_ROUNDS):
        results = [(step.name, step.run(model)) for step in passes]
        notes.update(dict.fromkeys(f"{name}: {note}" for name, result in results for note in result.notes))
        changed += sum(result.changed for _, result in results)
        if not any(result.changed for _, result in results):
            return PassResult(model, changed, tuple(notes))
    restless = ", ".join(name for name, result in results if result.changed)
    msg = f"the model does not settle: after {MAX_ROUNDS} rounds these still change it: {restless}"
    raise InternalError(msg)


def _still_dynamic(model: ir.Model) -> list[str]:
    return [
        f"'{output.name}' ({node.op_type}) has no static shape"
        for node in model.graph
        for output in node.outputs
        if output.name and (output.shape is None or not output.shape.is_static())
    ]
