"""Rules on a whole model: versions, operator sets, operators, functions, names, graph inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import Message  # type: ignore[import-untyped]
from onnx import TensorProto

from bitwright.compiler.ingest.limits import Limits
from bitwright.compiler.ingest.protos import Body, node_part
from bitwright.compiler.ingest.text import quoted, refused, size

STANDARD = ("", "ai.onnx")
# ONNX Runtime implements these and judges their operators itself when the model is run.
RUNTIME_DOMAINS = ("com.microsoft",)
EXPORT_AGAIN = "export the model again with a current exporter"


def check_versions(model: onnx.ModelProto, file: str, limits: Limits) -> None:
    """Check IR and operator-set versions; renames the domain ``ai.onnx`` to ``""``, which means the same.

    Raises:
        ModelError: No graph, no standard operator set, or a version nothing here can execute.
    """
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        what = "holds no graph: it is not an ONNX model, or it is cut off"
        raise refused(file, "", what, "check that the export or download finished")
    if not limits.ir_min <= model.ir_version <= limits.ir_max:
        what = f"IR version {model.ir_version} is outside {limits.ir_min}..{limits.ir_max}"
        raise refused(file, "", what, EXPORT_AGAIN)
    for holder, part in [(model, ""), *((f, f"function {quoted(f.name)}") for f in model.functions)]:
        versions = _versions(holder, file, part)
        if "" in versions and not limits.opset_min <= versions[""] <= limits.opset_max:
            what = f"opset {versions['']} is outside {limits.opset_min}..{limits.opset_max}"
            fix = f"export with opset {limits.opset_min}..{limits.opset_max}, or use onnx.version_converter"
            raise refused(file, part, what, fix)
        if holder is model and "" not in versions:
            what = (
                "imports no version of the standard operator set (opset_import), so operators have no meaning"
            )
            raise refused(file, "", what, "set opset_import to the version the model was written for")


def _versions(holder: onnx.ModelProto | onnx.FunctionProto, file: str, part: str) -> dict[str, int]:
    versions: dict[str, int] = {}
    for entry in holder.opset_import:
        if entry.domain in STANDARD:
            entry.domain = ""
        if versions.setdefault(entry.domain, entry.version) != entry.version:
            domain = quoted(entry.domain or "ai.onnx")
            raise refused(file, part, f"imports two versions of the domain {domain}", "keep one opset_import")
    return versions


def check_operators(model: onnx.ModelProto, found: list[Body], file: str) -> None:
    """Check that every node is an operator somebody here can execute.

    Accepted are the standard operators of the imported version, ``com.microsoft`` and model-local functions.

    Raises:
        ModelError: Names the node.
    """
    functions = {(f.domain, f.name, f.overload) for f in model.functions}
    imported = {entry.domain: entry.version for entry in model.opset_import}
    for body in found:
        versions = imported
        if body.function is not None:
            versions = {entry.domain: entry.version for entry in body.function.opset_import}
        for node in body.graph.node:
            if node.domain in STANDARD:
                node.domain = ""
            if (node.domain, node.op_type, node.overload) not in functions:
                _check_operator(node, versions, file, body.place)


def _check_operator(node: onnx.NodeProto, versions: dict[str, int], file: str, place: str) -> None:
    part = node_part(node, place)
    operator = f"{quoted(node.domain)[1:-1]}::{quoted(node.op_type)[1:-1]}" if node.domain else node.op_type
    if node.domain not in ("", *RUNTIME_DOMAINS):
        fix = "export without custom operators, or give their meaning as model-local functions"
        what = f"operator {operator} is of a domain that nothing here can execute"
        raise refused(file, part, what, fix)
    if node.domain not in versions:
        what = f"the domain {quoted(node.domain or 'ai.onnx')} is used but not imported"
        raise refused(file, part, what, "add it to opset_import")
    if node.domain:
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, versions[""], "")
    except onnx.defs.SchemaError:
        what = f"there is no standard operator {quoted(node.op_type)} in opset {versions['']}"
        raise refused(file, part, what, "check the spelling, the domain and the opset version") from None
    if schema.deprecated:
        what = f"operator {operator} was withdrawn from ONNX before opset {versions['']}"
        raise refused(file, part, what, EXPORT_AGAIN)


def check_functions(model: onnx.ModelProto, file: str, limits: Limits) -> None:
    """Check that calls of model-local functions end, and that inlining them stays within the node budget.

    Raises:
        ModelError: Recursion, calls nested too deep, or a small file that inlines to an enormous graph.
    """
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    if len(functions) < len(model.functions):
        name = Counter(f.name for f in model.functions).most_common(1)[0][0]
        raise refused(file, f"function {quoted(name)}", "defined twice", "keep one definition")
    sizes: dict[tuple[str, str, str], int] = {}

    def inlined(graph: onnx.GraphProto | onnx.FunctionProto, chain: tuple[tuple[str, str, str], ...]) -> int:
        total = 0
        for node in graph.node:
            key = (node.domain, node.op_type, node.overload)
            total += called(key, chain) if key in functions else 1
            for attribute in node.attribute:
                inner = [attribute.g] if attribute.HasField("g") else []
                total += sum(inlined(g, chain) for g in [*inner, *attribute.graphs])
        return total

    def called(key: tuple[str, str, str], chain: tuple[tuple[str, str, str], ...]) -> int:
        part = f"function {quoted(key[1])}"
        if key in chain:
            raise refused(file, part, "calls itself", "use Loop for iteration")
        if len(chain) >= limits.calls:
            raise refused(file, part, f"calls are nested deeper than {limits.calls}", "inline the functions")
        if key not in sizes:
            sizes[key] = inlined(functions[key], (*chain, key))
        return sizes[key]

    if inlined(model.graph, ()) > limits.nodes:
        what = f"more than {limits.nodes} nodes once its functions are inlined"
        raise refused(file, "", what, "split the model, or simplify it in the exporter")


def check_text(message: Message, file: str, limits: Limits) -> None:
    """Refuse text that is not UTF-8, and text of absurd length that should be a name; all else is accepted.

    Names are escaped where they are printed, so what they contain does not matter.

    Raises:
        ModelError: Shows the start of the text.
    """
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING:
            for text in (
                value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
            ):
                _check_text(text, field.name, file, limits)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in [value] if isinstance(value, Message) else value:
                check_text(inner, file, limits)


def _check_text(text: str | bytes, field: str, file: str, limits: Limits) -> None:
    # The protobuf runtime hands text out as bytes if it is not UTF-8.
    if isinstance(text, bytes):
        what = f"its field '{field}' holds text that is not UTF-8: {quoted(repr(text))}"
        raise refused(file, "", what, "export the model again")
    # A character is at most four bytes; most names need no exact count. Documentation and metadata may be
    # long.
    if field in ("doc_string", "value") or 4 * len(text) <= limits.name_bytes:
        return
    if len(text.encode()) > limits.name_bytes:
        what = f"its field '{field}' holds a name longer than {limits.name_bytes} bytes: {quoted(text)}"
        raise refused(file, "", what, "use short names")


def check_inputs(model: onnx.ModelProto, file: str, limits: Limits) -> None:
    """Check that graph inputs are tensors of known type and rank with sane dimensions.

    Raises:
        ModelError: Names the input.
    """
    initialized = {t.name for t in model.graph.initializer}
    for value in model.graph.input:
        if value.name in initialized:
            continue
        part = f"input {quoted(value.name)}"
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            fix = "make the graph inputs tensors"
            raise refused(file, part, "is not a dense tensor (sequence, map, optional or sparse)", fix)
        if kind.elem_type == TensorProto.UNDEFINED or kind.elem_type not in TensorProto.DataType.values():
            raise refused(file, part, "has no known element type", "declare the element type of the input")
        if kind.elem_type == TensorProto.STRING:
            fix = "cut the text processing off the model and feed numbers"
            raise refused(file, part, "is a tensor of strings, which cannot be quantized", fix)
        if not kind.HasField("shape"):
            fix = "declare the shape; dimensions that vary can be named, but their number must be known"
            raise refused(file, part, "has no shape: its number of dimensions is unknown", fix)
        _check_input_dimensions(value, part, file, limits)


def _check_input_dimensions(value: onnx.ValueInfoProto, part: str, file: str, limits: Limits) -> None:
    shape = value.type.tensor_type.shape
    if len(shape.dim) > limits.rank:
        raise refused(file, part, f"has {len(shape.dim)} dimensions, more than {limits.rank}", EXPORT_AGAIN)
    elements = 1
    for axis, dim in enumerate(shape.dim):
        if not dim.HasField("dim_value"):
            continue
        elements *= dim.dim_value
        if dim.dim_value < 1:
            what = f"dimension {axis} is {dim.dim_value}"
            fix = "declare its size, or give it a name (dim_param) if it varies"
            raise refused(file, part, what, fix)
        # One byte an element is the least any element type of a graph input takes.
        if dim.dim_value > limits.dimension or elements > limits.value_bytes:
            what = f"has more than {size(limits.value_bytes)}: dimension {axis} is {dim.dim_value}"
            raise refused(file, part, what, "declare the sizes the model is used with")


def drop_initialized_inputs(model: onnx.ModelProto) -> list[str]:
    """Remove inputs that have a default value from the graph's inputs, so that they are constants.

    IR versions before 4 list every initializer as an input. Later versions mean "may be overridden" by it,
    which cannot hold for a weight that is quantized.

    Returns:
        The inputs that could have been overridden (none before IR version 4).
    """
    initialized = {t.name for t in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in initialized]
    dropped = [value.name for value in model.graph.input if value.name in initialized]
    if not dropped:
        return []
    copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
    del model.graph.input[:]
    model.graph.input.extend(copies)
    overridable = model.ir_version >= 4
    model.ir_version = max(model.ir_version, 4)
    return dropped if overridable else []
