"""Execute a bundle's artifact and compare every integer kernel with the reference interpreter bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from bitwright.compiler.bundle.bundle import (
    Bundle,
    GoldenSet,
)
from bitwright.compiler.bundle.functions import merged
from bitwright.compiler.bundle.manifest import Manifest
from bitwright.compiler.bundle.references import references_of
from bitwright.compiler.bundle.verification import (
    Difference,
    KernelDifference,
    OutputComparison,
    Verification,
    compare,
    compare_outputs,
)
from bitwright.compiler.errors import InternalError, UsageError
from bitwright.compiler.interpret.attention import allowed_difference
from bitwright.compiler.interpret.run import run_step
from bitwright.compiler.lower.kernel_table import KernelCall, to_logical
from bitwright.compiler.program.ops import CachedAttention, FloatIsland, Program, Step
from bitwright.targets.backend import Execution, Measurement
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.shape_rules import MAIN

KERNELS_FILE = "lib/kernels.json"
TIMED_CALLS = 5


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
    if bundle.generated:
        return _verify_generated(bundle, golden)
    return _verify_sets(bundle, golden)


def _verify_generated(bundle: Bundle, golden: Sequence[GoldenSet]) -> Verification:
    """Execute a generated artifact and compare every layer with the integer reference of its family."""
    differences: list[KernelDifference] = []
    outputs: list[OutputComparison] = []
    calls = elements = 0
    executed = "none"
    measurements: Sequence[Measurement] = ()
    for data in golden:
        found = bundle.simulate(data.inputs, check=True)
        executed, measurements = found.executed, found.measurements
        for check in found.checks:
            difference = compare(check.actual, check.expected)
            calls, elements = calls + 1, elements + difference.elements
            if not difference.is_zero:
                differences.append(KernelDifference(data.number, check.step, check.part, difference))
        references = {"golden": data.outputs, "onnxruntime": bundle.run(data.inputs, "ort")}
        for name, values in references.items():
            outputs += compare_outputs(data.number, found.outputs, name, values)
    return Verification(
        executed=executed,
        sets=len(golden),
        calls=calls,
        elements=elements,
        kernel_differences=tuple(differences),
        outputs=tuple(outputs),
        measurements=tuple(measurements),
    )


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
    calls = bounded = elements = 0
    executed = "none"
    call_seconds: Sequence[tuple[str, float]] = ()
    measurements: Sequence[Measurement] = ()
    for data in golden:
        (function, elements_of), executions, whole = _execute(bundle, data.inputs)
        found, executed, measurements = reference(function, elements_of), whole.executed, whole.measurements
        for execution in executions:
            calls += len(found.table)
            bounded += sum(call.operation == CachedAttention.__name__ for call in found.table)
            if function == MAIN:  # times of other shapes are no part of the summary
                call_seconds = execution.call_seconds
                times += [execution.seconds] if execution.seconds is not None else []
            for step, call, difference in compare_calls(found.program, found.table, execution):
                elements += difference.elements
                if not difference.is_zero:
                    differences.append(KernelDifference(data.number, step, call.function, difference))
        references = {"golden": data.outputs, "onnxruntime": bundle.run(data.inputs, "ort")}
        for name, values in references.items():
            outputs += compare_outputs(data.number, _answers(bundle, whole.outputs), name, values)
    main = reference(MAIN)
    step_seconds, float_seconds = times_by_step(main.program, main.table, call_seconds)
    return Verification(
        executed=executed,
        sets=len(golden),
        calls=calls,
        bounded=bounded,
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


def _answers(bundle: Bundle, outputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Return the outputs without caches: what is written there, attention has read."""
    if bundle.rules is None:
        return outputs
    return {port.name: outputs[port.name] for port in bundle.rules.answers}


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
        label, reference, bound = _expected_output(program, producers, call, logical)
        yield label, call, compare(to_logical(output, call.output), reference, bound)


def _expected_output(
    program: Program, producers: Mapping[str, Step], call: KernelCall, recorded: Mapping[str, np.ndarray]
) -> tuple[str, np.ndarray, float]:
    """Return the label of a call, what the interpreter computes from its recorded inputs, and what may differ."""
    if call.step is None:
        # A change of storage order: the logical tensor stays what it was.
        return f"layout of {call.output.tensor}", recorded[call.inputs[0].tensor], 0.0
    if call.output.tensor not in producers:
        msg = f"no step of the program writes '{call.output.tensor}'"
        raise InternalError(msg, where=KERNELS_FILE)
    step = producers[call.output.tensor]
    values = {**program.constants, **recorded}
    missing = [name for name in step.inputs if name not in values]
    if missing:
        msg = f"the trace lacks the input '{missing[0]}' of step '{step.name}'"
        raise InternalError(msg, where=KERNELS_FILE)
    inputs = tuple(values[name] for name in step.inputs)
    results = run_step(step, program, inputs)
    bound = allowed_difference(inputs) if isinstance(step, CachedAttention) else 0.0
    return step.name, results[step.outputs.index(call.output.tensor)], bound


def unrecorded_steps(program: Program, table: Sequence[KernelCall]) -> tuple[str, ...]:
    """Return the integer steps that no kernel call belongs to."""
    written = {call.output.tensor for call in table if call.step is not None}
    integer = [step for step in program.steps if not isinstance(step, FloatIsland)]
    return tuple(step.name for step in integer if not written.intersection(step.outputs))
