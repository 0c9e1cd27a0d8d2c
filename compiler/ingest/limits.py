"""Every budget that untrusted input is held to, in one place."""

from __future__ import annotations

from dataclasses import dataclass

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """Budgets for models and data; an input over one of them is refused, never cut.

    The defaults are far above what real networks need and far below what hurts the machine.

    Attributes:
        model_file_bytes: Size of the protobuf file itself. Protobuf cannot encode 2 GiB or more; larger
            models keep their weights as external data.
        external_bytes: Sum of the sizes of the external data files of one model.
        tensor_bytes: Size of one constant tensor, in the file or external.
        value_bytes: Size of one computed tensor whose shape is static, e.g. the output of ConstantOfShape.
        nested_external_bytes: Sum of the external tensors inside control-flow bodies and functions.
        nodes: Nodes of all bodies together, model-local functions counted once for every call.
        bodies: Graphs of all control-flow nodes together, plus functions.
        depth: Nesting of control-flow bodies.
        calls: Nesting of model-local function calls.
        rank: Dimensions of one tensor.
        dimension: One dimension of one tensor.
        name_bytes: Length of one name, UTF-8.
        ir_min: Smallest accepted ONNX IR version.
        ir_max: Largest accepted IR version (what ONNX Runtime loads).
        opset_min: Smallest accepted version of the standard operator set. Older ones changed the meaning of
            broadcasting and cannot be converted reliably.
        opset_max: Largest accepted version of the standard operator set (what ONNX Runtime loads).
        samples: Samples of one data set.
        sample_bytes: Size of one array of one sample, or of one array of a file in a folder of samples.
        data_bytes: Size of all samples of a data set together, inflated.
        npz_member_bytes: Inflated size of one array of an .npz file.
        npz_members: Arrays in one .npz file.
        npy_header_bytes: Length of the header of an array in an .npz file.
        files: Files in a folder of samples.
    """

    model_file_bytes: int = 2 * GiB - 1
    external_bytes: int = 64 * GiB
    tensor_bytes: int = 16 * GiB
    value_bytes: int = 4 * GiB
    nested_external_bytes: int = 256 * MiB
    nodes: int = 100_000
    bodies: int = 1_000
    depth: int = 20
    calls: int = 32
    rank: int = 32
    dimension: int = (1 << 31) - 1
    name_bytes: int = 64 * KiB
    ir_min: int = 3
    ir_max: int = 13
    opset_min: int = 7
    opset_max: int = 26
    samples: int = 1_000_000
    sample_bytes: int = 1 * GiB
    data_bytes: int = 64 * GiB
    npz_member_bytes: int = 16 * GiB
    npz_members: int = 4_096
    npy_header_bytes: int = 64 * KiB
    files: int = 100_000


DEFAULT_LIMITS = Limits()
