"""Reads a model file that nobody vouches for. Nothing else in Bitwright opens a model file."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from bitwright.compiler.errors import UsageError
from bitwright.compiler.graph.mapped import MappedFile, map_weights
from bitwright.compiler.ingest import checks, graph_checks
from bitwright.compiler.ingest.checker import run_checker
from bitwright.compiler.ingest.detach import Detached, detach
from bitwright.compiler.ingest.external_data import (
    ExternalFile,
    check_external_data,
    digest_into,
    map_contained,
)
from bitwright.compiler.ingest.limits import DEFAULT_LIMITS, Limits
from bitwright.compiler.ingest.protos import bodies
from bitwright.compiler.ingest.runtime_norms import expand_norms
from bitwright.compiler.ingest.tensor_checks import check_tensors
from bitwright.compiler.ingest.text import one_line, quoted, refused, size
from bitwright.compiler.ingest.value_checks import check_values


@dataclass(frozen=True)
class SourceModel:
    """A model that passed every check, and where it came from.

    Attributes:
        model: The model. Every node has a unique name, nodes are in topological order, constants are not
            listed as inputs. Large weights and external tensors are views of their mapped files: the files
            may be renamed or deleted while the model lives, but must not be written into.
        path: The model file.
        sha256: Of the model file followed by its external data files in order of location; hexadecimal.
        bytes: Size of the model file and its external data files together.
        warnings: What is legal but suspicious, each ``where: what``.
        external_files: Canonical paths of the external data files.
    """

    model: ir.Model
    path: Path
    sha256: str
    bytes: int
    warnings: tuple[str, ...] = ()
    external_files: tuple[Path, ...] = ()


def read_model(path: Path, limits: Limits = DEFAULT_LIMITS) -> SourceModel:
    """Read, check and tidy an ONNX model.

    The order is chosen so that no check does work that an earlier one should have refused: size before
    reading, counts before walks, containment before any external byte, our own rules before the ONNX checker.

    Args:
        path: An ONNX protobuf file.
        limits: Budgets.

    Returns:
        The model and its provenance.

    Raises:
        UsageError: There is no such file.
        ModelError: The file is not a valid model, or is over a budget; the message names the node or tensor.
    """
    path = Path(path)
    file = str(path)
    content = _map(path, limits)
    sha256 = hashlib.sha256()
    try:
        for piece in content.pieces():
            sha256.update(piece)
        detached = detach(content.view)
        proto = _parse(detached.message, file)
        external, warnings = _check_proto(proto, detached, path, limits)
        model = _deserialize(proto, file)
        sources = {detached.token: content} | {f.location: map_contained(f.path) for f in external}
        map_weights(model, sources)
        warnings += check_values(model, file)
        for data_file in external:
            digest_into(sha256, data_file, file)
        content.release_pages()
    except OSError as error:
        what = f"its data cannot be read: {one_line(error)}"
        raise refused(file, "", what, "do not change the files while they are read") from error
    paths = {f.path: f.bytes for f in external}
    return SourceModel(
        model, path, sha256.hexdigest(), content.bytes + sum(paths.values()), tuple(warnings), tuple(paths)
    )


def _map(path: Path, limits: Limits) -> MappedFile:
    file = str(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        fix = "check the path of the model"
        what = f"cannot be read: {reason}"
        raise UsageError(what, where=file, fix=fix) from None
    if not stat.S_ISREG(found.st_mode):
        raise refused(file, "", "is not a regular file", "give the path of the .onnx file itself")
    try:
        content = MappedFile(path.open("rb", buffering=0))
    except OSError as error:
        fix = "check the permissions of the file"
        what = f"cannot be read: {error.strerror}"
        raise UsageError(what, where=file, fix=fix) from None
    if content.bytes > limits.model_file_bytes:
        what = f"is {size(content.bytes)} large; a model file holds at most {size(limits.model_file_bytes)}"
        raise refused(
            file, "", what, "store the weights as external data (onnx.save_model(save_as_external_data=True))"
        )
    return content


def _parse(data: bytes, file: str) -> onnx.ModelProto:
    fix = "check that the export or download finished and that this is the .onnx file"
    if not data:
        raise refused(file, "", "the file is empty", fix)
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
        return model
    except DecodeError as error:
        if "depth" in str(error).lower():
            what = "its graphs are nested too deep"
            raise refused(file, "", what, "simplify the control flow in the exporter") from None
        what = "is not an ONNX protobuf, or it is cut off or damaged"
        raise refused(file, "", what, fix) from None


def _check_proto(
    proto: onnx.ModelProto, detached: Detached, path: Path, limits: Limits
) -> tuple[tuple[ExternalFile, ...], list[str]]:
    file = str(path)
    warnings = []
    if proto.training_info:
        proto.ClearField("training_info")
        warnings.append(f"{file}: its training part is ignored")
    checks.check_versions(proto, file, limits)
    found = bodies(proto, file, limits)
    checks.check_text(proto, file, limits)
    checks.check_functions(proto, file, limits)
    expand_norms(proto)
    checks.check_operators(proto, found, file)
    check_tensors(found, detached, file, limits)
    external = check_external_data(found, path.parent, detached, file, limits)
    for body in found:
        graph_checks.check_unique_initializers(body, file)
        graph_checks.check_single_assignment(body, file)
    for name in checks.drop_initialized_inputs(proto):
        warnings.append(f"{file}: input {quoted(name)}: has a default value, which is treated as a constant")
    checks.check_inputs(proto, file, limits)
    reordered = sum(graph_checks.check_connections(graph, file) for graph in [proto.graph, *proto.functions])
    if reordered:
        warnings.append(f"{file}: nodes were not in topological order, and were sorted")
    graph_checks.name_nodes(bodies(proto, file, limits))
    run_checker(proto, file, limits)
    return external, warnings


def _deserialize(proto: onnx.ModelProto, file: str) -> ir.Model:
    try:
        return ir.from_proto(proto)
    except (ir.serde.SerdeError, NotImplementedError, ValueError) as error:
        cause = error.__cause__ or error
        what = f"cannot be represented: {one_line(cause)}"
        raise refused(file, "", what, "export the model again with a current exporter") from error
