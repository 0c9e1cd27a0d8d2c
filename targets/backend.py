"""What a target family implements; one module ``backend.py`` in each family's folder provides ``BACKEND``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from bitwright.compiler.errors import ProfileError, nearest
from bitwright.targets.schema import COMPILED_FAMILIES

if TYPE_CHECKING:
    from bitwright.compiler.lower.device import Device
    from bitwright.compiler.program.ops import Program, Step
    from bitwright.targets.schema import Profile


@dataclass(frozen=True)
class Kernel:
    """One TensorIR function and the constants packed for it.

    The function's parameters are the step's activations, then ``constants`` in order, then the output; every
    parameter is a buffer with the physical shapes given here. Rank-4 activations are channels-last
    [N, H, W, C].

    Attributes:
        key: Structural identity: two kernels with equal keys have the same function (constants may differ).
        function: ``tvm.tirx.PrimFunc`` marked ``tirx.is_scheduled``.
        constants: Packed weights, biases, multipliers, tables.
        output_shape: Physical shape of the output buffer.
        output_dtype: numpy name.
        intrinsic: The dot-product instruction it is built on (a ``compute`` row of the profile), or "llvm"
            for code left to LLVM's vectoriser.
    """

    key: str
    function: Any
    constants: tuple[np.ndarray, ...]
    output_shape: tuple[int, ...]
    output_dtype: str
    intrinsic: str


@dataclass(frozen=True)
class KernelChoice:
    """One way to compute a dot product. The result never depends on it, the time does.

    Attributes:
        template: Which template writes the loops, e.g. ``"implicit_gemm"``.
        intrinsic: Compute row of the profile, or "llvm".
        params: The template's own parameters, sorted by name; flags are 0 or 1.
    """

    template: str
    intrinsic: str
    params: tuple[tuple[str, int], ...]

    def as_plain(self) -> dict[str, Any]:
        """Return the choice as JSON values."""
        return {"template": self.template, "intrinsic": self.intrinsic, "params": dict(self.params)}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> KernelChoice:
        """Read what :meth:`as_plain` wrote.

        Raises:
            ProfileError: ``data`` is no such record.
        """
        try:
            params = sorted((str(name), int(value)) for name, value in data["params"].items())
            return cls(str(data["template"]), str(data["intrinsic"]), tuple(params))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"no kernel choice: {error!r}"
            raise ProfileError(msg) from error

    def label(self) -> str:
        """Return the choice in one short line, e.g. ``implicit_gemm avx512_vnni pixels=6 vectors=4``."""
        return " ".join((self.template, self.intrinsic, *(f"{name}={value}" for name, value in self.params)))


@dataclass(frozen=True)
class Measurement:
    """Something that an execution measured.

    Attributes:
        label: What, e.g. ``"RAM on the board"``.
        value: The figure with its unit.
        detail: What it is made of, what it is compared with.
    """

    label: str
    value: str
    detail: str

    def sentence(self) -> str:
        """Return it in one line."""
        return f"{self.label}: {self.value} ({self.detail})"


@dataclass(frozen=True)
class Execution:
    """What came back from running an artifact.

    Attributes:
        outputs: Output name -> array.
        trace: For each kernel call, in order: kernel name, its activation inputs, its output. Empty unless
            asked for.
        executed: ``"native"``, or ``"emulated"``, which may say how in brackets; ``"onnxruntime"`` if none of the
            model is in a library.
        seconds: Best wall time of one call, or None where that time means nothing (emulation).
        call_seconds: (function, best seconds) of every call inside one run, integer kernels and float operators alike,
            in order; empty unless traced natively.
        measurements: What else was measured, e.g. the memory used on an emulated board.
    """

    outputs: Mapping[str, np.ndarray]
    trace: Sequence[tuple[str, tuple[np.ndarray, ...], np.ndarray]]
    executed: str
    seconds: float | None
    call_seconds: Sequence[tuple[str, float]] = ()
    measurements: Sequence[Measurement] = ()


class Backend(Protocol):
    """A target family: its kernels, its tool chain and how its artifacts are executed."""

    @property
    def family(self) -> str:
        """Folder name, equal to the profile's ``family``."""
        ...

    def candidates(self, step: Step, program: Program, profile: Profile) -> tuple[KernelChoice, ...]:
        """Return the ways to compute a QGemm or QConv step: the default first, then by estimated cost."""
        ...

    def dot_kernel(
        self, step: Step, program: Program, profile: Profile, choice: KernelChoice | None = None
    ) -> Kernel:
        """Return the kernel of a QGemm or QConv step (any shape: a slow form is better than none).

        Args:
            step: The dot product.
            program: For shapes, scales and zero points.
            profile: Target.
            choice: One of ``candidates``; None is the first of them.

        Raises:
            ProfileError: ``choice`` is not a candidate of this step, or the profile allows no instruction known
                here.
        """
        ...

    def tvm_target(self, profile: Profile) -> dict[str, Any]:
        """Return the dictionary for ``tvm.target.Target``."""
        ...

    def link(self, objects: Sequence[Path], library: Path, profile: Profile) -> str:
        """Link object files into a shared library; returns the tool's name and version.

        Raises:
            ToolchainError: No linker, or it failed (its message is passed on).
        """
        ...

    def why_not_executable(self, profile: Profile) -> str | None:
        """Return why this machine cannot execute artifacts of ``profile``, or None if it can."""
        ...

    def execute(
        self,
        bundle: Path,
        feeds: Mapping[str, np.ndarray],
        profile: Profile,
        *,
        trace: bool,
        repeat: int = 1,
        library: str = "",
    ) -> Execution:
        """Run a library in ``bundle``/lib on one set of inputs: the only one, or that in the named subfolder."""
        ...


class KernelTimer(Protocol):
    """Times one kernel where this machine's clock means nothing: a model of cycles, or a board far away."""

    @property
    def hardware(self) -> str:
        """What the figures hold for, e.g. ``"modelled cortex-a76, llvm-mca 19"``; a part of tuning records' keys."""
        ...

    @property
    def executed(self) -> str:
        """``"modelled"`` or ``"remote"``: what is said beside every figure."""
        ...

    def run(self, library: Path, symbol: str, arguments: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
        """Execute a kernel and return (seconds of one call, its output).

        Args:
            library: Shared library for the target.
            symbol: The kernel's function in it, a packed function.
            arguments: One array for each of its parameters; the last is the output, whose content does not count.

        Raises:
            ToolchainError: The kernel crashed, or a tool failed.
        """
        ...


@runtime_checkable
class TunableBackend(Backend, Protocol):
    """A backend whose kernels can be timed."""

    def hardware(self) -> str:
        """Return the name of this machine's processor, a part of tuning records' keys."""
        ...

    def executes_natively(self, profile: Profile) -> bool:
        """Tell whether artifacts of ``profile`` run on this machine's processor itself."""
        ...

    def prepare_process(self, profile: Profile) -> None:
        """Ask the operating system for what kernels of ``profile`` need in this process, e.g. tile registers."""
        ...

    def kernel_timer(self, profile: Profile) -> KernelTimer | None:
        """Return what times kernels that this machine cannot execute natively, or None if nothing does."""
        ...


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """A backend whose kernels run on another processor than the one that calls them."""

    def missing_compiler(self) -> str | None:
        """Return why this machine cannot generate the device's machine code, or None if it can."""
        ...

    def lowering(self, profile: Profile, folder: Path) -> AbstractContextManager[Device]:
        """Prepare this process for generating code; returns how kernels are made, for the time of the context.

        Args:
            profile: Target.
            folder: Is created; what belongs to the machine code (its source, what it takes) is written there.

        Raises:
            ToolchainError: The device's compiler is missing.
        """
        ...


def backend_for(family: str) -> Backend:
    """Return the backend of a family.

    Raises:
        ProfileError: There is no such family.
    """
    if family not in COMPILED_FAMILIES:
        msg = f"family '{family}' has no kernels that TVM compiles"
        raise ProfileError(msg, fix=nearest(family, COMPILED_FAMILIES))
    backend: Backend = import_module(f"bitwright.targets.{family}.backend").BACKEND
    return backend
