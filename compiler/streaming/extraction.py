"""One part of a chain as a model of its own; weights are shared with the whole, not copied."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames
from bitwright.compiler.streaming.chain import Part
from bitwright.passes.convert_float16 import HALF
from bitwright.passes.fold_shape_reads import FoldShapeReads
from bitwright.passes.freeze_default_inputs import FreezeDefaultInputs
from bitwright.passes.infer_shapes import InferShapes
from bitwright.passes.inline_functions import InlineFunctions
from bitwright.passes.lift_constants import LiftConstants
from bitwright.passes.name_nodes import NameNodes
from bitwright.passes.raise_opset import RaiseOpset
from bitwright.passes.remove_unused import RemoveUnused


def prepared(model: ir.Model, opset: int) -> ir.Model:
    """Return a copy that can be cut: the first steps of normalization, those that read no weight.

    Args:
        model: As it was read; not changed.
        opset: Of the standard domain, at least.
    """
    copy = model.clone()
    steps = (
        InlineFunctions(),
        RaiseOpset(opset),
        FreezeDefaultInputs(),
        LiftConstants(),
        NameNodes(),
        InferShapes(),
        FoldShapeReads(),
        RemoveUnused(),
    )
    for step in steps:
        step.run(copy)
    return copy


def part_model(
    model: ir.Model, part: Part, examples: Mapping[str, np.ndarray], entry: ir.Shape | None
) -> ir.Model:
    """Return a part as a model: what enters it are its inputs, what others read its outputs.

    Args:
        model: The whole that the part was cut from; not changed.
        part: One of its parts.
        examples: A value of everything that enters from other parts, for types and ranks that are unknown.
        entry: Shape of the value that enters from the part before, where more is known than the model says.
    """
    copy = model.clone()
    values = {v.name: v for node in copy.graph for v in node.outputs} | {v.name: v for v in copy.graph.inputs}
    names = FreshNames(copy)
    entering = [v for v in (part.entry, *part.shared) if v is not None]
    leaving = [(values[v.name], v.is_graph_output()) for v in part.outputs]
    copy.graph.outputs.clear()
    inputs = [values[v.name] for v in part.inputs]
    for value in entering:
        old, example = values[value.name], examples[value.name or ""]
        new = _described(old, example, entry if value is part.entry else None)
        old.name = names(f"{value.name}_before")
        ir.convenience.replace_all_uses_with(old, _as(copy, new, old.dtype, names))
        inputs.append(new)
    copy.graph.inputs.clear()
    copy.graph.inputs.extend(inputs)
    copy.graph.outputs.extend(v if public else _wide(copy, v, names) for v, public in leaving)
    RemoveUnused().run(copy)
    return copy


def _described(value: ir.Value, example: np.ndarray, shape: ir.Shape | None) -> ir.Value:
    """Return an input of the value's name, of a known type and rank; it is float32 where the value has 16 bits."""
    dtype = value.dtype or ir.DataType.from_numpy(example.dtype)
    known = shape if shape is not None else value.shape
    if known is None or len(known) != example.ndim:
        known = ir.Shape([f"{value.name}_{axis}" for axis in range(example.ndim)])
    wide = ir.DataType.FLOAT if dtype in HALF and not value.is_graph_output() else dtype
    return ir.Value(name=value.name, type=ir.TensorType(wide), shape=known)


def _as(model: ir.Model, value: ir.Value, dtype: ir.DataType | None, names: FreshNames) -> ir.Value:
    """Return an input in the 16 bits that its readers want; normalization makes float32 of them and of the Cast."""
    if dtype is None or dtype not in HALF or value.dtype == dtype:
        return value
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=names(f"{value.name}_narrowed"))
    out = cast.outputs[0]
    out.name, out.dtype, out.shape = names(f"{value.name}_half"), dtype, value.shape
    model.graph.insert_before(next(iter(model.graph)), cast)
    return out


def _wide(model: ir.Model, value: ir.Value, names: FreshNames) -> ir.Value:
    """Return what other parts read: float32 in the place of 16 bits."""
    if value.dtype not in HALF:
        return value
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=names(f"{value.name}_widened"))
    out, name = cast.outputs[0], value.name
    value.name = names(f"{name}_half")
    out.name, out.dtype, out.shape = name, ir.DataType.FLOAT, value.shape
    model.graph.append(cast)
    return out
