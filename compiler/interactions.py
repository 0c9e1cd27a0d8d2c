"""What layers save together: a pairwise model of a placement's predicted time, fitted to whole placements.

Integers pass between two layers without a conversion, a tensor that two layers read is quantized once, and what runs
behind a layer is faster in one company than in another. A residual Add runs in integers only if all of its operands are
integers, so what three layers save is not the sum of what each two of them save; the pairs are therefore fitted to
placements of many layers, dense ones above all, and not measured two by two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.allocate.problem import Boundary, Cost, Group
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.variants import BETWEEN, Site, neighbours, reads_integers

# Everything in integers is the placement that most plans are near to.
ALL_WEIGHT, NEARLY_ALL_WEIGHT = 20.0, 3.0
DENSITIES = (0.9, 0.75, 0.75, 0.5)
MOST_RANDOM = 240
MOST_TOGETHER = 6
RIDGE = 1e-3

Together = tuple[int, int]


def boundaries_between(
    selection: Selection,
    sites: Sequence[Site],
    groups: Sequence[Group],
    costs: Mapping[tuple[str, str], Cost],
    seconds: Callable[[Mapping[str, str]], float],
) -> list[Boundary]:
    """Return what pairs of layers save together, as costs that are mostly negative.

    Formats that read the same integers are alike here, so one of them is predicted for all.

    Args:
        selection: The placement that the sites come from.
        sites: Layers that may leave float.
        groups: The groups they form.
        costs: (site, format) -> what the site costs alone, beyond the float model.
        seconds: Predicts a placement in which only the named sites leave float.
    """
    formats = [[f for f in s.formats if reads_integers(s, f)] for s in sites]
    reading = [k for k, found in enumerate(formats) if found]
    pairs = [p for p in _pairs(selection, sites) if formats[p[0]] and formats[p[1]]]
    if not pairs:
        return []
    base = seconds({})
    alone = np.array(
        [costs[s.name, f[0]].latency_s if f else 0.0 for s, f in zip(sites, formats, strict=True)]
    )

    def beyond(chosen: NDArray[np.bool_]) -> float:
        names = {sites[int(k)].name: formats[int(k)][0] for k in np.flatnonzero(chosen)}
        return seconds(names) - base - float(alone[chosen].sum())

    saved = _fit(pairs, list(_placements(len(sites), reading, pairs)), beyond)
    group_of = {name: g for g in groups for name in g.members}
    return [
        Boundary(
            group_of[sites[a].name].name,
            group_of[sites[b].name].name,
            {(f, g): Cost(float(amount)) for f in formats[a] for g in formats[b]},
        )
        for (a, b), amount in zip(pairs, saved, strict=True)
        if amount
    ]


def _fit(
    pairs: Sequence[Together],
    placements: Sequence[tuple[NDArray[np.bool_], float]],
    beyond: Callable[[NDArray[np.bool_]], float],
) -> NDArray[np.float64]:
    """Return the saving of every pair by weighted least squares."""
    left, right = np.array(pairs).T
    table = np.array([(z[left] & z[right]) * weight for z, weight in placements], np.float64)
    target = np.array([beyond(z) * weight for z, weight in placements], np.float64)
    # Where placements cannot tell two pairs apart, the ridge shares the saving among them.
    damped = table.T @ table + RIDGE * np.eye(len(pairs))
    return np.asarray(np.linalg.solve(damped, table.T @ target), np.float64)


def _placements(
    sites: int, reading: Sequence[int], pairs: Sequence[Together]
) -> Iterator[tuple[NDArray[np.bool_], float]]:
    """Yield which sites are in integers, and how much the placement counts."""
    everything = np.zeros(sites, bool)
    everything[list(reading)] = True
    yield everything, ALL_WEIGHT
    for site in reading:
        without = everything.copy()
        without[site] = False
        yield without, NEARLY_ALL_WEIGHT
    for a, b in pairs:
        two = np.zeros(sites, bool)
        two[[a, b]] = True
        yield two, 1.0
    generator = np.random.default_rng(0)
    for k in range(min(len(reading) * len(DENSITIES), MOST_RANDOM)):
        yield everything & (generator.random(sites) < DENSITIES[k % len(DENSITIES)]), 1.0


def _pairs(selection: Selection, sites: Sequence[Site]) -> list[Together]:
    """Return the pairs that may save something: one behind the other, or side by side."""
    number = {site.name: k for k, site in enumerate(sites)}
    found = dict.fromkeys((number[a], number[b]) for a, b in neighbours(selection, list(sites)))
    readers: dict[ir.Value, list[int]] = defaultdict(list)
    for k, site in enumerate(sites):
        for value in site.unit.activations:
            readers[value].append(k)
    writers = {site.unit.output: k for k, site in enumerate(sites)}
    meeting = [
        [writers[v] for v in unit.activations if v in writers]
        for unit in selection.units
        if unit.role in BETWEEN
    ]
    for together in (*readers.values(), *meeting):
        found |= dict.fromkeys(combinations(sorted(set(together))[:MOST_TOGETHER], 2))
    found |= dict.fromkeys(zip(range(len(sites) - 1), range(1, len(sites)), strict=True))
    unique: dict[frozenset[int], Together] = {}
    for pair in found:
        unique.setdefault(frozenset(pair), pair)
    return [p for p in unique.values() if p[0] != p[1]]
