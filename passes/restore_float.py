"""Take single nodes of a quantized model back to float: what would it be without this rounding?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames, constant_array, is_op, node_label
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer

Part = Literal["weights", "inputs"]


@dataclass(frozen=True)
class RestoreFloat:
    """Let nodes read unquantized activations, or the float model's weights, or both.

    Only the readers change: a tensor that another node still reads as integers keeps its quantizer, and what the
    node writes is quantized as before.

    Attributes:
        nodes: Names of nodes.
        float_model: The float model that the quantized one was made from; it has the nodes under the same names.
        parts: What to restore; biases go with the weights.
    """

    nodes: frozenset[str]
    float_model: ir.Model
    parts: frozenset[Part] = frozenset(["weights", "inputs"])

    @property
    def name(self) -> str:
        """The pass's name."""
        return "restore_float"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        originals = {node_label(n): n for n in self.float_model.graph if node_label(n) in self.nodes}
        fresh = FreshNames(model)
        changed = 0
        for node in list(model.graph):
            original = originals.get(node_label(node))
            if original is not None and original.op_type == node.op_type:
                changed += sum(
                    self._restore(model, node, original, k, fresh) for k in range(len(node.inputs))
                )
        return PassResult(model, changed)

    def _restore(
        self, model: ir.Model, node: ir.Node, original: ir.Node, index: int, fresh: FreshNames
    ) -> bool:
        value = node.inputs[index]
        dequantize = value.producer() if value is not None else None
        if dequantize is None or not is_op(dequantize, "DequantizeLinear") or index >= len(original.inputs):
            return False
        source = _unquantized(dequantize)
        if source is not None:
            if "inputs" in self.parts:
                node.replace_input_with(index, source)
            return "inputs" in self.parts
        array = constant_array(original.inputs[index])
        if array is None or "weights" not in self.parts:
            return False
        stem = dequantize.outputs[0].name
        node.replace_input_with(index, add_initializer(model.graph, fresh(f"{stem}_float"), array))
        return True


def _unquantized(dequantize: ir.Node) -> ir.Value | None:
    """Return the float value that was quantized, None if the integers are a constant."""
    integers = dequantize.inputs[0]
    quantize = integers.producer() if integers is not None else None
    return quantize.inputs[0] if quantize is not None and is_op(quantize, "QuantizeLinear") else None
