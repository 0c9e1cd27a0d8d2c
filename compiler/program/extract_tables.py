"""Functions of one integer tensor become tables: evaluated on all 256 integers, in float32, at extraction."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import node_label, static_shape
from bitwright.compiler.program.affine import all_integers, dequantize, quantize
from bitwright.compiler.program.draft import Draft, clip_limits, labels
from bitwright.compiler.program.extract_quantizers import constant_real
from bitwright.compiler.program.ops import Move, QLut, QuantParams, Tensor

Array = np.ndarray
Function = Callable[[ir.Node, list[Array]], Array]
# Expressions with more nodes than this are not searched; the largest known (tanh Gelu spelled out) has nine.
MAX_NODES = 24


def _erf(values: Array) -> Array:
    from scipy.special import erf  # 0.15 s, in every process that lowers; few models need it

    return np.asarray(erf(values))


def _float64(function: Callable[[Array], Array]) -> Function:
    """A function of one operand: float64 inside, rounded to float32 once."""
    return lambda _node, args: function(args[0].astype(np.float64)).astype(np.float32)


def _attribute(node: ir.Node, name: str, default: float) -> float:
    return float(node.attributes.get_float(name, default))


def _clip(node: ir.Node, args: list[Array]) -> Array:
    limits = clip_limits(node)
    assert limits is not None
    return np.asarray(np.minimum(np.maximum(args[0], np.float32(limits[0])), np.float32(limits[1])))


def _leaky_relu(node: ir.Node, args: list[Array]) -> Array:
    return np.where(args[0] >= 0, args[0], args[0] * np.float32(_attribute(node, "alpha", 0.01)))


def _hard_sigmoid(node: ir.Node, args: list[Array]) -> Array:
    alpha = np.float32(_attribute(node, "alpha", 0.2))
    beta = np.float32(_attribute(node, "beta", 0.5))
    return np.asarray(np.clip(args[0] * alpha + beta, np.float32(0), np.float32(1)))


def _hard_swish(_node: ir.Node, args: list[Array]) -> Array:
    gate = np.clip(args[0] * np.float32(1 / 6) + np.float32(0.5), np.float32(0), np.float32(1))
    return np.asarray(args[0] * gate)


def _elu(node: ir.Node, args: list[Array]) -> Array:
    x = args[0].astype(np.float64)
    return np.where(x > 0, x, _attribute(node, "alpha", 1.0) * np.expm1(np.minimum(x, 0))).astype(np.float32)


def _gelu(node: ir.Node, args: list[Array]) -> Array:
    x = args[0].astype(np.float64)
    if node.attributes.get_string("approximate", "none") == "tanh":
        inner = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    else:
        inner = _erf(x / np.sqrt(2))
    return np.asarray(0.5 * x * (1 + inner)).astype(np.float32)


def _power(_node: ir.Node, args: list[Array]) -> Array:
    return np.power(args[0].astype(np.float64), args[1].astype(np.float64)).astype(np.float32)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def _softplus(x: Array) -> Array:
    return np.asarray(np.logaddexp(0, x))


# Sums and products are plain float32, as every runtime does them; transcendental functions are correctly
# rounded.
FUNCTIONS: dict[str, Function] = {
    "Add": lambda _, a: a[0] + a[1],
    "Sub": lambda _, a: a[0] - a[1],
    "Mul": lambda _, a: a[0] * a[1],
    "Div": lambda _, a: a[0] / a[1],
    "Pow": _power,
    "Relu": lambda _, a: np.maximum(a[0], np.float32(0)),
    "Clip": _clip,
    "LeakyRelu": _leaky_relu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Elu": _elu,
    "Gelu": _gelu,
    "Neg": lambda _, a: -a[0],
    "Abs": lambda _, a: np.abs(a[0]),
    "Sqrt": lambda _, a: np.sqrt(a[0]),
    "Identity": lambda _, a: a[0],
    "Reciprocal": lambda _, a: np.float32(1) / a[0],
    "Sigmoid": _float64(_sigmoid),
    "Softplus": _float64(_softplus),
    "Tanh": _float64(np.tanh),
    "Exp": _float64(np.exp),
    "Erf": _float64(_erf),
}


class _Expression:
    """An elementwise expression of one quantized tensor, found by walking back from its result."""

    def __init__(self, draft: Draft, result: ir.Value) -> None:
        self._draft = draft
        self._shape = static_shape(result)
        self.root: Tensor | None = None
        self.nodes: list[ir.Node] = []
        self._values: dict[ir.Value, Array] = {}
        self.valid = self._visit(result)

    def _visit(self, value: ir.Value) -> bool:
        """Collect the nodes of ``value`` in order of evaluation; False if it is no such expression."""
        if value in self._values:
            return True
        constant = constant_real(value)
        if constant is not None and constant.size == 1:
            self._values[value] = constant.reshape(())
            return True
        if static_shape(value) != self._shape or self._shape is None:
            return False
        node = value.producer()
        if node is not None and _is_elementwise(node) and len(self.nodes) < MAX_NODES:
            return self._visit_node(node)
        return self._visit_root(value)

    def _visit_node(self, node: ir.Node) -> bool:
        operands = node.inputs[:1] if node.op_type == "Clip" else node.inputs
        found = all(v is not None and self._visit(v) for v in operands)
        if found and node not in self.nodes:
            self.nodes.append(node)
        return found

    def _visit_root(self, value: ir.Value) -> bool:
        view = self._draft.view(value)
        if view is None or (self.root is not None and view != self.root):
            return False
        self.root = view
        assert view.quant is not None
        self._values[value] = dequantize(all_integers(view.quant), view.quant)
        return True

    def table(self, result: ir.Value) -> Array:
        """Evaluate on all integers of the root: float32 [256]."""
        values = dict(self._values)
        with np.errstate(all="ignore"):
            for node in self.nodes:
                operands = [values[v] for v in node.inputs if v is not None and v in values]
                values[node.outputs[0]] = FUNCTIONS[node.op_type](node, operands).astype(np.float32)
        return np.broadcast_to(values[result], (256,))


def _is_elementwise(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type not in FUNCTIONS:
        return False
    return node.op_type != "Clip" or clip_limits(node) is not None


def match_table(draft: Draft, quantizer: ir.Node, params: QuantParams) -> bool:
    """Offer a QLut for the elementwise expression of one tensor that ``quantizer`` quantizes, if it is one.

    Requantization with equal parameters becomes no step at all.

    Returns:
        Whether the quantizer's output is offered now.
    """
    value, result = quantizer.inputs[0], quantizer.outputs[0]
    assert value is not None
    expression = _Expression(draft, value)
    root = expression.root
    output = draft.integer_tensor(result, params) if expression.valid else None
    if not expression.valid or root is None or root.quant is None or output is None:
        return False
    floats = expression.table(value)
    if np.isnan(floats).any():
        return False
    table = quantize(floats, params)
    if root.name in draft.constants:
        index = draft.constants[root.name].astype(np.int64) - root.quant.bounds[0]
        draft.add_constant(output, table[index])
        return True
    covered = labels(*expression.nodes, quantizer)
    name = draft.label(node_label(expression.nodes[-1] if expression.nodes else quantizer))
    if root.quant == params and np.array_equal(table, all_integers(params)):
        draft.alias(result, root)
        same = Move(name=name, inputs=(root.name,), outputs=(output.name,), nodes=covered, kind="reshape")
        draft.add(same, output)
        return True
    function = "+".join(n.op_type for n in expression.nodes) or "requantize"
    step = QLut(
        name=name, inputs=(root.name,), outputs=(output.name,), nodes=covered, table=table, function=function
    )
    draft.add(step, output)
    return True
