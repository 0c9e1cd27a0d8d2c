"""Phase migrate: rewrites that keep the function and make it easier to quantize, proven by running both models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from bitwright.compiler.calibrate.moments import collect_moments
from bitwright.compiler.calibrate.patches import PATCHES_PER_SAMPLE
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.equalization import equalize
from bitwright.compiler.errors import InternalError
from bitwright.compiler.frontend import check_names, reselect, samples_of
from bitwright.compiler.graph.operands import weight_of
from bitwright.compiler.judged_method import JUDGED, choose_method
from bitwright.compiler.moments import InputMoments
from bitwright.compiler.options import Options
from bitwright.compiler.ort.equality import relative_difference
from bitwright.compiler.plan.planner import RuntimeName, runtime_of
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.recipe.schema import Recipe
from bitwright.compiler.rounding.grid import Grid, codebook, integer_grid
from bitwright.compiler.shape_choice import static_shapes
from bitwright.passes.contract import Pass, PassResult
from bitwright.passes.disassemble_channels import DisassembleChannels
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.rotate_residual import RotateResidual, online_products
from bitwright.passes.scale_weights_awq import ScaleWeightsAWQ
from bitwright.passes.smooth_scales import SmoothScales
from bitwright.passes.split_outliers import SplitOutliers, float_products

# The rewrites scale by float32 factors and multiply by their reciprocals: a few roundings, not a different function.
BOUND = 1e-3
DEFAULT_GROUP = 32
# Two quantized models are compared before one of them is kept: an eighth of the patches ranks them as all would.
TRIAL_PATCHES = PATCHES_PER_SAMPLE // 8


def migrate(c: Compilation, runtime: RuntimeName, notes: list[str]) -> None:
    """Run the recipe's rewrites on a copy of the normalized model.

    A plan's formats are left out meanwhile: its ranges hold for the rewrites that were made before they were chosen.
    """
    fixed = c.formats.by_node
    if c.recipe.target:
        c.formats = replace(c.formats, by_node={})
    judged = c.options.method == JUDGED
    if judged:
        c.options = replace(c.options, method=Options.method)
    _migrate(c, runtime, notes)
    c.formats = replace(c.formats, by_node={**fixed, **c.formats.by_node})
    c.selection = reselect(c, runtime)
    if judged:
        notes.append(choose_method(c, runtime, partial(observe_inputs, patches=TRIAL_PATCHES)))


def _migrate(c: Compilation, runtime: RuntimeName, notes: list[str]) -> None:
    assert c.model is not None and c.normalized is not None and c.selection is not None
    c.model = c.normalized.clone()
    c.selection = reselect(c, runtime)
    if c.recipe.recipe.migrate.equalize:
        observe = partial(observe_inputs, patches=TRIAL_PATCHES)
        _record(c, runtime, "equalize_layers", equalize(c, runtime, observe), notes)
    for rewrite in _rewrites(c, runtime):
        result = rewrite.run(c.model)
        products = _IN_FLOAT.get(type(rewrite))
        if products is not None:
            floats = dict.fromkeys(products(c.model), "float")
            c.formats = replace(c.formats, by_node={**c.formats.by_node, **floats})
        _record(c, runtime, rewrite.name, result, notes)
    if any(c.migrated.values()):
        RemoveUnused().run(c.model)
        _check_function(c, c.normalized, c.model, notes)
    check_names(c)


def _record(c: Compilation, runtime: RuntimeName, name: str, result: PassResult, notes: list[str]) -> None:
    """Write down what a rewrite did; what depends on the model follows."""
    c.migrations[name], c.migrated[name] = result.notes, result.changed
    notes.append(f"{name}: {result.changed} changes")
    notes.extend(result.notes)
    if result.changed:
        c.shapes = static_shapes(result.model, c.dims)
        c.selection = reselect(c, runtime)


_LEVELS: Mapping[str, Callable[[], Grid]] = {
    **{f"w{bits}": partial(integer_grid, bits) for bits in (8, 4, 3, 2)},
    **{name: partial(codebook, name) for name in ("nf4", "ternary", "binary")},
}
# Small products that a rewrite adds and that stay float.
_IN_FLOAT: Mapping[type, Callable[[ir.Model], Iterable[str]]] = {
    SplitOutliers: float_products,
    RotateResidual: online_products,
}


def _rewrites(c: Compilation, runtime: RuntimeName) -> Iterator[Pass]:
    """Yield the rewrites one after the other; those that need moments keep them in step with the model.

    A target that computes nothing in float gets only what folds into the layers: no Mul and no Gather of its own.
    """
    wanted = c.recipe.recipe.migrate
    if wanted.rotate:
        yield RotateResidual(down_block=wanted.rotate_down)
    selection = c.selection  # of the model as the rotation left it
    assert selection is not None
    if runtime_of(c.profile, runtime).integer_only:
        if wanted.smooth:
            c.moments = moments_of(c, selection)
            yield SmoothScales(c.moments, explicit_gain=1.0)
        return
    if wanted.smooth or wanted.disassemble or wanted.awq or wanted.split_outliers:
        c.moments = moments_of(c, selection)
    if wanted.disassemble:
        yield DisassembleChannels(c.moments, budget=wanted.disassemble)
    if wanted.smooth:
        yield SmoothScales(c.moments)
    if wanted.awq:
        group = c.options.group or c.recipe.recipe.group or DEFAULT_GROUP
        yield ScaleWeightsAWQ(c.moments, grid=_awq_grid(c.recipe.recipe), group=group)
    if wanted.split_outliers:
        yield SplitOutliers(c.moments, (wanted.split_outliers,))


def _awq_grid(recipe: Recipe) -> Grid:
    """Return the levels of a recipe's first weight-only format; of 4 bits if it has none."""
    known = (_LEVELS[name] for name in recipe.formats if name in _LEVELS)
    return next(known, lambda: integer_grid(4))()


def needs_moments(recipe: Recipe) -> bool:
    """Tell whether rounding by a recipe needs the moments of the inputs."""
    rounding = recipe.rounding
    return rounding.scales == "mse" or rounding.method == "gptq" or rounding.correct_bias


def observe_inputs(c: Compilation, selection: Selection, patches: int = PATCHES_PER_SAMPLE) -> None:
    """Collect the moments that rounding needs of operators that have none yet."""
    if needs_moments(c.recipe.recipe):
        c.moments |= moments_of(c, selection, patches)


def moments_of(
    c: Compilation, selection: Selection, patches: int = PATCHES_PER_SAMPLE
) -> dict[str, InputMoments]:
    """Collect the moments, where they are missing, of every operator whose constant weight is quantized."""
    assert c.model is not None
    anchors = [
        u.name
        for u in selection.integer
        if u.role == "anchor" and weight_of(u.head) is not None and u.name not in c.moments
    ]
    if not anchors:
        return {}
    return collect_moments(
        c.model,
        samples_of(c),
        anchors,
        patches=patches,
        threads=c.options.threads,
        progress=lambda done, total: c.progress.step(done, total, "samples"),
    )


def _check_function(c: Compilation, before: ir.Model, after: ir.Model, notes: list[str]) -> None:
    sample = next(iter(samples_of(c).batches(1)))
    difference = relative_difference(before, after, sample, threads=c.options.threads)
    notes.append(f"largest relative difference to the model before: {difference:.2e}")
    if difference > BOUND:
        msg = f"migrating scales changed the model's outputs by {difference:.2e} (allowed {BOUND:.0e})"
        raise InternalError(
            msg,
            where=str(c.options.model),
            fix="please report this model; --recipe int8-nearest migrates nothing",
        )
