"""What verifying a bundle finds: how far arrays are apart, and what that says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bitwright.compiler.bundle.segments import ONLY_ONNXRUNTIME
from bitwright.compiler.errors import VerificationError
from bitwright.compiler.program.segments import NotLowered
from bitwright.targets.backend import Measurement

SHOWN_DIFFERENCES = 5


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
        executed: How the library was executed: ``"native"`` or ``"emulated..."``; ``"onnxruntime"`` if nothing of the
            model is in a library; ``"none"`` if nothing was executed.
        reason: Why nothing was executed, or "".
        sets: Golden sets executed.
        calls: Kernel calls compared.
        bounded: How many of them add up floats in their own order, and are compared within a bound.
        elements: Elements of their outputs.
        kernel_differences: Calls that are not equal bit for bit, or not within their bound.
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
    bounded: int = 0
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
        within = f", {self.bounded} of them, attention, within the bound of its sums" if self.bounded else ""
        return (
            f"executed ({self.executed}) on {self.sets} golden sets: {equal} of {self.calls} integer kernel "
            f"calls ({self.elements} elements) equal the reference interpreter bit for bit{within}"
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


def compare(actual: np.ndarray, expected: np.ndarray, bound: float = 0.0) -> Difference:
    """Return how far ``actual`` is from ``expected``; floats within ``bound`` of each other count as equal."""
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
    same |= (gap <= bound) & (bound > 0)
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
