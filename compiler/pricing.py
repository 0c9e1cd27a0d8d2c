"""Targets whose own compiler says what a layer costs: it is asked once a format, then formats are chosen exactly.

The whole model is quantized in each of the recipe's formats and handed to the target's compiler; its estimate of every
layer is that layer's cost in the format. The compiler is asked again for every assignment that the solver comes up
with, so a limit of time is one that its own estimate of the whole keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from bitwright.compiler import frontend, quantizing
from bitwright.compiler.allocate.grouping import tied_groups
from bitwright.compiler.allocate.notes import allocation_notes
from bitwright.compiler.allocate.problem import FLOAT, Choice, Cost, Group, Problem, Totals
from bitwright.compiler.allocate.sensitivity import SiteLoss
from bitwright.compiler.allocation import (
    allocate_placed,
    apply_formats,
    goal,
    measured_losses,
)
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import UsageError
from bitwright.compiler.generated import request_of
from bitwright.compiler.migration import observe_inputs
from bitwright.compiler.plan.planner import RuntimeName
from bitwright.compiler.variants import Variants, shared_weights
from bitwright.passes.normalize import specialize
from bitwright.targets.generator import Price, pricing_generator
from bitwright.targets.schema import PRICED_FAMILIES

# Share of a layer's time that another format must gain.
LEAST_GAIN = 0.005


def choose_formats(c: Compilation, notes: list[str]) -> None:
    """Choose a format for every layer; afterwards the formats are fixed, node by node.

    Raises:
        UsageError: No layer has a choice, or what is bounded is not known of this target.
        InfeasibleBudgetError: No assignment keeps the bounds.
    """
    problem = priced_problem(c, notes)
    budget, objective = goal(c, problem, notes)
    c.allocation = allocate_placed(
        problem, budget, objective, lambda formats: priced(c, _by_site(problem, formats)).seconds
    )
    apply_formats(c, "artifact", problem, c.allocation.formats)
    notes.extend(allocation_notes(c.allocation))


def priced_problem(c: Compilation, notes: list[str]) -> Problem:
    """Measure losses, ask for costs, and put the problem together.

    Raises:
        UsageError: No layer has a choice, or what is bounded is not known of this target.
    """
    assert c.selection is not None
    _check_bounds(c)
    variants = Variants(c, "artifact")
    if not variants.sites:
        what = f"{c.profile.name} has no kernel for any layer of this model: nothing can be allocated"
        raise UsageError(what, where="--recipe", fix="take a recipe that allocates nothing, e.g. int8")
    observe_inputs(c, c.selection)
    return _problem(c, variants, measured_losses(c, variants, notes), notes)


def is_priced(c: Compilation, runtime: RuntimeName) -> bool:
    """Tell whether a target's own compiler says what the layers cost."""
    return runtime == "artifact" and c.profile.family in PRICED_FAMILIES


def _check_bounds(c: Compilation) -> None:
    unknown = {"ram", "energy"} & {*c.options.budget, c.options.objective or ""}
    if unknown:
        what = f"what a format changes of {' and '.join(sorted(unknown))} is not known of {c.profile.name}"
        raise UsageError(what, where="--budget", fix="bound latency, size or loss")


def _problem(c: Compilation, variants: Variants, losses: list[SiteLoss], notes: list[str]) -> Problem:
    sites = {site.name: [f for f in site.formats if f != FLOAT] for site in variants.sites}
    formats = list(dict.fromkeys(f for menu in sites.values() for f in menu))
    costs: dict[tuple[str, str], Cost] = {}
    others: list[float] = []
    for done, fmt in enumerate(formats):
        c.progress.step(done, len(formats), "formats priced")
        # A layer without this format has its first one meanwhile.
        price = priced(c, {site: fmt if fmt in menu else menu[0] for site, menu in sites.items() if menu})
        costs |= {
            (site, fmt): Cost(price.layers[site].seconds, price.layers[site].weight_bytes)
            for site, menu in sites.items()
            if fmt in menu
        }
        others.append(price.seconds - math.fsum(price.layers[s].seconds for s, menu in sites.items() if menu))
    notes.append(
        f"the target's compiler priced {len(costs)} pairs of layer and format in {len(formats)} runs"
    )
    groups = tied_groups(losses, costs, shared_weights(variants.sites))
    if not _counts_bytes(c):
        groups = tuple(_that_gain_time(group, notes) for group in groups)
    return Problem(groups, fixed=Totals(latency_s=max(min(others), 0.0)))


def _counts_bytes(c: Compilation) -> bool:
    asked = {*c.options.budget, c.options.objective or ""}
    return bool(asked & {"size", "bits"}) or c.profile.budgets.weights_bytes is not None


def _that_gain_time(group: Group, notes: list[str]) -> Group:
    """Leave out formats that are no faster than one listed before them.

    Where the multipliers are the limit fewer bits gain nothing, and a loss that was measured a little lower is noise.
    """
    kept: list[Choice] = []
    for choice in group.choices:
        if not kept or choice.latency_s < (1 - LEAST_GAIN) * min(k.latency_s for k in kept):
            kept.append(choice)
    if len(kept) == 1 and len(group.choices) > 1:
        notes.append(f"{group.name}: no format is faster than {kept[0].format}")
    return replace(group, choices=tuple(kept))


def _by_site(problem: Problem, formats: Mapping[str, str]) -> dict[str, str]:
    return {site: formats[group.name] for group in problem.groups for site in group.members}


def priced(c: Compilation, formats: Mapping[str, str]) -> Price:
    """Return what the target's compiler says of the model with its layers in these formats.

    Args:
        c: The compilation; it is left as it is.
        formats: Format of every layer with a choice.
    """
    saved = c.formats, c.selection
    c.formats = replace(c.formats, by_node={**c.formats.by_node, **formats})
    try:
        selection = frontend.reselect(c, "artifact")
        plan = quantizing.with_searched_scales(c, frontend.allocate(c, selection, "artifact"))
        model = quantizing.quantized_model(c, plan)
    finally:
        c.formats, c.selection = saved
    specialize(model, c.dims)
    return pricing_generator(c.profile.family).price(model, c.profile, request_of(c.options))
