"""The allocation problem as data: groups that take one format each, what that costs, and what may be spent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

from bitwright.compiler.errors import InternalError

Metric = Literal[
    "loss", "latency_s", "weight_bytes", "peak_ram_bytes", "energy_j", "luts", "ffs", "dsps", "brams"
]
METRICS: tuple[Metric, ...] = get_args(Metric)
CELLS: tuple[Metric, ...] = ("luts", "ffs", "dsps", "brams")
"""What only circuits are made of."""
FLOAT = "float"


@dataclass(frozen=True)
class Choice:
    """One format that a group can have.

    Attributes:
        format: Its name, unique in the group.
        loss: Predicted loss of the model if only this group has the format; losses of groups add up.
        latency_s: Seconds that the group's members take in it.
        weight_bytes: Bytes of their constants in the file.
        energy_j: Joules of one inference.
        luts, ffs, dsps, brams: Cells of the circuit that computes the group.
    """

    format: str
    loss: float
    latency_s: float = 0.0
    weight_bytes: float = 0.0
    energy_j: float = 0.0
    luts: float = 0.0
    ffs: float = 0.0
    dsps: float = 0.0
    brams: float = 0.0


@dataclass(frozen=True)
class Group:
    """Sites that must have one format.

    Attributes:
        name: Unique.
        members: Names of the sites.
        choices: At least one.
    """

    name: str
    members: tuple[str, ...]
    choices: tuple[Choice, ...]

    def choice(self, fmt: str) -> Choice:
        """Return the choice of a format.

        Raises:
            InternalError: The group has no such choice.
        """
        found = next((c for c in self.choices if c.format == fmt), None)
        if found is None:
            msg = f"group '{self.name}' has no format '{fmt}'"
            raise InternalError(msg)
        return found


@dataclass(frozen=True)
class Cost:
    """Seconds, bytes and joules of a site in one format, or of passing a tensor from one format to another."""

    latency_s: float = 0.0
    weight_bytes: float = 0.0
    energy_j: float = 0.0


@dataclass(frozen=True)
class Boundary:
    """A tensor that one group writes and another reads.

    Attributes:
        producer: Name of a group.
        consumer: Name of a group; it may be the same one.
        costs: (producer's format, consumer's format) -> cost; pairs that are left out cost nothing, one whose
            cost is not finite is impossible.
    """

    producer: str
    consumer: str
    costs: Mapping[tuple[str, str], Cost]


@dataclass(frozen=True)
class LiveSet:
    """What is in RAM at one step of the execution.

    Attributes:
        step: A name for messages.
        sizes: Group -> format -> bytes of its live activations; formats that are left out take nothing.
        fixed_bytes: Bytes that no choice changes.
    """

    step: str
    sizes: Mapping[str, Mapping[str, float]]
    fixed_bytes: float = 0.0


@dataclass(frozen=True)
class Totals:
    """What an assignment costs; the peak is that of the worst step."""

    loss: float = 0.0
    latency_s: float = 0.0
    weight_bytes: float = 0.0
    peak_ram_bytes: float = 0.0
    energy_j: float = 0.0
    luts: float = 0.0
    ffs: float = 0.0
    dsps: float = 0.0
    brams: float = 0.0

    def of(self, metric: Metric) -> float:
        """Return one of the metrics."""
        return float(getattr(self, metric))


@dataclass(frozen=True)
class Budget:
    """Upper limits; None leaves a metric free. Units as in :class:`Totals`."""

    loss: float | None = None
    latency_s: float | None = None
    weight_bytes: float | None = None
    peak_ram_bytes: float | None = None
    energy_j: float | None = None
    luts: float | None = None
    ffs: float | None = None
    dsps: float | None = None
    brams: float | None = None

    def __post_init__(self) -> None:
        for metric, limit in self.limits().items():
            if not math.isfinite(limit):
                msg = f"a budget must be a finite number, {metric} is {limit}"
                raise InternalError(msg)

    def limits(self) -> dict[Metric, float]:
        """Return the limits that are set."""
        return {m: float(v) for m in METRICS if (v := getattr(self, m)) is not None}

    def with_limit(self, metric: Metric, limit: float | None) -> Budget:
        """Return the same budget with one limit replaced (None: removed)."""
        changed: dict[str, float | None] = {metric: limit}
        return replace(self, **changed)

    def met_by(self, totals: Totals) -> bool:
        """Tell whether no limit is exceeded, up to the rounding of sums."""
        return all(totals.of(m) <= limit + tolerance(limit) for m, limit in self.limits().items())


def tolerance(limit: float) -> float:
    """Return how much a sum of float64 may exceed a limit that it is meant to equal."""
    return 1e-9 * abs(limit)


@dataclass(frozen=True)
class Problem:
    """Everything the solver knows.

    Attributes:
        groups: At least one, with unique names.
        boundaries: Between groups.
        live_sets: One for each step of the execution; none: RAM is not modelled.
        fixed: Cost of what has no choice; its peak is added to every step.
    """

    groups: tuple[Group, ...]
    boundaries: tuple[Boundary, ...] = ()
    live_sets: tuple[LiveSet, ...] = ()
    fixed: Totals = field(default_factory=Totals)

    def __post_init__(self) -> None:
        if (fault := next(_faults(self), None)) is not None:
            raise InternalError(fault)


@dataclass(frozen=True)
class Dropped:
    """A choice that was taken out before solving."""

    group: str
    format: str
    reason: str


def _faults(problem: Problem) -> Iterator[str]:
    if not problem.groups:
        yield "an allocation problem has no groups"
    names = {g.name for g in problem.groups}
    if len(names) < len(problem.groups):
        yield "two groups of an allocation problem have one name"
    for group in problem.groups:
        if not group.choices:
            yield f"group '{group.name}' has no choices"
        if len({c.format for c in group.choices}) < len(group.choices):
            yield f"group '{group.name}' has a format twice"
    for boundary in problem.boundaries:
        for end in (boundary.producer, boundary.consumer):
            if end not in names:
                yield f"a boundary names the unknown group '{end}'"
    for live in problem.live_sets:
        for name in live.sizes:
            if name not in names:
                yield f"step '{live.step}' names the unknown group '{name}'"
        sizes = [live.fixed_bytes, *(b for by_format in live.sizes.values() for b in by_format.values())]
        if not all(map(math.isfinite, sizes)):
            yield f"step '{live.step}' has a size that is not finite"
    if not all(math.isfinite(problem.fixed.of(m)) for m in METRICS):
        yield "the fixed costs of an allocation problem are not finite"


def totals(problem: Problem, formats: Mapping[str, str]) -> Totals:
    """Return what an assignment costs.

    Args:
        problem: The problem.
        formats: Format by group name, for all groups.

    Raises:
        InternalError: A group has no such format.
    """
    chosen = [g.choice(formats[g.name]) for g in problem.groups]
    crossed = [
        cost
        for b in problem.boundaries
        if (cost := b.costs.get((formats[b.producer], formats[b.consumer]))) is not None
    ]
    paid: list[Choice | Cost] = [*chosen, *crossed]
    fixed = problem.fixed
    return Totals(
        loss=fixed.loss + math.fsum(c.loss for c in chosen),
        latency_s=fixed.latency_s + math.fsum(c.latency_s for c in paid),
        weight_bytes=fixed.weight_bytes + math.fsum(c.weight_bytes for c in paid),
        peak_ram_bytes=fixed.peak_ram_bytes
        + max((_live_bytes(s, formats) for s in problem.live_sets), default=0.0),
        energy_j=fixed.energy_j + math.fsum(c.energy_j for c in paid),
        **{m: fixed.of(m) + math.fsum(getattr(c, m) for c in chosen) for m in CELLS},
    )


def _live_bytes(live: LiveSet, formats: Mapping[str, str]) -> float:
    return live.fixed_bytes + math.fsum(sizes.get(formats[g], 0.0) for g, sizes in live.sizes.items())


def drop_unusable(problem: Problem) -> tuple[Problem, tuple[Dropped, ...]]:
    """Take out choices whose loss or costs are not finite.

    A group that is left without any keeps float: at its float choice's costs where these are known, else at none.

    Returns:
        The problem without them, and what was taken out and why.
    """
    dropped: list[Dropped] = []
    groups = tuple(_usable(group, dropped) for group in problem.groups)
    return replace(problem, groups=groups), tuple(dropped)


def _usable(group: Group, dropped: list[Dropped]) -> Group:
    faults = {c.format: _not_finite(c) for c in group.choices}
    kept = tuple(c for c in group.choices if not faults[c.format])
    lost = [c for c in group.choices if faults[c.format]]
    dropped.extend(Dropped(group.name, c.format, faults[c.format]) for c in lost)
    if kept:
        return replace(group, choices=kept)
    known = next((c for c in lost if c.format == FLOAT and _not_finite(replace(c, loss=0.0)) == ""), None)
    reason = "no other choice is left; " + ("it loses nothing" if known else "its costs are unknown")
    dropped.append(Dropped(group.name, FLOAT, f"kept in float: {reason}"))
    return replace(group, choices=(replace(known, loss=0.0) if known else Choice(FLOAT, 0.0),))


def _not_finite(choice: Choice) -> str:
    numbers = {f.name: getattr(choice, f.name) for f in fields(choice) if f.name != "format"}
    return ", ".join(f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value))
