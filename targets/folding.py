"""What a family of circuits tells the allocator: the foldings of every layer, and what each would take.

A family in ``FOLDED_FAMILIES`` provides ``FOLDER`` in a module ``folding.py`` in its folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from bitwright.compiler.errors import ProfileError, nearest
from bitwright.targets.schema import FOLDED_FAMILIES

if TYPE_CHECKING:
    import onnx_ir as ir

    from bitwright.targets.schema import Profile

# Parameters of a folding by name, e.g. ``{"pe": 4, "simd": 8, "dsp": 0}``.
FoldingValues: TypeAlias = Mapping[str, int]


@dataclass(frozen=True)
class Taken:
    """What a circuit, or a part of one, takes.

    Attributes:
        cycles: Cycles of a frame; of a whole circuit those between two frames.
        luts, ffs, dsps, brams: Cells; predictions may be fractions.
    """

    cycles: int
    luts: float
    ffs: float
    dsps: float
    brams: float


@dataclass(frozen=True)
class Option:
    """One way to build a layer.

    Attributes:
        format: Format of its weights; "" for a layer without weights, or as they are in the model.
        folding: How much of it is computed in a cycle.
        taken: What it takes, predicted.
    """

    format: str
    folding: FoldingValues
    taken: Taken

    @property
    def label(self) -> str:
        """A name that is unique among the options of a layer."""
        return " ".join((self.format, *(f"{name}={value}" for name, value in self.folding.items()))).strip()


@dataclass(frozen=True)
class FoldedLayer:
    """A layer of the circuit.

    Attributes:
        name: Its name in the integer program, by which foldings are given.
        node: The ONNX node that it came from.
        options: At least one.
    """

    name: str
    node: str
    options: tuple[Option, ...]


class Folder(Protocol):
    """A family whose layers can be folded."""

    def layers(
        self, model: ir.Model, profile: Profile, formats: Mapping[str, Sequence[str]]
    ) -> tuple[FoldedLayer, ...]:
        """Return every layer of a Q/DQ model with static shapes, and its options.

        Args:
            model: The model; its shapes and ranges count, the values of its weights only as far as they are kept.
            profile: The target.
            formats: ONNX node -> formats that its weights may have instead of those they have in the model.

        Raises:
            PerformanceGateError: Something in the middle of the model cannot be a circuit.
        """
        ...

    def beside(self, model: ir.Model, profile: Profile, foldings: Mapping[str, FoldingValues]) -> Taken:
        """Return what stands between the layers: FIFOs, forks and what makes streams wider or narrower."""
        ...

    def probe(
        self, profile: Profile, path: Path, progress: Callable[[int, int, str], None]
    ) -> tuple[str, ...]:
        """Build circuits of many shapes, fit the cost model to what they take, and write it.

        Args:
            profile: The target.
            path: The file to write.
            progress: Told how far the work is.

        Returns:
            Lines on how well the model fits, and how to use the file.

        Raises:
            ToolchainError: A tool is missing or failed.
        """
        ...

    def available(self, profile: Profile) -> Mapping[str, float]:
        """Return how many cells of every kind a design may use: ``luts``, ``ffs``, ``dsps``, ``brams``."""
        ...


def folder_for(family: str) -> Folder:
    """Return the folder of a family.

    Raises:
        ProfileError: The family has none.
    """
    if family not in FOLDED_FAMILIES:
        msg = f"circuits of the family '{family}' cannot be folded"
        raise ProfileError(msg, fix=nearest(family, FOLDED_FAMILIES))
    folder: Folder = import_module(f"bitwright.targets.{family}.folding").FOLDER
    return folder
