"""Execute a bundle's artifact and compare every integer kernel with the reference interpreter bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.compiler.bundle.bundle import (
    Bundle,
    GoldenSet,
)
from bitwright.compiler.bundle.functions import merged
from bitwright.compiler.bundle.manifest import Manifest
from bitwright.compiler.bundle.references import references_of
from bitwright.compiler.bundle.segments import ONLY_ONNXRUNTIME
from bitwright.compiler.errors import InternalError, UsageError, VerificationError
from bitwright.compiler.interpret.run import run_step
from bitwright.compiler.lower.kernel_table import KernelCall, to_logical
from bitwright.compiler.program.ops import FloatIsland, Program, Step
from bitwright.compiler.program.segments import NotLowered
from bitwright.targets.backend import Execution, Measurement
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.shape_rules import MAIN

KERNELS_FILE = "lib/kernels.json"
SHOWN_DIFFERENCES = 5
TIMED_CALLS = 5


@dataclass(frozen=True)
class Difference:
    """How far two arrays are apart.

    Attributes:
        elements: Number of elements compared.
        differing: Elements whose bits differ; NaN equals NaN.
        largest: Largest absolute difference; in quantization steps for integers, in real units for floats;
            infinite where only one side is finite or the shapes or types differ.
    """

    elements: int
    differing: int
    largest: float

    @property
    def is_zero(self) -> bool:
        """No element differs."""
        return self.differing == 0

    def sentence(self) -> str:
        """Return the difference in words."""
        if self.is_zero:
            return f"all {self.elements} elements equal"
        return f"{self.differing} of {self.elements} elements differ, by at most {self.largest:g}"


@dataclass(frozen=True)
class KernelDifference:
    """A kernel call whose output is not what the interpreter computes from the same inputs.

    Attributes:
        golden: Number of the golden set.
        step: Step of the program, or the tensor of a change of storage order.
        function: Symbol of the kernel in the library.
        difference: How far apart.
    """

    golden: int
    step: str
    function: str
    difference: Difference

    def sentence(self) -> str:
        """Return the finding in words."""
        return f"step '{self.step}' ({self.function}, golden set {self.golden}): {self.difference.sentence()}"


@dataclass(frozen=True)
class OutputComparison:
    """One output of the artifact against a reference.

    Attributes:
        golden: Number of the golden set.
        output: Its name.
        reference: ``"golden"``: the recorded outputs, of ONNX Runtime executing node by node as the standard
            defines it. ``"onnxruntime"``: model.onnx as deployed, with ONNX Runtime's own fusions.
        dtype: numpy name.
        difference: How far apart.
    """

    golden: int
    output: str
    reference: str
    dtype: str
    difference: Difference

    def sentence(self) -> str:
        """Return the comparison in words."""
        head = f"output '{self.output}' ({self.dtype}) against {self.reference}, set {self.golden}"
        return f"{head}: {self.difference.sentence()}"


@dataclass(frozen=True)
class Verification:
    """What was executed and how it compares.

    Attributes:
        executed: How the library was executed: ``"native"`` or ``"emulated"``; ``"onnxruntime"`` if nothing of the
            model is in a library; ``"none"`` if nothing was executed.
        reason: Why nothing was executed, or "".
        sets: Golden sets executed.
        calls: Kernel calls compared.
        elements: Elements of their outputs.
        kernel_differences: Calls that are not equal bit for bit.
        outputs: Final outputs against the references; float islands may make them differ.
        unrecorded: Integer steps that no kernel call belongs to (reshapes that move nothing).
        seconds: Best time of one call over the sets, or None where it means nothing.
        step_seconds: Step -> best seconds of its kernels in one call; empty where times mean nothing.
        float_seconds: Best seconds of everything in the library that is no integer kernel.
        not_lowered: Nodes that ONNX Runtime executed on this machine; no part of what was emulated.
        measurements: What else the execution measured, e.g. memory on an emulated board.
    """

    executed: str
    reason: str = ""
    sets: int = 0
    calls: int = 0
    elements: int = 0
    kernel_differences: tuple[KernelDifference, ...] = ()
    outputs: tuple[OutputComparison, ...] = ()
    unrecorded: tuple[str, ...] = ()
    seconds: float | None = None
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    float_seconds: float = 0.0
    not_lowered: tuple[NotLowered, ...] = ()
    measurements: tuple[Measurement, ...] = ()

    @property
    def passed(self) -> bool:
        """No executed kernel call differs from the interpreter (also true if nothing could be executed)."""
        return not self.kernel_differences

    def lines(self) -> list[str]:
        """Return the result in words."""
        if self.executed == "none":
            return [f"compiled, not executed: {self.reason}"]
        found = [self._headline()]
        if self.not_lowered:
            nodes = sum(len(f.nodes) for f in self.not_lowered)
            operators = sorted({operator for f in self.not_lowered for operator in f.operators})
            found.append(f"{nodes} nodes ran in ONNX Runtime on this machine: {', '.join(operators)}")
        shown = self.kernel_differences[:SHOWN_DIFFERENCES]
        found += [f"differs: {d.sentence()}" for d in shown]
        hidden = len(self.kernel_differences) - len(shown)
        return [
            *found,
            *(m.sentence() for m in self.measurements),
            *([f"... and {hidden} more"] if hidden else []),
            *(o.sentence() for o in self.outputs),
        ]

    def _headline(self) -> str:
        if self.executed == ONLY_ONNXRUNTIME:
            return (
                f"nothing of the model is in a library; executed by ONNX Runtime on {self.sets} golden sets"
            )
        equal = self.calls - len(self.kernel_differences)
        return (
            f"executed ({self.executed}) on {self.sets} golden sets: {equal} of {self.calls} integer kernel "
            f"calls ({self.elements} elements) equal the reference interpreter bit for bit"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for report.json; an infinite difference becomes None."""
        record: dict[str, Any] = asdict(self)
        for entry in (*record["kernel_differences"], *record["outputs"]):
            largest = entry["difference"]["largest"]
            entry["difference"]["largest"] = largest if math.isfinite(largest) else None
        return {**record, "passed": self.passed}

    def check(self) -> None:
        """Raise if an integer kernel differs.

        Raises:
            VerificationError: Names the first kernels that differ.
        """
        if not self.passed:
            what = "the artifact differs from the reference interpreter\n  " + "\n  ".join(self.lines())
            raise VerificationError(
                what, fix="report it with the bundle: a kernel or the tool chain has a bug"
            )


def verify(bundle_path: str | Path, *, samples: int | None = None) -> Verification:
    """Execute the artifact of a finished bundle on its golden inputs and compare it.

    Each integer kernel is judged alone: the interpreter gets the inputs that the kernel really had, so a
    difference in a float island before it can neither hide nor imitate a wrong kernel.

    Args:
        bundle_path: An output folder.
        samples: Use only the first so many golden sets.

    Returns:
        What was compared; ``executed == "none"`` with a reason if this machine cannot run the artifact.

    Raises:
        UsageError: The bundle is damaged or holds no golden data.
        ToolchainError: The artifact crashed.
    """
    return _verify_bundle(Bundle.open(bundle_path), samples)


def verify_folder(folder: Path, profile: Profile, *, samples: int | None = None) -> Verification:
    """Verify a bundle that is still being written and has no manifest yet; otherwise as :func:`verify`."""
    manifest = Manifest(files={}, versions={}, profile=profile.dump())
    return _verify_bundle(Bundle(folder, manifest), samples)


def _verify_bundle(bundle: Bundle, samples: int | None) -> Verification:
    reason = bundle.why_not_executable()
    if reason:
        return Verification(executed="none", reason=reason)
    golden = list(islice(bundle.golden(), samples))
    if not golden:
        what = "the bundle holds no golden data to verify with"
        raise UsageError(what, where=str(bundle.path))
    return _verify_sets(bundle, golden)


def _execute(
    bundle: Bundle, feeds: Mapping[str, np.ndarray]
) -> tuple[tuple[str, int | None], list[Execution], Execution]:
    """Return the function that serves ``feeds`` and for how many elements, its executions, and all of them as one."""
    if bundle.rules is None:
        execution = bundle.execute(feeds, trace=True, repeat=TIMED_CALLS)
        return (MAIN, None), [execution], execution
    dispatch = bundle.rules.dispatch(feeds)
    executions = bundle.execute_calls(dispatch, trace=True, repeat=TIMED_CALLS)
    rule, dynamic = dispatch.function, bundle.rules.dynamic
    elements = dispatch.sizes[dynamic] if dynamic is not None and bundle.rules.is_dynamic(rule) else None
    return (rule.name, elements), executions, merged(bundle.rules, dispatch, executions)


def _verify_sets(bundle: Bundle, golden: Sequence[GoldenSet]) -> Verification:
    reference = references_of(bundle)
    differences: list[KernelDifference] = []
    outputs: list[OutputComparison] = []
    times: list[float] = []
    calls = elements = 0
    executed = "none"
    call_seconds: Sequence[tuple[str, float]] = ()
    measurements: Sequence[Measurement] = ()
    for data in golden:
        (function, elements_of), executions, whole = _execute(bundle, data.inputs)
        found, executed, measurements = reference(function, elements_of), whole.executed, whole.measurements
        for execution in executions:
            calls += len(found.table)
            if function == MAIN:  # times of other shapes are no part of the summary
                call_seconds = execution.call_seconds
                times += [execution.seconds] if execution.seconds is not None else []
            for step, call, difference in compare_calls(found.program, found.table, execution):
                elements += difference.elements
                if not difference.is_zero:
                    differences.append(KernelDifference(data.number, step, call.function, difference))
        references = {"golden": data.outputs, "onnxruntime": bundle.run(data.inputs, "ort")}
        for name, values in references.items():
            outputs += compare_outputs(data.number, whole.outputs, name, values)
    main = reference(MAIN)
    step_seconds, float_seconds = times_by_step(main.program, main.table, call_seconds)
    return Verification(
        executed=executed,
        sets=len(golden),
        calls=calls,
        elements=elements,
        kernel_differences=tuple(differences),
        outputs=tuple(outputs),
        unrecorded=unrecorded_steps(main.program, main.table),
        seconds=min(times, default=None),
        step_seconds=step_seconds,
        float_seconds=float_seconds,
        not_lowered=() if bundle.segments is None else bundle.segments.findings(),
        measurements=tuple(measurements),
    )


def times_by_step(
    program: Program, table: Sequence[KernelCall], call_seconds: Sequence[tuple[str, float]]
) -> tuple[dict[str, float], float]:
    """Return step -> seconds of its kernels, and the seconds of all other calls.

    Changes of storage order count for the step that made the tensor.
    """
    functions = {call.function for call in table}
    integer = [seconds for function, seconds in call_seconds if function in functions]
    if len(integer) != len(table):
        return {}, 0.0
    producers = {name: step.name for step in program.steps for name in step.outputs}
    found: dict[str, float] = {}
    for call, seconds in zip(table, integer, strict=True):
        label = producers.get(call.output.tensor, call.output.tensor)
        found[label] = found.get(label, 0.0) + seconds
    return found, sum(seconds for function, seconds in call_seconds if function not in functions)


def compare_calls(
    program: Program, table: Sequence[KernelCall], execution: Execution
) -> Iterator[tuple[str, KernelCall, Difference]]:
    """Yield for every kernel call its label, its table entry and its difference from the interpreter.

    Raises:
        InternalError: The trace and the table do not list the same calls.
    """
    recorded = [name for name, _, _ in execution.trace]
    expected = [call.function for call in table]
    if recorded != expected:
        at = next(
            (k for k, pair in enumerate(zip(recorded, expected, strict=False)) if pair[0] != pair[1]), None
        )
        detail = (
            f"call {at}: '{recorded[at]}', expected '{expected[at]}'"
            if at is not None
            else "their lengths differ"
        )
        what = f"the trace has {len(recorded)} kernel calls, the table {len(expected)}; {detail}"
        raise InternalError(what, where=KERNELS_FILE)
    # By the tensor it writes: names of steps come from names of nodes, which reading a file may make up.
    producers = {name: step for step in program.steps for name in step.outputs}
    for call, (_, inputs, output) in zip(table, execution.trace, strict=True):
        logical = {s.tensor: to_logical(a, s) for s, a in zip(call.inputs, inputs, strict=True)}
        label, reference = _expected_output(program, producers, call, logical)
        yield label, call, compare(to_logical(output, call.output), reference)


def _expected_output(
    program: Program, producers: Mapping[str, Step], call: KernelCall, recorded: Mapping[str, np.ndarray]
) -> tuple[str, np.ndarray]:
    """Return the label of a call and what the interpreter computes from its recorded inputs."""
    if call.step is None:
        # A change of storage order: the logical tensor stays what it was.
        return f"layout of {call.output.tensor}", recorded[call.inputs[0].tensor]
    if call.output.tensor not in producers:
        msg = f"no step of the program writes '{call.output.tensor}'"
        raise InternalError(msg, where=KERNELS_FILE)
    step = producers[call.output.tensor]
    values = {**program.constants, **recorded}
    missing = [name for name in step.inputs if name not in values]
    if missing:
        msg = f"the trace lacks the input '{missing[0]}' of step '{step.name}'"
        raise InternalError(msg, where=KERNELS_FILE)
    results = run_step(step, program, tuple(values[name] for name in step.inputs))
    return step.name, results[step.outputs.index(call.output.tensor)]


def compare(actual: np.ndarray, expected: np.ndarray) -> Difference:
    """Return how far ``actual`` is from ``expected``."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return Difference(elements=expected.size, differing=max(expected.size, 1), largest=float("inf"))
    if expected.dtype.kind != "f":
        gap = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
        return Difference(
            expected.size, int(np.count_nonzero(actual != expected)), float(gap.max(initial=0.0))
        )
    unsigned = np.dtype(f"u{expected.dtype.itemsize}")
    same = np.ascontiguousarray(actual).view(unsigned) == np.ascontiguousarray(expected).view(unsigned)
    same |= np.isnan(actual) & np.isnan(expected)
    finite = np.isfinite(actual) & np.isfinite(expected)
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.where(finite, np.abs(actual.astype(np.float64) - expected.astype(np.float64)), np.inf)
    return Difference(expected.size, int(np.count_nonzero(~same)), float(gap[~same].max(initial=0.0)))


def compare_outputs(
    golden: int, actual: Mapping[str, np.ndarray], reference: str, expected: Mapping[str, np.ndarray]
) -> list[OutputComparison]:
    """Return one comparison for each output that the reference has."""
    names = [name for name in actual if name in expected]
    return [
        OutputComparison(
            golden, name, reference, str(actual[name].dtype), compare(actual[name], expected[name])
        )
        for name in names
    ]


def unrecorded_steps(program: Program, table: Sequence[KernelCall]) -> tuple[str, ...]:
    """Return the integer steps that no kernel call belongs to."""
    written = {call.output.tensor for call in table if call.step is not None}
    integer = [step for step in program.steps if not isinstance(step, FloatIsland)]
    return tuple(step.name for step in integer if not written.intersection(step.outputs))
