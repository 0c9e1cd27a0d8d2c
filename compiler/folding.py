"""Circuits: the format and the folding of every layer, chosen together where the recipe leaves a choice of formats.

The losses are those of any allocation; what a layer takes comes from the family's cost model, layer by layer. FIFOs
and converters between layers depend on both neighbours: they are counted once foldings are chosen, taken off the
limits, and the choice is made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from bitwright.compiler import frontend, quantizing
from bitwright.compiler.allocate.folded import FoldedProblem, allocate_folded, cells_text, folded_problem
from bitwright.compiler.allocate.notes import allocation_notes
from bitwright.compiler.allocate.problem import CELLS, FLOAT, Budget, Choice, Metric, Totals
from bitwright.compiler.allocate.solve import Allocation
from bitwright.compiler.allocation import measured_losses
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import InfeasibleBudgetError, UsageError
from bitwright.compiler.migration import observe_inputs
from bitwright.compiler.variants import Variants
from bitwright.passes.normalize import specialize
from bitwright.targets.folding import FoldedLayer, FoldingValues, Option, Taken, folder_for

TRIES = 8
STEP = 0.001
# Of the cells, left over while formats are chosen: the real weights' accumulators may be a bit wider than the draft's.
MARGIN = 0.01
OBJECTIVES = ("loss", "interval", *CELLS)


@dataclass(frozen=True)
class Folded:
    """A circuit as it was chosen.

    Attributes:
        options: Layer -> how it is built.
        nodes: Layer -> the ONNX node that it came from.
        beside: What stands between the layers.
        allocation: The solver's answer; its formats are the labels of the options.
    """

    options: Mapping[str, Option]
    nodes: Mapping[str, str]
    beside: Taken
    allocation: Allocation

    @property
    def foldings(self) -> dict[str, FoldingValues]:
        """Folding by layer."""
        return {name: option.folding for name, option in self.options.items()}

    @property
    def taken(self) -> Taken:
        """What the whole circuit takes, predicted."""
        parts = [self.beside, *(o.taken for o in self.options.values())]
        sums = {m: sum(getattr(p, m) for p in parts) for m in CELLS}
        return Taken(cycles=max(p.cycles for p in parts), **sums)


def choose_formats(c: Compilation, notes: list[str]) -> None:
    """Choose formats and foldings together; afterwards the formats are fixed, node by node."""
    assert c.selection is not None
    variants = Variants(c, "artifact")
    if not variants.sites:
        what = f"{c.profile.name} has no engine for any layer of this model: nothing can be allocated"
        raise UsageError(what, where="--recipe", fix="take a recipe that allocates nothing, e.g. int8")
    observe_inputs(c, c.selection)
    losses = {(s.site, s.format): s.loss for s in measured_losses(c, variants, notes)}
    formats = {s.name: tuple(f for f in s.formats if f != FLOAT) for s in variants.sites}
    found = _solve(c, draft(c), formats, losses, notes)
    nodes = {found.nodes[layer]: o.format for layer, o in found.options.items() if o.format}
    c.formats = replace(c.formats, by_node={**c.formats.by_node, **nodes})
    c.selection = frontend.reselect(c, "artifact")
    c.allocation = _reported(found)
    notes.extend(allocation_notes(c.allocation))


def _reported(found: Folded) -> Allocation:
    """Return the allocation with plain formats, and with the cells of what stands between the layers."""
    taken = found.taken
    formats = {name: option.format for name, option in found.options.items() if option.format}
    cells = {m: getattr(taken, m) for m in CELLS}
    return replace(
        found.allocation, formats=formats, totals=Totals(loss=found.allocation.totals.loss, **cells)
    )


def draft(c: Compilation) -> ir.Model:
    """Return the Q/DQ model in the present formats with weights rounded to nearest, and static shapes."""
    assert c.selection is not None
    model = quantizing.draft_model(c, frontend.allocate(c, c.selection, "artifact"))
    specialize(model, c.dims)
    return model


def choose_foldings(c: Compilation, notes: list[str]) -> dict[str, FoldingValues]:
    """Return the folding of every layer of the quantized model: those of a plan, or the best under the budgets.

    Raises:
        InfeasibleBudgetError: The circuit does not fit.
    """
    if c.recipe.foldings:
        notes.append(f"{len(c.recipe.foldings)} foldings taken from {c.options.recipe}")
        return dict(c.recipe.foldings)
    found = folded(c, notes)
    taken = found.taken
    notes.append(
        f"foldings: a frame every {taken.cycles} cycles, {c.profile.clock_hz / taken.cycles:.6g} frames/s at "
        f"{c.profile.clock_hz / 1e6:g} MHz; predicted {_cells(taken)}"
    )
    return found.foldings


def folded(c: Compilation, notes: list[str]) -> Folded:
    """Choose the foldings of the quantized model, whatever a plan says.

    Raises:
        InfeasibleBudgetError: The circuit does not fit.
    """
    assert c.static is not None
    return _solve(c, c.static, {}, {}, notes)


def _solve(
    c: Compilation,
    model: ir.Model,
    formats: Mapping[str, Sequence[str]],
    losses: Mapping[tuple[str, str], float],
    notes: list[str],
) -> Folded:
    """Choose options; what stands between the layers is counted and taken off the limits until all fits."""
    folder = folder_for(c.profile.family)
    layers = folder.layers(model, c.profile, formats)
    nodes = {layer.name: layer.node for layer in layers}
    problem = _problem(layers, losses)
    budget, interval, objective = goal(c, problem, notes, bool(formats))
    limits = budget
    for _ in range(TRIES):
        found = allocate_folded(problem, limits, interval=interval, objective=objective)
        options = _chosen(layers, found.formats)
        beside = folder.beside(model, c.profile, {n: o.folding for n, o in options.items()})
        folded = Folded(options, nodes, beside, found)
        over = {m: getattr(folded.taken, m) - limit for m, limit in budget.limits().items() if m in CELLS}
        if all(excess <= 0 for excess in over.values()):
            return folded
        limits = replace(budget, **{m: _left(limits, m, excess) for m, excess in over.items()})
    what = "no folding was found that fits together with the FIFOs and converters between its layers"
    raise InfeasibleBudgetError(what, where="budget", fix=f"allow {_cells(folded.taken)}")


def _cells(taken: Taken) -> str:
    return cells_text({m: getattr(taken, m) for m in CELLS})


def _left(limits: Budget, metric: Metric, excess: float) -> float:
    """Return a limit less what was exceeded, and a little more so that few tries are enough; one that is kept stays."""
    known = limits.limits()[metric]
    return known - excess - STEP * known if excess > 0 else known


def _problem(layers: Sequence[FoldedLayer], losses: Mapping[tuple[str, str], float]) -> FoldedProblem:
    def choices(layer: FoldedLayer) -> list[tuple[Choice, int]]:
        return [
            (
                Choice(
                    option.label,
                    losses.get((layer.node, option.format), 0.0),
                    luts=option.taken.luts,
                    ffs=option.taken.ffs,
                    dsps=option.taken.dsps,
                    brams=option.taken.brams,
                ),
                option.taken.cycles,
            )
            for option in layer.options
        ]

    return folded_problem((layer.name, choices(layer)) for layer in layers)


def _chosen(layers: Sequence[FoldedLayer], labels: Mapping[str, str]) -> dict[str, Option]:
    return {layer.name: next(o for o in layer.options if o.label == labels[layer.name]) for layer in layers}


def goal(
    c: Compilation, problem: FoldedProblem, notes: list[str], choosing: bool
) -> tuple[Budget, int | None, Metric]:
    """Return limits, the longest interval (None: the shortest there is), and what is minimised under both.

    The device's own limits always hold. With a frame rate the loss is minimised, or the LUTs where formats are fixed or
    the loss is bounded; without one the interval. Without any bound on the loss, formats are as good as the recipe's
    first everywhere.
    """
    asked, objective = c.options.budget, c.options.objective
    available = folder_for(c.profile.family).available(c.profile)
    share = 1 - MARGIN if choosing else 1.0
    cells = {m: share * min(asked.get(m, available[m]), available[m]) for m in CELLS}
    interval = None if "fps" not in asked else int(c.profile.clock_hz / asked["fps"])
    loss = asked.get("loss") if choosing else None
    if choosing and loss is None and (interval is None or objective not in (None, "loss")):
        loss = _first_loss(c, problem)
        notes.append(f"no bound on the loss: no more lost than by {c.recipe.recipe.formats[0]} everywhere")
    budget = Budget(loss=loss, **cells)
    if objective == "interval":
        interval = None
    if objective in CELLS:
        return budget, interval, objective
    return budget, interval, "loss" if choosing and loss is None else "luts"


def _first_loss(c: Compilation, problem: FoldedProblem) -> float:
    first = c.recipe.recipe.formats[0]
    total = 0.0
    for group in problem.problem.groups:
        known = [choice.loss for choice in group.choices if choice.format.split(" ")[0] == first]
        total += min(known) if known else min(choice.loss for choice in group.choices)
    return total
