"""What a family of circuits and fixed accelerators implements: it generates its artifact from the integer program.

Processors have a :class:`~bitwright.targets.backend.Backend`: TVM compiles the model, the family gives it kernels and
a linker. The families here write something else (a circuit, a command stream, firmware around an accelerator) and
prove it in their own way (a simulation of the circuit, the accelerator maker's reference kernels). One module
``generator.py`` in each family's folder provides ``GENERATOR``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from bitwright.compiler.errors import ProfileError, nearest
from bitwright.targets.backend import Measurement
from bitwright.targets.schema import GENERATED_FAMILIES, PRICED_FAMILIES

if TYPE_CHECKING:
    import onnx_ir as ir

    from bitwright.targets.schema import Profile

Cell: TypeAlias = str | int | float | None
# Told how far the work is: done, all, of what.
Step: TypeAlias = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        title: What it shows, e.g. ``"Engines"``.
        columns: Heads, with units.
        rows: One tuple a row, as long as ``columns``.
        note: One sentence on how to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Request:
    """What the user asked a generator for beyond the profile.

    Attributes:
        threads: Threads that tools may use.
        timeout_s: Longest time of one tool.
        steps: Optional steps by name, e.g. ``"synth"`` and ``"pnr"``.
        cache: Folder that keeps results of slow tools, or None for the user's own.
        foldings: Of circuits: layer -> how much of it is computed in a cycle; empty: the smallest circuit.
    """

    threads: int = 1
    timeout_s: float = 1800.0
    steps: frozenset[str] = frozenset()
    cache: Path | None = None
    foldings: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Generated:
    """What a generator wrote.

    Attributes:
        notes: What a reader should know, one line each.
        measurements: Predicted and measured figures: cycles, LUTs, bytes.
        tables: Tables of the report.
        shipped: Files of the artifact, relative to its folder.
        not_generated: Node -> why it is computed on the host instead; a coverage gate decides whether that is allowed.
        seconds: Predicted time of an inference, where a tool of the family predicts it.
    """

    notes: tuple[str, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    tables: tuple[Table, ...] = ()
    shipped: tuple[Path, ...] = ()
    not_generated: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class LayerPrice:
    """What one layer of a generated artifact takes.

    Attributes:
        seconds: Predicted time.
        weight_bytes: Bytes of its constants as the target stores them.
    """

    seconds: float
    weight_bytes: float


@dataclass(frozen=True)
class Price:
    """What a whole model takes, as the family's own compiler says.

    Attributes:
        seconds: Of one inference.
        layers: ONNX node -> its part.
    """

    seconds: float
    layers: Mapping[str, LayerPrice]


@dataclass(frozen=True)
class Check:
    """One layer or engine, executed and compared with its integer reference, given the same inputs.

    Attributes:
        step: The ONNX node it came from.
        part: What computed it, e.g. the instance in the circuit.
        actual: What came out.
        expected: What the reference computes.
    """

    step: str
    part: str
    actual: np.ndarray
    expected: np.ndarray


@dataclass(frozen=True)
class Simulation:
    """What came back from executing a generated artifact on one set of inputs.

    Attributes:
        outputs: Output name -> array, as the Q/DQ model has them.
        executed: How, e.g. ``"simulated (cxxrtl)"``.
        checks: Every layer against its reference; empty unless asked for.
        measurements: What the execution measured, e.g. cycles.
    """

    outputs: Mapping[str, np.ndarray]
    executed: str
    checks: Sequence[Check] = ()
    measurements: Sequence[Measurement] = ()


class Generator(Protocol):
    """A family whose artifacts are generated from the integer program."""

    @property
    def family(self) -> str:
        """Folder name, equal to the profile's ``family``."""
        ...

    @property
    def steps(self) -> Mapping[str, str]:
        """Optional steps that the user may ask for: name -> what it does."""
        ...

    def missing_tools(self, profile: Profile, request: Request) -> str | None:
        """Return which package to install before anything can be generated (as ``pip install ...``), or None."""
        ...

    def generate(
        self, model: ir.Model, profile: Profile, folder: Path, request: Request, progress: Step
    ) -> Generated:
        """Write the artifact of a Q/DQ model with static shapes.

        Args:
            model: The model, specialized.
            profile: Target.
            folder: Empty folder of the artifact.
            request: What else the user asked for.
            progress: Told how far the work is.

        Raises:
            ProfileError: The model does not fit the profile's limits.
            PerformanceGateError: An operator that the target has to compute cannot be.
            ToolchainError: A tool failed.
        """
        ...

    def why_not_executable(self, profile: Profile) -> str | None:
        """Return why this machine cannot execute artifacts of ``profile``, or None if it can."""
        ...

    def execute(
        self, folder: Path, feeds: Mapping[str, np.ndarray], profile: Profile, *, check: bool
    ) -> Simulation:
        """Execute the artifact in ``folder`` on one set of inputs; with ``check`` compare every layer, too."""
        ...


class PricingGenerator(Generator, Protocol):
    """A generator whose tools can be asked what layers cost."""

    def price(self, model: ir.Model, profile: Profile, request: Request) -> Price:
        """Return what a Q/DQ model with static shapes takes; nothing is kept.

        Raises:
            PerformanceGateError: An operator that the target has to compute cannot be.
            ToolchainError: A tool failed.
        """
        ...


def pricing_generator(family: str) -> PricingGenerator:
    """Return the generator of a family that prices layers.

    Raises:
        ProfileError: There is no such family.
    """
    if family not in PRICED_FAMILIES:
        msg = f"family '{family}' prices no layers"
        raise ProfileError(msg, fix=nearest(family, PRICED_FAMILIES))
    generator: PricingGenerator = import_module(f"bitwright.targets.{family}.generator").GENERATOR
    return generator


def generator_for(family: str) -> Generator:
    """Return the generator of a family.

    Raises:
        ProfileError: There is no such family.
    """
    if family not in GENERATED_FAMILIES:
        msg = f"family '{family}' generates nothing"
        raise ProfileError(msg, fix=nearest(family, GENERATED_FAMILIES))
    generator: Generator = import_module(f"bitwright.targets.{family}.generator").GENERATOR
    return generator
