"""What ONNX Runtime really made of a Q/DQ model: its optimized graph, read back."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from bitwright.compiler.graph.model import node_label
from bitwright.compiler.ort.session import SessionConfig, open_session

FLOAT_ANCHORS = ("MatMul", "Gemm", "Conv", "FusedMatMul", "FusedConv", "FusedGemm")


@dataclass(frozen=True)
class AuditFinding:
    """One thing in the optimized graph that is not an integer kernel.

    Attributes:
        kind: ``"float kernel"``, ``"surviving QuantizeLinear"`` or ``"surviving DequantizeLinear"``.
        node: Name in ONNX Runtime's graph.
        tensor: The tensor it reads or writes, by the name it has in our file where that survived.
        why: What keeps it.
        harmless: An edge between float and integer regions, or planned to stay float.
    """

    kind: str
    node: str
    tensor: str
    why: str
    harmless: bool


@dataclass(frozen=True)
class FusedPattern:
    """What a runtime that is not at hand is expected to make one kernel of, by its published rules.

    Attributes:
        node: The quantized node.
        pattern: The nodes around it, e.g. ``"[INT8 activation, INT8 weight] -> Conv -> Relu -> Q"``.
        kernel: The kernel that should come of it.
    """

    node: str
    pattern: str
    kernel: str


@dataclass(frozen=True)
class Audit:
    """The audit of one model.

    Attributes:
        operators: Operator -> count in the optimized graph.
        findings: Everything that is not an integer kernel.
        patterns: Where nothing could be executed: what is expected to be fused.
    """

    operators: dict[str, int]
    findings: tuple[AuditFinding, ...]
    patterns: tuple[FusedPattern, ...] = ()

    @property
    def unexpected(self) -> tuple[AuditFinding, ...]:
        """Findings that contradict the plan: Q/DQ that cost time and bring nothing."""
        return tuple(f for f in self.findings if not f.harmless)


def optimized_graph(model: ir.Model | Path, config: SessionConfig) -> ir.Model:
    """Return the graph that ONNX Runtime executes, without the values of its weights."""
    with tempfile.TemporaryDirectory(prefix="bitwright-") as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(model, config, optimized_path=path)
        return read_optimized(path)


def read_optimized(path: Path) -> ir.Model:
    """Read a graph that ONNX Runtime wrote, without the values of its weights."""
    loaded = ir.load(path)
    for value in loaded.graph.initializers.values():
        value.const_value = None  # they may lie in a file that is gone with the session
    return loaded


def audit(model: ir.Model | Path, config: SessionConfig) -> Audit:
    """Optimize ``model`` as a session would and list what did not become an integer kernel."""
    graph = optimized_graph(model, config).graph
    operators = Counter(node.op_type for node in graph)
    findings = [f for node in graph if (f := _finding(node)) is not None]
    return Audit(dict(operators), tuple(findings))


def _dequantized_inputs(node: ir.Node) -> list[ir.Node]:
    producers = [v.producer() for v in node.inputs if v is not None]
    return [p for p in producers if p is not None and p.op_type == "DequantizeLinear"]


def _finding(node: ir.Node) -> AuditFinding | None:
    if node.op_type in FLOAT_ANCHORS and node.domain in ("", "com.microsoft", "com.microsoft.nchwc"):
        sources = _dequantized_inputs(node)
        why = (
            "its operands are dequantized, but ONNX Runtime has no integer kernel for this form"
            if sources
            else "planned to stay in float"
        )
        return AuditFinding("float kernel", node_label(node), node.outputs[0].name or "", why, not sources)
    if node.op_type == "DequantizeLinear":
        return _surviving_dequantize(node)
    if node.op_type == "QuantizeLinear":
        return AuditFinding(
            "surviving QuantizeLinear",
            node_label(node),
            node.inputs[0].name or "" if node.inputs[0] is not None else "",
            "the edge where a float value enters an integer region",
            True,
        )
    return None


def _surviving_dequantize(node: ir.Node) -> AuditFinding:
    readers = {use.node.op_type for use in node.outputs[0].uses()}
    blocked = sorted(readers & set(FLOAT_ANCHORS))
    why = (
        f"it feeds {', '.join(blocked)}, which stayed in float"
        if blocked
        else f"the edge where integers leave for float operators ({', '.join(sorted(readers)) or 'the output'})"
    )
    return AuditFinding(
        "surviving DequantizeLinear", node_label(node), node.outputs[0].name or "", why, not blocked
    )
