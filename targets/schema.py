"""The target profile: one YAML that is rulebook, cost model, numerics contract and code-generation target.

Unknown keys are errors. Units are part of a key's name (``_hz``, ``_bytes``, ``_s``, ``_cycles``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from bitwright.targets.sections.costs import Efficiency as Efficiency
from bitwright.targets.sections.costs import Energy as Energy
from bitwright.targets.sections.costs import Overheads as Overheads
from bitwright.targets.sections.fpga import FpgaDevice
from bitwright.targets.sections.gpu import Gpu
from bitwright.targets.sections.record import Confidence, Count, NonNegative, Positive, Share, Strict
from bitwright.targets.sections.systolic import SystolicArray
from bitwright.targets.sections.vela import Vela

COMPILED_FAMILIES = ("x86_cpu", "arm_cpu", "cortex_m", "nvidia_gpu")
"""Families whose kernels TVM compiles: ``backend.py`` in the family's folder."""
GENERATED_FAMILIES = ("fpga", "ethos_u", "npu")
"""Families that generate something else from the integer program: ``generator.py``."""
FAMILIES = (*COMPILED_FAMILIES, *GENERATED_FAMILIES)
FOLDED_FAMILIES = ("fpga",)
"""Generated families whose layers can be folded, chosen together with formats: ``folding.py``."""
PRICED_FAMILIES = ("ethos_u",)
"""Generated families whose own compiler says what each layer costs: their generators have a ``price``."""

NAME_PATTERN = r"^[a-z0-9][a-z0-9_.-]{0,63}$"
ScalarType = Literal[
    "s2", "s4", "u4", "s8", "u8", "s16", "u16", "s32", "f8e4m3", "f8e5m2", "f16", "bf16", "f32"
]
# What a kernel multiplies: ``float`` is implied everywhere.
Format = Literal[
    "int8",  # 8-bit weights, 8-bit activations with scales from calibration
    "int8-dynamic",  # the same with one activation scale a call, computed from the input
    "int8-row",  # the same with one activation scale a row (token)
    "w6a8",  # weights of fewer bits on 8-bit activations; only circuits and compressed weights gain by odd widths
    "w5a8",
    "w4a8",
    "w3a8",
    "w2a8",
    "ternary-a8",  # -1, 0, 1 times a scale a channel
    "binary-a8",  # -1, 1 times a scale a channel
    "w8a16",  # 8-bit weights, 16-bit activations
    "fp8",  # 8-bit floating point weights and activations
    "w8",  # weight-only, float activations: 8, 4, 3, 2 bits in groups
    "w4",
    "w3",
    "w2",
    "nf4",  # weight-only with a table of 16, 3 or 2 values
    "ternary",
    "binary",
    "fp8-weights",  # weights stored as 8-bit floats with a scale a channel, computed in float32
    "fp16-weights",  # weights stored in half precision, computed in float32
    "fp16",  # computed in half precision
    "bf16",
]
FORMATS: tuple[str, ...] = get_args(Format)
# Integer weights narrower than 8 bits, multiplied by 8-bit activations with scales from calibration, and the largest
# integer on both sides of zero; finest first.
SHORT_FORMATS: dict[str, int] = {
    "w6a8": 31,
    "w5a8": 15,
    "w4a8": 7,
    "w3a8": 3,
    "w2a8": 1,
    "ternary-a8": 1,
    "binary-a8": 1,
}
MeasuredFormat = Literal["float"] | Format
# Shapes of the inputs ("c": constant, "s": scalar) ">" of the outputs, operators fused behind, "q" or "f": writes
# integers or float.
SIGNATURE_PATTERN = r"^[0-9x,sc]*>[0-9x,s]*(\+[A-Za-z0-9]+)*( [qf])?( beside [a-z0-9-]+)?$"
Signature = Annotated[str, Field(pattern=SIGNATURE_PATTERN)]


class Provenance(Strict):
    """Where the numbers of one section come from."""

    source: str
    confidence: Confidence
    date: str | None = None


class ComputeRow(Strict):
    """One instruction or array the code generator may use.

    Attributes:
        name: Referred to by ``OpRule.intrinsics``.
        weight, act, acc: Element types it multiplies and accumulates.
        macs_per_cycle: Multiply-accumulates per cycle and core at peak.
        k_align: Elements of the reduction it consumes at once.
        saturates: It adds neighbouring products in 16 bits and may saturate (vpmaddubsw).
        efficiency: Share of ``macs_per_cycle`` that this row reaches where a plain vector instruction reaches
            all of it; multiplied with the profile's ``efficiency`` of the kind of work.
    """

    name: str
    weight: ScalarType
    act: ScalarType
    acc: ScalarType
    macs_per_cycle: Positive
    k_align: Count = 1
    saturates: bool = False
    efficiency: Share = 1.0


class MemoryLevel(Strict):
    """A memory level, nearest first.

    Attributes:
        size_bytes: Capacity: of one core's part if ``per_core``, else of the whole level.
        bytes_per_s: Sustained read bandwidth, of one core's part or of the whole level likewise.
        per_core: Every core has its own.
    """

    name: str
    size_bytes: Positive
    bytes_per_s: Positive
    per_core: bool = False


class WorkFit(Strict):
    """Seconds of one call, fitted to micro-benchmarks: ``call_s + mac_s * macs + byte_s * bytes``.

    Attributes:
        call_s: Seconds of a call, however small.
        mac_s: Seconds of a multiply-accumulate.
        byte_s: Seconds of a byte read or written.
        points: Measurements it was fitted to.
        error: Median relative residual of these.
    """

    call_s: NonNegative
    mac_s: NonNegative
    byte_s: NonNegative
    points: Count
    error: NonNegative


class MeasuredTimes(Strict):
    """Seconds that one runtime takes on the target, written by ``bitwright targets probe``.

    Attributes:
        machine: What was measured on.
        versions: Package -> version.
        date: ISO date.
        threads: Threads that computed.
        call_s: Seconds of an empty call of the runtime.
        times: Operator -> format -> signature of the call -> seconds; overrides everything else.
        fits: Kind of work -> format -> fitted model for shapes that were not measured.
    """

    machine: str
    versions: dict[str, str] = {}
    date: str
    threads: Count = 1
    call_s: NonNegative = 0.0
    times: dict[str, dict[MeasuredFormat, dict[Signature, NonNegative]]] = {}
    fits: dict[str, dict[MeasuredFormat, WorkFit]] = {}


class Measured(Strict):
    """Measured times of the two runtimes."""

    artifact: MeasuredTimes | None = None
    onnxruntime: MeasuredTimes | None = None


class Requantize(Strict):
    """How an accumulator becomes an output integer.

    Attributes:
        kind: ``float``: by a float32 multiplier. ``fixed_point``: by an integer multiplier and a shift to the right.
        fma: Float: sums of two products round once.
        multiplier_bits: Fixed point: bits of the positive multiplier, the highest of which is set.
        rounding: Fixed point: ``half_up``: half is added before the shift. ``double``: a high product that rounds,
            then a shift that rounds. Operators may differ: ONNX operator -> rounding.
    """

    kind: Literal["float", "fixed_point"] = "float"
    fma: bool = True
    multiplier_bits: Annotated[int, Field(ge=8, le=31)] = 16
    rounding: Literal["half_up", "double"] = "half_up"
    rounding_of: dict[str, Literal["half_up", "double"]] = {}


class Numerics(Strict):
    """The numerics contract that the reference interpreter and every kernel keep."""

    rounding: Literal["half_even"] = "half_even"
    requantize: Requantize = Requantize()
    accumulator_bits: Literal[32] = 32


class QSpace(Strict):
    """A named menu of quantizers.

    Attributes:
        float_type: Set for menus that stay in floating point; then nothing else applies.
        bits: Integer width.
        signed: Integer signedness.
        symmetric: Zero point fixed (0 for signed, 128 for unsigned).
        granularity: One scale a tensor, one a channel, or one for every ``groups`` weights of a channel.
        groups: Group lengths the kernel takes, best first; for ``granularity: group`` only.
        narrow: Leave out the smallest integer, as in [-127, 127].
        stored_bits: Width of the elements in the file where the runtime has no narrower type for this kernel.
        codebook: The values are looked up in a fixed table instead of being integers times a scale.
        dynamic: The scale comes from the input itself: one a tensor or one a row, at run time.
        fixed_range: (low, high) that the target prescribes, e.g. for a Softmax; calibration has no say then.
    """

    float_type: Literal["f32", "f16", "bf16"] | None = None
    bits: Literal[1, 2, 3, 4, 5, 6, 8, 16] = 8
    signed: bool = True
    symmetric: bool = False
    granularity: Literal["tensor", "channel", "group"] = "tensor"
    groups: tuple[Annotated[int, Field(ge=16, le=256)], ...] = ()
    narrow: bool = False
    stored_bits: Literal[2, 4, 8] | None = None
    codebook: Literal["nf4", "ternary", "binary", "e4m3", "e5m2"] | None = None
    dynamic: Literal["tensor", "row"] | None = None
    fixed_range: tuple[float, float] | None = None

    @property
    def calibrated(self) -> bool:
        """Whether its scale has to be learned from data."""
        return self.float_type is None and self.dynamic is None


class Combo(Strict):
    """One combination of quantizers that the runtime has a kernel for.

    Attributes:
        act: qspace of the data inputs.
        weight: qspace of the constant weight; None for operators without one.
        out: qspaces the operator can write, best first.
        intrinsics: Compute rows it runs on, best first.
        format: The name recipes and plans know it by.
        accumulator: What the products are summed in; ``f32`` where the runtime dequantizes first.
        channel_multiple: Input and output channels of a convolution (of each group) must be multiples of it.
    """

    format: Format = "int8"
    accumulator: Literal["s32", "s48", "s64", "f32"] = "s32"
    act: str
    weight: str | None = None
    out: tuple[str, ...] = Field(min_length=1)
    intrinsics: tuple[str, ...] = ()
    channel_multiple: Count = 1


class OpRule(Strict):
    """What the runtime can do with one ONNX operator.

    Attributes:
        role: ``anchor``: does enough arithmetic on a constant weight to earn its integers. ``follower``:
            has an integer kernel, worth it only between integer neighbours. ``carrier``: moves or selects
            integers unchanged. ``table``: looks up rows of a constant table that is stored in integers and
            dequantized behind the look-up. ``residual``: adds to what an anchor in front of it writes in float;
            only its other operand is quantized.
        combos: Kernels, best first.
        scales: ``unified``: inputs and output must share one scale; ``free`` otherwise.
        min_macs: An anchor with fewer multiply-accumulates a call is left in float.
        min_rows: A matrix product with fewer rows or columns is left in float.
    """

    role: Literal["anchor", "follower", "carrier", "table", "residual"]
    combos: tuple[Combo, ...] = Field(min_length=1)
    scales: Literal["unified", "free"] = "free"
    min_macs: int = Field(default=0, ge=0)
    min_rows: Count = 1

    def combo_for(self, formats: Sequence[str]) -> Combo | None:
        """Return the kernel of the first format that there is one for."""
        found = (combo for name in formats for combo in self.combos if combo.format == name)
        return next(found, None)


class Runtime(Strict):
    """What one way of executing the model has integer kernels for.

    Attributes:
        ops: ONNX operator -> rule; an absent operator stays in float.
        fusions: Chains that run as one kernel: no quantizer inside.
        execution_provider: For ONNX Runtime.
        provider_options: Its options, as ONNX Runtime takes them.
        optimize: ONNX Runtime's own graph optimizations are on.
        contrib_ops: It executes operators of the domain ``com.microsoft``.
        bias: A quantized product's bias: integers of the accumulator's scale behind a DequantizeLinear, or float.
        refused: Format -> why nobody should want it here, where a reader might look for it.
        session_config: ``session_config_entries`` that make the file fast.
        disabled_optimizers: ONNX Runtime optimizers that would undo the integers.
        opset: Opset the model is written in.
        float_formats: Half-precision formats it computes any operator in.
        integer_only: The target computes nothing in float: an operator with an integer kernel uses it, whether or not
            its neighbours do.
    """

    ops: dict[str, OpRule]
    fusions: tuple[tuple[str, ...], ...] = ()
    execution_provider: str | None = None
    provider_options: dict[str, str] = {}
    optimize: bool = True
    contrib_ops: bool = True
    bias: Literal["s32", "f32"] = "s32"
    refused: dict[Format, str] = {}
    session_config: dict[str, str] = {}
    disabled_optimizers: tuple[str, ...] = ()
    opset: int = 21
    float_formats: tuple[Literal["fp16", "bf16"], ...] = ()
    integer_only: bool = False

    def formats(self) -> tuple[str, ...]:
        """Return every format that some operator with a constant weight can run in."""
        anchors = (rule for rule in self.ops.values() if rule.role == "anchor")
        return tuple(dict.fromkeys([*(c.format for r in anchors for c in r.combos), *self.float_formats]))


class Runtimes(Strict):
    """The two plans made from one profile."""

    artifact: Runtime
    onnxruntime: Runtime


class Codegen(Strict):
    """``tvm.target.Target`` fields, and what runs the code.

    Attributes:
        kind: ``none`` in families that generate their artifacts themselves.
        executor: ``vm``: a shared library on TVM's runtime. ``static``: C source with one arena and kernels as
            object code, on no runtime and no operating system. ``generated``: what the family itself writes.
        float_mattr: Further features, or with a minus features to do without, of float operators in ``static`` code.
    """

    kind: Literal["llvm", "cuda", "none"] = "llvm"
    executor: Literal["vm", "static", "generated"] = "vm"
    mtriple: str = Field(min_length=1)
    mcpu: str = Field(min_length=1)
    mattr: tuple[str, ...] = ()
    float_mattr: tuple[str, ...] = ()


class Emulator(Strict):
    """How to execute the artifact on another machine.

    Attributes:
        command: Emulator.
        cpu: Processor it imitates.
        board: Board it imitates, where it emulates a whole machine.
    """

    command: str
    cpu: str
    board: str | None = None


class Toolchain(Strict):
    """What turns object files into the artifact and runs it."""

    triple: str = Field(min_length=1)
    emulator: Emulator | None = None


GENERATED_CODE = Codegen(kind="none", executor="generated", mtriple="none", mcpu="none")
GENERATED_TOOLS = Toolchain(triple="none")


class Limits(Strict):
    """What the device or the runtime cannot exceed.

    Attributes:
        max_rank: Most dimensions of a tensor.
        max_reduction: Most products summed into one accumulator; the default leaves half of int32 to the
            bias.
        ram_bytes, flash_bytes: Capacities of the device.
    """

    max_rank: Count = 6
    max_reduction: Count = 32768
    ram_bytes: Positive | None = None
    flash_bytes: Positive | None = None


class Budgets(Strict):
    """Default budgets; the command line overrides them."""

    latency_s: Positive | None = None
    weights_bytes: Positive | None = None
    peak_ram_bytes: Positive | None = None


class Profile(Strict):
    """A whole target profile after ``extends`` has been resolved.

    Attributes:
        schema_version: Version of this schema, YAML key ``schema``.
        name: Identifier used on the command line.
        family: Folder under ``targets/`` whose backend builds and runs artifacts.
        description: One line for ``bitwright targets list``.
        provenance: Section name (``compute``, ``memory``, ``clock_hz``, ...) -> where its numbers come from;
            every section that holds numbers must be listed.
        clock_hz: Sustained clock of one core.
        cores: Cores the artifact may use.
        codegen, toolchain: Required where TVM compiles the kernels.
        gpu, fpga, vela, array: What only graphics processors, FPGAs, Ethos-U accelerators and systolic arrays have;
            required in the family that it belongs to, refused in others.
    """

    schema_version: Literal[1] = Field(alias="schema")
    name: str = Field(pattern=NAME_PATTERN)
    family: Literal["x86_cpu", "arm_cpu", "cortex_m", "nvidia_gpu", "fpga", "ethos_u", "npu"]
    description: str
    provenance: dict[str, Provenance]
    clock_hz: Positive
    cores: Count
    codegen: Codegen = GENERATED_CODE
    compute: tuple[ComputeRow, ...] = Field(min_length=1)
    efficiency: Efficiency = Efficiency()
    memory: tuple[MemoryLevel, ...] = Field(min_length=1)
    overheads: Overheads = Overheads()
    energy: Energy | None = None
    measured: Measured | None = None
    numerics: Numerics = Numerics()
    qspaces: dict[str, QSpace]
    runtimes: Runtimes
    toolchain: Toolchain = GENERATED_TOOLS
    limits: Limits = Limits()
    budgets: Budgets = Budgets()
    gpu: Gpu | None = None
    fpga: FpgaDevice | None = None
    vela: Vela | None = None
    array: SystolicArray | None = None

    def qspace(self, name: str) -> QSpace:
        """Return the named menu."""
        return self.qspaces[name]

    def compute_row(self, name: str) -> ComputeRow:
        """Return the named compute row."""
        return next(row for row in self.compute if row.name == name)

    def dump(self) -> dict[str, Any]:
        """Return plain data that loads back to the same profile."""
        return self.model_dump(mode="json", by_alias=True)
