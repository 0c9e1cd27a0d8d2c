"""Which operator of ours a kernel of ONNX Runtime belongs to: its optimized graph read against the Q/DQ model.

ONNX Runtime fuses, renames and reorders. What survives is enough: the outermost outputs of a fusion keep their names,
new nodes are named after those they replace, and everything else lies between two kernels that are known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.cost import Shapes, node_macs
from bitwright.compiler.graph.model import consumers, node_label, rank
from bitwright.compiler.ort.profiling import CallProfile, Kernel, original_name
from bitwright.compiler.plan.latency import chains, crossings
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.plan.signature import DEQUANTIZE, QUANTIZE
from bitwright.targets.schema import Runtime

# Fused with what follows they bear its name, but read the weights or the bias of the operator that is computed.
_WEIGHTED = ("Conv", "Gemm", "MatMul")
# Kernels that only move data; their names tell nothing.
_LAYOUT = ("ReorderInput", "ReorderOutput", "Transpose", "Cast")


@dataclass(frozen=True)
class Owner:
    """What the user knows: an operator, or the conversion of a tensor.

    Attributes:
        kind: ``"operator"``, ``QuantizeLinear`` or ``DequantizeLinear``.
        name: Of the operator (the head of its chain) or of the tensor.
    """

    kind: Literal["operator", "QuantizeLinear", "DequantizeLinear"]
    name: str

    @property
    def is_conversion(self) -> bool:
        """Whether it converts a tensor."""
        return self.kind != "operator"


@dataclass(frozen=True)
class Attribution:
    """Seconds by owner; an owner whose work was fused into another's kernel has none.

    Attributes:
        seconds: Of every operator and conversion of the placement.
        layout: The part of it that only changes the storage order, which the neighbours decide.
        rest_s: Of kernels that belong to none.
    """

    seconds: dict[Owner, float]
    layout: dict[Owner, float]
    rest_s: float


def attribute(
    call: CallProfile, placed: ir.Model, selection: Selection, runtime: Runtime, shapes: Shapes
) -> Attribution:
    """Share out a call's kernels.

    Args:
        call: The profile of ``placed``.
        placed: The Q/DQ model that was profiled.
        selection: Its placement, over the normalized model.
        runtime: The table it was planned for.
        shapes: Static shape of every tensor.
    """
    owners = _Owners(placed, selection, runtime, shapes)
    seconds = dict.fromkeys(owners.all, 0.0)
    layout = dict.fromkeys(owners.all, 0.0)
    rest = 0.0
    for kernel, owner in zip(call.kernels, _resolved(call.kernels, owners), strict=True):
        if owner is None or owner not in seconds:
            rest += kernel.seconds
        else:
            seconds[owner] += kernel.seconds
            layout[owner] += kernel.seconds if _moves_only(kernel, owners) else 0.0
    return Attribution(seconds, layout, rest)


def _moves_only(kernel: Kernel, owners: _Owners) -> bool:
    """Tell whether ONNX Runtime inserted the kernel to change the storage order."""
    return kernel.op in _LAYOUT and kernel.name not in owners.of_node


class _Owners:
    """The owner of every node and tensor of a Q/DQ model."""

    def __init__(self, placed: ir.Model, selection: Selection, runtime: Runtime, shapes: Shapes) -> None:
        self._chains = chains(selection, runtime)
        self._conversions = {
            Owner(c.operator, c.value.name or "")  # type: ignore[arg-type]
            for c in crossings(selection)
        }
        self._of_label: dict[str, Owner] = {}
        self._of_tensor: dict[str, Owner] = {}
        self.macs: dict[Owner, int] = {}
        for chain in self._chains:
            owner = Owner("operator", chain.unit.name)
            self.macs[owner] = _macs(chain.unit.head, shapes)
            for node in (chain.unit.head, *chain.tail):
                self._of_label[node_label(node)] = owner
                self._of_tensor |= {o.name: owner for o in node.outputs if o.name}
        self.all = (*self.macs, *sorted(self._conversions, key=lambda o: (o.name, o.kind)))
        self.of_node = {node_label(n): o for n in placed.graph if (o := self._node(n)) is not None}
        self.of_output = {
            v.name: self.of_node[label]
            for n in placed.graph
            if (label := node_label(n)) in self.of_node
            for v in n.outputs
            if v.name
        }
        self.of_constant = self._constants(placed)

    def _constants(self, placed: ir.Model) -> dict[str, Owner]:
        """Return the owner of every constant that only one operator reads; scalars are scales of activations."""
        found: dict[str, set[Owner]] = {}
        for node in placed.graph:
            owner = self.of_node.get(node_label(node))
            for value in node.inputs:
                if owner is not None and value is not None and value.is_initializer() and rank(value):
                    found.setdefault(value.name or "", set()).add(owner)
        return {name: next(iter(owners)) for name, owners in found.items() if len(owners) == 1}

    def _node(self, node: ir.Node) -> Owner | None:
        if (known := self._of_label.get(node_label(node))) is not None:
            return known
        if node.op_type in (QUANTIZE, DEQUANTIZE) and (found := self._conversion(node)) is not None:
            return found
        return self._by_name(node) or self._behind(node)

    def _by_name(self, node: ir.Node) -> Owner | None:
        return next((o for v in node.outputs if (o := self._of_tensor.get(v.name or "")) is not None), None)

    def _conversion(self, node: ir.Node) -> Owner | None:
        """Return the owner of a quantizer on an activation: the conversion, else who wrote the value."""
        source = node.inputs[0]
        maker = source.producer() if source is not None else None
        if node.op_type == DEQUANTIZE and maker is not None and maker.op_type == QUANTIZE:
            source = maker.inputs[0]
            maker = source.producer() if source is not None else None
        if source is None or source.is_initializer():
            return None
        writer = None if maker is None else self._of_label.get(node_label(maker))
        name = source.name or ""
        for tensor in (name, name.removesuffix("_float")):
            # A quantized graph output leaves its name to the dequantizer.
            for kind in (node.op_type, QUANTIZE):
                if (found := Owner(kind, tensor)) in self._conversions:  # type: ignore[arg-type]
                    return found
        return writer

    def _behind(self, node: ir.Node) -> Owner | None:
        """Return the owner of the first known node that reads what an inserted node computes."""
        seen: set[ir.Node] = set()
        waiting = [node]
        while waiting:
            current = waiting.pop(0)
            for value in current.outputs:
                for reader in consumers(value):
                    known = self._of_label.get(node_label(reader)) or self._by_name(reader)
                    if known is not None:
                        return known
                    if reader not in seen:
                        seen.add(reader)
                        waiting.append(reader)
        return None


def _macs(node: ir.Node, shapes: Shapes) -> int:
    try:
        return node_macs(node, shapes)
    except ModelError:
        return 0


def _resolved(kernels: tuple[Kernel, ...], owners: _Owners) -> list[Owner | None]:
    found = [_named(kernel, owners) for kernel in kernels]
    writer = {name: k for k, kernel in enumerate(kernels) for name in kernel.outputs}
    readers: dict[str, list[int]] = defaultdict(list)
    for k, kernel in enumerate(kernels):
        for name in kernel.inputs:
            readers[name].append(k)
    for k, kernel in enumerate(kernels):
        behind = [found[r] for name in kernel.outputs for r in readers[name]]
        before = [found[writer[name]] for name in kernel.inputs if name in writer]
        near = [o for o in (*behind, *before) if o is not None]
        if _moves_only(kernel, owners):
            found[k] = next((o for o in near if o.is_conversion), found[k])
        if found[k] is None:
            found[k] = next(iter(near), None)
    return found


def _named(kernel: Kernel, owners: _Owners) -> Owner | None:
    """Return the owner by the names of the kernel and of its outputs; of several the one with most arithmetic."""
    candidates: list[Owner | None] = [owners.of_node.get(kernel.name)]
    if kernel.op not in _LAYOUT:
        base = original_name(kernel.name)
        candidates += [owners.of_node.get(base), owners.of_output.get(base)]
    if kernel.op.endswith(_WEIGHTED):
        candidates += [owners.of_constant.get(name) for name in kernel.inputs]
    candidates += [owners.of_output.get(name) for name in kernel.outputs]
    if kernel.op not in _LAYOUT:
        candidates += [owners.of_output.get(original_name(name)) for name in kernel.outputs]
    return _heaviest((c for c in candidates if c is not None), owners)


def _heaviest(found: Iterable[Owner], owners: _Owners) -> Owner | None:
    ranked = list(found)
    return max(ranked, key=lambda o: owners.macs.get(o, 0)) if ranked else None
