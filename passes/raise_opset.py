"""Raise a model to a newer ONNX opset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir
from onnx import version_converter

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import STANDARD_DOMAINS, constant_array, is_op, node_label
from bitwright.passes.contract import PassResult
from bitwright.passes.weightless import KEEP_BYTES, weightless_proto

MIN_OPSET = 7  # below, operators broadcast by attributes that onnx's converter does not always translate
COORDINATES_SINCE = 11  # before, Resize and Upsample had one fixed rule for coordinates


@dataclass(frozen=True)
class RaiseOpset:
    """Convert every node to ``opset``; a model at or above it stays as it is.

    onnx's own version converter does the work, weights set aside, subgraphs included; the result is verified
    by the ONNX checker. Operators of other domains are not versioned and pass through.

    Attributes:
        opset: Version of the standard ONNX domain to reach.
    """

    opset: int = 21
    name: ClassVar[str] = "raise_opset"

    def run(self, model: ir.Model) -> PassResult:
        """Convert ``model``.

        Raises:
            ModelError: The model is older than opset 7, a node has no equivalent in the new opset, or the
                model breaks the rules of the new opset.
        """
        current = _standard_opset(model)
        if current >= self.opset:
            return PassResult(model, 0)
        if current < MIN_OPSET:
            msg = f"opset {current} is older than {MIN_OPSET}, the oldest that can be converted"
            raise ModelError(
                msg,
                fix="export the model again with a current exporter",
            )
        proto = weightless_proto(model)
        converted = self._convert(proto, model, current)

        _adopt(model, converted)
        if current < COORDINATES_SINCE:
            _restore_resize_coordinates(model)
        return PassResult(model, 1, (f"opset {current} raised to {self.opset}",))

    def _convert(self, proto: onnx.ModelProto, model: ir.Model, current: int) -> onnx.ModelProto:
        try:
            converted = _as_current_ir(version_converter.convert_version(proto, self.opset))
            onnx.checker.check_model(converted)
        except Exception as error:
            raise self._explain(error, model, current) from error
        return converted

    def _explain(self, error: Exception, model: ir.Model, current: int) -> ModelError:
        """Find the node at fault by converting each on its own; only done after a failure."""
        for graph in model.graphs():
            for node in graph:
                if node.domain in STANDARD_DOMAINS and (alone := _failure(_alone, node, current, self.opset)):
                    return ModelError(
                        f"{node.op_type} cannot be converted from opset {current} to {self.opset}: "
                        f"{_last_line(alone)}",
                        where=f"node '{node_label(node)}'",
                        fix=f"export the model at opset {self.opset}",
                    )
        return ModelError(
            f"the model cannot be converted from opset {current} to {self.opset}: {_last_line(error)}",
            fix=f"export the model at opset {self.opset}",
        )


def _standard_opset(model: ir.Model) -> int:
    versions = [v for d, v in model.opset_imports.items() if d in STANDARD_DOMAINS]
    if not versions:
        msg = "the model does not import the standard ONNX operators"
        raise ModelError(msg, fix="export the model again")
    return min(versions)


def _as_current_ir(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Set the file-format version that the opsets demand; before version 4 initializers had to be inputs."""
    proto.ir_version = max(
        proto.ir_version, onnx.helper.find_min_ir_version_for(proto.opset_import, ignore_unknown=True)
    )
    return proto


def _adopt(model: ir.Model, converted: onnx.ModelProto) -> None:
    """Take over the converted graph; weights come back from the old graph by name."""
    old = model.graph
    new = ir.from_proto(converted).graph
    inputs = {v.name: v for v in new.inputs}
    for name, value in old.initializers.items():
        if name in new.initializers:
            new.initializers[name].const_value = value.const_value
        elif name in inputs:
            inputs[name].const_value = value.const_value
            new.register_initializer(inputs[name])
    wanted = {v.name for v in old.inputs}
    kept = [v for v in new.inputs if v.name in wanted]
    new.inputs.clear()
    new.inputs.extend(kept)
    new.metadata_props.update(old.metadata_props)
    model.graph = new
    model.ir_version = converted.ir_version


def _restore_resize_coordinates(model: ir.Model) -> None:
    """Give each Resize the rule it had before opset 11; onnx's converter leaves it the default of opset 11.

    Raises:
        ModelError: One nearest-neighbour Resize both enlarges and shrinks: the old rule depended on the axis.
    """
    for node in [n for graph in model.graphs() for n in graph if is_op(n, "Resize")]:
        scales = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
        shrinks = scales is not None and bool((scales < 1).any())
        if shrinks and scales is not None and bool((scales > 1).any()):
            msg = "a Resize of opset 10 that enlarges one axis and shrinks another cannot be converted"
            raise ModelError(
                msg,
                where=f"node '{node_label(node)}'",
                fix="export the model at opset 11 or later",
            )
        node.attributes["coordinate_transformation_mode"] = ir.AttrString(
            "coordinate_transformation_mode", "asymmetric"
        )
        node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "ceil" if shrinks else "floor")


def _alone(node: ir.Node, current: int, opset: int) -> None:
    values = {v.name: v for v in node.inputs if v is not None}
    inputs = [ir.Value(name=v.name, shape=v.shape, type=v.type) for v in values.values()]
    proto = onnx.ModelProto(ir_version=10)
    proto.opset_import.append(onnx.helper.make_opsetid("", current))
    proto.graph.name = "alone"
    proto.graph.node.append(ir.serde.serialize_node(node))
    proto.graph.input.extend(ir.serde.serialize_value(v) for v in inputs)
    small = [
        v.const_value
        for v in values.values()
        if v.const_value is not None and v.const_value.nbytes <= KEEP_BYTES
    ]
    proto.graph.initializer.extend(ir.serde.serialize_tensor(tensor) for tensor in small)
    proto.graph.output.extend(ir.serde.serialize_value(v) for v in node.outputs if v.name)
    version_converter.convert_version(proto, opset)


def _failure(
    function: Callable[[ir.Node, int, int], None], node: ir.Node, old: int, new: int
) -> Exception | None:
    try:
        function(node, old, new)
    except Exception as error:
        return error
    return None


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
