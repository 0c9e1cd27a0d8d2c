"""Which kernels TensorRT is expected to make of a Q/DQ model, by its published fusion rules, and what breaks them.

Nothing is executed: TensorRT needs a GPU. A node counts as quantized where it reads a dequantized value; its pattern
is what stands around it in the file. The rules are those of TensorRT's explicit quantization: signed and symmetric
quantizers, Q/DQ on every input of a product, none on biases, none on what runs in float.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import (
    STANDARD_DOMAINS,
    constant_array,
    int_attribute,
    node_label,
    only_consumer,
)
from bitwright.compiler.ort.audit import Audit, AuditFinding, FusedPattern
from bitwright.targets.schema import Runtime

TENSORRT_PROVIDER = "TensorrtExecutionProvider"
PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
# Let quantizers pass: TensorRT moves Q/DQ over them.
PASSES = (
    "MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Concat", "Split", "Identity",
)  # fmt: skip
# Behind a product these are computed by its kernel.
EPILOGUE = ("Relu", "Clip", "Add", "LeakyRelu", "Sigmoid", "Mul", "HardSwish", "Tanh")
BLOCKS = (16, 32, 64, 128)
SIGNED = ("INT8", "FLOAT8E4M3FN", "INT4")
OPSET_OF_BLOCKS = 21
VIOLATION = "broken rule"


@dataclass(frozen=True)
class _Quantizer:
    """A DequantizeLinear in front of an operand."""

    node: ir.Node

    @property
    def of_constant(self) -> bool:
        return constant_array(self.node.inputs[0]) is not None

    @property
    def kind(self) -> str:
        source = self.node.inputs[0]
        return source.dtype.name if source is not None and source.dtype is not None else "?"


def audit_placement(model: ir.Model, runtime: Runtime) -> Audit | None:
    """Return what TensorRT is expected to fuse, every broken rule as an unexpected finding.

    Args:
        model: As it will be deployed.
        runtime: The profile's table.

    Returns:
        None for another provider: it has no rules here.
    """
    if runtime.execution_provider != TENSORRT_PROVIDER:
        return None
    graph = model.graph
    patterns = tuple(p for node in graph if (p := _pattern(node)) is not None)
    findings = [f for node in graph for f in _findings(node, _opset(model))]
    return Audit(dict(Counter(node.op_type for node in graph)), tuple(findings), patterns)


def _opset(model: ir.Model) -> int:
    return next((model.opset_imports[d] for d in STANDARD_DOMAINS if d in model.opset_imports), 0)


def _quantizer(value: ir.Value | None) -> _Quantizer | None:
    """Return what dequantizes a value; operators that let quantizers pass may stand between."""
    node = None if value is None else value.producer()
    while (
        node is not None
        and node.op_type in PASSES
        and node.inputs
        and not _is_standard(node, "DequantizeLinear")
    ):
        first = node.inputs[0]
        node = None if first is None else first.producer()
    return _Quantizer(node) if node is not None and node.op_type == "DequantizeLinear" else None


def _is_standard(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and node.domain in STANDARD_DOMAINS


def _operands(node: ir.Node) -> tuple[ir.Value | None, ...]:
    """Return the operands that a kernel of integers reads as integers: of a product both factors."""
    return tuple(node.inputs[:2])


def _pattern(node: ir.Node) -> FusedPattern | None:
    """Return what TensorRT is expected to make one kernel of, for a node that reads dequantized values."""
    if node.op_type not in PRODUCTS or not any(_quantizer(v) for v in _operands(node)):
        return None
    reads = [_side(value) for value in _operands(node)]
    chain = _epilogue(node)
    steps = zip([node, *chain], chain, strict=False)
    added = [f"Add({_added(n, before)})" if n.op_type == "Add" else n.op_type for before, n in steps]
    last = chain[-1] if chain else node
    tail = ["Q"] if _all_quantize(last.outputs[0]) else []
    text = " -> ".join([f"[{', '.join(reads)}]", node.op_type, *added, *tail])
    return FusedPattern(node_label(node), text, _kernel(node, reads, bool(tail)))


def _side(value: ir.Value | None) -> str:
    found = _quantizer(value)
    if found is None:
        return "float"
    return f"{found.kind} {'weight' if found.of_constant else 'activation'}"


def _kernel(node: ir.Node, reads: list[str], quantizes: bool) -> str:
    if any(side.startswith("INT4") for side in reads):
        return "weight-only product: 4-bit weights are unpacked in registers"
    kind = next((side.split()[0] for side in reads if side != "float"), "?")
    name = {"INT8": "int8", "FLOAT8E4M3FN": "fp8"}.get(kind, kind)
    return f"{name} {node.op_type} that writes {name if quantizes else 'fp16 or float32'}"


def _epilogue(node: ir.Node) -> list[ir.Node]:
    chain: list[ir.Node] = []
    following = only_consumer(node.outputs[0])
    while following is not None and following.op_type in EPILOGUE and len(chain) < 4:
        chain.append(following)
        following = only_consumer(following.outputs[0])
    return chain


def _added(add: ir.Node, before: ir.Node) -> str:
    """Return what an Add adds to what ``before`` wrote."""
    others = [v for v in add.inputs if v is not None and v.producer() is not before]
    if any(constant_array(v) is not None for v in others):
        return "bias"
    return "DQ" if any(_quantizer(v) is not None for v in others) else "float"


def _all_quantize(value: ir.Value) -> bool:
    readers = {use.node.op_type for use in value.uses()}
    return readers == {"QuantizeLinear"}


def _findings(node: ir.Node, opset: int) -> Iterator[AuditFinding]:
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        yield from _of_quantizer(node, opset)
    elif node.op_type in PRODUCTS:
        yield from _of_product(node)
    elif node.op_type not in PASSES and not _may_read_quantized(node):
        for value in node.inputs:
            if (found := _quantizer(value)) is not None and not found.of_constant and value is not None:
                why = f"{node.op_type} has no integer kernel: its Q/DQ are conversions that bring nothing"
                yield _broken(node, value, why)


def _may_read_quantized(node: ir.Node) -> bool:
    """Tell whether an operator is fused behind a product, e.g. a residual Add."""
    return node.op_type in ("Add", *EPILOGUE) and any(
        _ends_product(v.producer()) for v in node.inputs if v is not None
    )


def _ends_product(node: ir.Node | None) -> bool:
    while node is not None and node.op_type in EPILOGUE and node.inputs[0] is not None:
        producers = [v.producer() for v in node.inputs if v is not None and constant_array(v) is None]
        node = next((p for p in producers if p is not None and p.op_type in (*PRODUCTS, *EPILOGUE)), None)
    return node is not None and node.op_type in PRODUCTS


def _of_product(node: ir.Node) -> Iterator[AuditFinding]:
    sides = [_quantizer(value) for value in _operands(node)]
    kinds = {side.kind for side in sides if side is not None}
    if not kinds:
        yield AuditFinding(
            "float kernel", node_label(node), node.outputs[0].name or "", "planned to stay in float", True
        )
        return
    for value, side in zip(_operands(node), sides, strict=True):
        if side is None and kinds != {"INT4"} and value is not None:
            yield _broken(node, value, "only one operand has Q/DQ: the product is computed in float")
    if len(kinds) > 1:
        yield _broken(node, node.inputs[0], f"its operands have different types ({', '.join(sorted(kinds))})")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if (found := _quantizer(bias)) is not None and bias is not None:
        yield _broken(
            node, bias, f"its bias is {found.kind} behind DequantizeLinear; TensorRT takes a float bias"
        )
    weight = sides[1]
    if weight is not None and weight.of_constant:
        yield from _of_weight(node, weight)


def _of_weight(node: ir.Node, weight: _Quantizer) -> Iterator[AuditFinding]:
    scale, block = constant_array(weight.node.inputs[1]), int_attribute(weight.node, "block_size", 0)
    if scale is None:
        yield _broken(node, weight.node.inputs[1], "the scale of its weight is computed at run time")
        return
    axis = int_attribute(weight.node, "axis", 1)
    wanted = {"Conv": 0, "ConvTranspose": 1}.get(node.op_type, _columns(node))
    if scale.size > 1 and not block and axis % 4 != wanted and axis != wanted - _rank(weight):
        yield _broken(
            node,
            weight.node.inputs[1],
            f"scales along axis {axis} of its weight; they belong to axis {wanted}",
        )
    array = constant_array(weight.node.inputs[0])
    if weight.kind == "INT8" and array is not None and array.size and int(array.min()) < -127:
        yield _broken(
            node, weight.node.inputs[0], "its weight holds -128: symmetric kernels take [-127, 127]"
        )


def _rank(weight: _Quantizer) -> int:
    shape = weight.node.inputs[0].shape if weight.node.inputs[0] is not None else None
    return 2 if shape is None else len(shape)


def _columns(node: ir.Node) -> int:
    return 0 if int_attribute(node, "transB", 0) else 1


def _of_quantizer(node: ir.Node, opset: int) -> Iterator[AuditFinding]:
    source = node.inputs[0]
    stored = source if node.op_type == "DequantizeLinear" else node.outputs[0]
    kind = stored.dtype.name if stored is not None and stored.dtype is not None else ""
    constant = constant_array(source) is not None
    if kind not in SIGNED and not _feeds_bias(node):
        yield _broken(
            node,
            source,
            f"{kind or 'an unknown type'} is no type of TensorRT's quantizers (INT8, FP8E4M3, INT4)",
        )
    zero = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is not None and bool(np.any(zero.astype(np.float32) != 0)):
        yield _broken(node, node.inputs[2], "its zero point is not 0: TensorRT's quantizers are symmetric")
    block = int_attribute(node, "block_size", 0)
    if kind == "INT4":
        yield from _of_blocks(node, block, opset, constant=constant)
    elif block:
        yield _broken(node, source, f"blocks of {block} {kind} values; only 4-bit weights come in blocks")
    if constant or node.op_type == "DequantizeLinear":
        return
    scale = constant_array(node.inputs[1])
    if scale is not None and scale.size > 1:
        yield _broken(node, source, "an activation has one scale a tensor")
    before = None if source is None else source.producer()
    if before is not None and before.op_type == "DequantizeLinear":
        yield _broken(node, source, "quantizes what was dequantized the moment before")


def _of_blocks(node: ir.Node, block: int, opset: int, *, constant: bool) -> Iterator[AuditFinding]:
    source = node.inputs[0]
    if not constant:
        yield _broken(node, source, "4-bit integers are for weights alone")
    if opset < OPSET_OF_BLOCKS:
        yield _broken(node, source, f"4-bit blocks need opset {OPSET_OF_BLOCKS}, the model has {opset}")
    if block not in BLOCKS:
        yield _broken(node, source, f"blocks of {block} values; TensorRT takes {', '.join(map(str, BLOCKS))}")
    reader = next((use.node for use in node.outputs[0].uses()), None)
    along = 1 - _columns(reader) if reader is not None else 0
    if int_attribute(node, "axis", 1) % 2 != along:
        yield _broken(
            node,
            source,
            f"blocks along axis {int_attribute(node, 'axis', 1)}; they run along the reduction, axis {along}",
        )


def _feeds_bias(node: ir.Node) -> bool:
    """A quantized bias is reported at its product."""
    return any(use.idx == 2 and use.node.op_type in PRODUCTS for use in node.outputs[0].uses())


def _broken(node: ir.Node, value: ir.Value | None, why: str) -> AuditFinding:
    return AuditFinding(
        VIOLATION, node_label(node), (value.name if value is not None else "") or "", why, False
    )
