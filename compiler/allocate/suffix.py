"""The part of a model that quantizing one site changes, as a small model of its own.

A variant is the float model with one site rewritten. Nodes that are defined alike in both and read only what is alike
compute the same values; everything else is the suffix. It starts at the values where the two still agree, and those
need to be computed only once. Weights that both have stay in one file, so that a suffix is a few kilobytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from bitwright.compiler.program.cut import copied_nodes, cut_model, read_values

WEIGHTS_FILE = "weights.bin"
# Runtimes map external data by pages; shapes and scales have to be in the model, whose readers look at them.
_PAGE, _INLINE_BYTES, _BYTE_BITS = 4096, 1024, 8
_STORABLE = {
    ir.DataType.FLOAT,
    ir.DataType.DOUBLE,
    ir.DataType.FLOAT16,
    ir.DataType.BOOL,
    ir.DataType.INT8,
    ir.DataType.INT16,
    ir.DataType.INT32,
    ir.DataType.INT64,
    ir.DataType.UINT8,
    ir.DataType.UINT16,
    ir.DataType.UINT32,
    ir.DataType.UINT64,
}


@dataclass(frozen=True)
class Suffix:
    """What a variant changes.

    Attributes:
        model: Self-contained; shares weights with the variant.
        inputs: Names of values of the float model (its inputs among them) that it starts from.
        outputs: Names of the model's outputs that may differ from the float model's.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def cut_suffix(reference: ir.Model, variant: ir.Model) -> Suffix | None:
    """Return the part of ``variant`` whose values may differ from the reference's; None if no output may.

    Args:
        reference: The float model.
        variant: A rewritten copy of it, topologically sorted, whose outputs have the same names.
    """
    graph = variant.graph
    own = _changed(reference, variant)
    outputs = [v for v in graph.outputs if v.producer() in own]
    if not outputs:
        return None
    copied = copied_nodes(graph) - own
    starts: dict[ir.Value, None] = {}
    pending = list(own)
    while pending:
        for value in read_values(pending.pop(), graph):
            producer = value.producer()
            if value.is_initializer() or producer in own or producer in copied:
                continue
            if producer is None or _storable(value):
                starts[value] = None
            else:
                own.add(producer)
                pending.append(producer)
    # What a later step drew into the suffix is no start any more.
    inputs = [v for v in starts if v.producer() not in own]
    order = {v: k for k, v in enumerate([*graph.inputs, *(o for n in graph for o in n.outputs)])}
    inputs.sort(key=lambda v: order[v])
    model = cut_model(variant, list(own), inputs, outputs, copied)
    return Suffix(model, tuple(v.name or "" for v in inputs), tuple(v.name or "" for v in outputs))


def _storable(value: ir.Value) -> bool:
    return isinstance(value.type, ir.TensorType) and value.dtype in _STORABLE


def _changed(reference: ir.Model, variant: ir.Model) -> set[ir.Node]:
    known = {node.outputs[0].name: node for node in reference.graph if node.outputs}
    own: set[ir.Node] = set()
    for node in variant.graph:
        twin = known.get(node.outputs[0].name) if node.outputs else None
        reads = read_values(node, variant.graph)
        if (
            twin is None
            or any(v.producer() in own for v in reads)
            or not _same_definition(node, twin)
            or not all(_same_constant(v, reference.graph) for v in reads if v.is_initializer())
        ):
            own.add(node)
    return own


def _same_definition(a: ir.Node, b: ir.Node) -> bool:
    if (a.domain, a.op_type, a.overload) != (b.domain, b.op_type, b.overload):
        return False
    names = [
        [[v.name if v is not None else None for v in vs] for vs in (n.inputs, n.outputs)] for n in (a, b)
    ]
    if names[0] != names[1] or set(a.attributes) != set(b.attributes):
        return False
    return all(_same_attribute(a.attributes[k], b.attributes[k]) for k in a.attributes)


def _same_attribute(a: ir.Attr, b: ir.Attr) -> bool:
    if a is b:
        return True
    return ir.serde.serialize_attribute(a) == ir.serde.serialize_attribute(b)


def _same_constant(value: ir.Value, graph: ir.Graph) -> bool:
    twin = graph.initializers.get(value.name or "")
    a, b = value.const_value, twin.const_value if twin is not None else None
    if a is None or b is None or a is b:
        return a is b and a is not None
    if (a.dtype, tuple(a.shape.numpy())) != (b.dtype, tuple(b.shape.numpy())):
        return False
    return a.tobytes() == b.tobytes()


class SharedWeights:
    """The weights of one model in a file that many models refer to."""

    def __init__(self, model: ir.Model, folder: Path) -> None:
        """Write the weights of ``model`` to ``folder / WEIGHTS_FILE``."""
        self._folder = folder
        # The tensors are kept beside their places: an identity is only good while the object lives.
        self._places: dict[int, tuple[ir.TensorProtocol, int]] = {}
        with (folder / WEIGHTS_FILE).open("wb") as file:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _INLINE_BYTES or tensor.dtype.bitwidth < _BYTE_BITS:
                    continue
                if id(tensor) not in self._places:
                    file.write(bytes(-file.tell() % _PAGE))
                    self._places[id(tensor)] = (tensor, file.tell())
                    file.write(tensor.tobytes())

    def save(self, model: ir.Model, name: str) -> bytes:
        """Write ``model`` as ``folder / name``; weights of the first model are referred to.

        Args:
            model: Made from the first model; is not usable afterwards but through its file.
            name: File name.

        Returns:
            The file's content, which identifies the model together with the weights.
        """
        for value in model.graph.initializers.values():
            place = self._places.get(id(value.const_value))
            if place is not None:
                tensor, offset = place
                value.const_value = ir.ExternalTensor(
                    WEIGHTS_FILE,
                    offset,
                    tensor.nbytes,
                    tensor.dtype,
                    shape=ir.Shape(tuple(tensor.shape.numpy())),
                    name=value.name or "",
                    base_dir=self._folder,
                )
        content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
        (self._folder / name).write_bytes(content)
        return content
