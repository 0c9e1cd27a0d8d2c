"""``train``: a model trained as it will be rounded, written as a Q/DQ model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from bitwright.compiler import frontend, migration, quantizing
from bitwright.compiler.bundle.model_files import write_model_atomically
from bitwright.compiler.calibrate.methods import parse_method, range_from
from bitwright.compiler.compilation import Compilation, Progress, Silent
from bitwright.compiler.errors import InternalError, UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.plan.model import Plan
from bitwright.compiler.plan.plan_file import plan_to_yaml
from bitwright.compiler.plan.planner import observed_tensors
from bitwright.compiler.training import precision as widths
from bitwright.compiler.training.alignment import Alignment, alignment_of
from bitwright.compiler.training.checkpoint import read_checkpoint
from bitwright.compiler.training.distillation import Distillation, compared_values, hidden_values
from bitwright.compiler.training.graph_module import GraphModule
from bitwright.compiler.training.loop import Loop, Outcome, Schedule
from bitwright.compiler.training.request import MOST, Training, checkpoint_of
from bitwright.compiler.training.rounding_points import RoundingPoints
from bitwright.compiler.training.samples import TrainingData, load, read_labels
from bitwright.compiler.training.start import rounded_start
from bitwright.compiler.training.write_back import trained_plan, with_trained_weights
from bitwright.passes.saturate_activations import SaturateActivations
from bitwright.targets.loader import load_profile

# Two float32 runtimes sum in different orders; an operator that means something else is off by far more.
FLOAT_BOUND = 1e-3


@dataclass(frozen=True)
class Trained:
    """What ``train`` made.

    Attributes:
        model: The Q/DQ model.
        plan: Its plan, for reading.
        outcome: Steps and losses.
        float_difference: Largest relative difference between the float module and ONNX Runtime.
        notes: What was decided on the way.
    """

    model: Path
    plan: Path
    outcome: Outcome
    float_difference: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "model": str(self.model),
            "plan": str(self.plan),
            "steps": self.outcome.steps,
            "first_loss": self.outcome.first_loss,
            "best_loss": self.outcome.best_loss,
            "best_step": self.outcome.best_step,
            "history": [list(pair) for pair in self.outcome.history],
            "float_difference": self.float_difference,
            "notes": list(self.notes),
        }


def train_model(options: Options, training: Training, progress: Progress | None = None) -> Trained:
    """Train a model and write ``options.output`` and its .plan.yaml.

    Args:
        options: What to quantize, for which target and by which recipe; ``data`` is trained on, save what is held
            out; ``validation`` is held out where it is given.
        training: How.
        progress: Told about phases and steps.

    Raises:
        BitwrightError: See the subclasses; an interrupted run leaves its checkpoint, nothing else.
    """
    if options.output is None:
        what = "no output file"
        raise UsageError(what, where="--output", fix="pass -o trained.onnx")
    torch.manual_seed(training.seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(options.threads)
    c = Compilation(options, load_profile(options.target), progress or Silent())
    c.refuse_unused_options()
    tensors = start_plan(c, training)
    student, teacher, difference = _modules(c, training, tensors)
    with c.recorded("train") as notes:
        outcome = _trained(c, training, student, teacher)
        notes.append(_summary(outcome))
    with c.recorded("write"):
        model, plan = written_model(c, student, _levels(c, training, tensors))
        c.plan, c.quantized = plan, model
        companion = options.output.with_suffix(".plan.yaml")
        write_model_atomically(model, options.output, {companion: plan_to_yaml(plan, c.recipe.as_plain())})
        checkpoint_of(options.output).unlink(missing_ok=True)
    found = tuple(f"{record.name}: {note}" for record in c.phases for note in record.notes)
    return Trained(options.output, companion, outcome, difference, found)


def start_plan(c: Compilation, training: Training) -> frozenset[str]:
    """Run the phases up to the plan that training starts from; return the activations of fewer bits."""
    with c.recorded("ingest") as notes:
        frontend.ingest(c, notes)
    with c.recorded("normalize") as notes:
        frontend.normalize_model(c, notes)
    with c.recorded("shapes") as notes:
        frontend.choose_shapes(c, notes)
    with c.recorded("plan") as notes:
        if c.allocates:
            what = "training starts from one format for each layer, not from a choice"
            raise UsageError(what, where="--recipe", fix="e.g. --recipe int8, or a plan.yaml")
        notes.extend(frontend.check_recipe(c, training.runtime))
        c.selection = frontend.select_units(c, training.runtime)
    with c.recorded("migrate") as notes:
        migration.migrate(c, training.runtime, notes)
    with c.recorded("calibrate") as notes:
        frontend.calibrate(c, observed_tensors(c.selection), notes)
        migration.observe_inputs(c, c.selection)
    with c.recorded("scales") as notes:
        return _narrowed(c, training, notes)


def _narrowed(c: Compilation, training: Training, notes: list[str]) -> frozenset[str]:
    """Make the plan: the recipe's, with the bits that are asked for, at searched scales."""
    assert c.selection is not None and c.model is not None
    plan, wanted = frontend.allocate(c, c.selection, training.runtime), training.precision
    computing = [u for u in c.selection.units if u.role != "carrier"]
    writers = {u.output.name or "": u.head.op_type for u in computing}
    tensors = widths.narrow_tensors(plan, wanted, writers)
    if tensors and wanted.activations is not None:
        method, count = parse_method(c.options.method), 2**wanted.activations
        ranges = {t: range_from(c.statistics[t], method, levels=count, symmetric=False) for t in tensors}
        plan = widths.with_activation_bits(plan, tensors, wanted.activations, ranges)
        notes.append(f"{len(tensors)} of {len(plan.activations)} activations in {wanted.activations} bits")
    plan = widths.with_weight_bits(plan, c.model, wanted)
    if wanted.weights is not None:
        layers = widths.narrowed_layers(plan, everywhere=True)
        narrow = sum(plan.weights[d.weight].bits < MOST for d in layers)
        notes.append(f"{narrow} of {len(layers)} layers with weights of {wanted.weights} bits")
    c.plan = quantizing.with_searched_scales(c, plan)
    return tensors


def _levels(c: Compilation, training: Training, tensors: frozenset[str]) -> dict[str, tuple[int, int]]:
    assert c.plan is not None
    return widths.levels(c.plan, tensors, training.precision.activations)


def _modules(
    c: Compilation, training: Training, tensors: frozenset[str]
) -> tuple[GraphModule, GraphModule, float]:
    """Return student and teacher; the float module was compared with ONNX Runtime."""
    assert c.model is not None and c.plan is not None and c.selection is not None
    with c.recorded("module") as notes:
        difference = float_difference(c)
        notes.append(f"largest relative difference of the float module to ONNX Runtime: {difference:.2e}")
        if difference > FLOAT_BOUND:
            what = f"the PyTorch module's outputs differ by {difference:.2e} (allowed {FLOAT_BOUND:.0e})"
            raise InternalError(what, where=str(c.options.model), fix="please report this model")
        compared = compared_values(c.model, training.loss)
        outputs = {*compared, *(o.name or "" for o in c.model.graph.outputs)}
        hidden = hidden_values(c.selection.units, outputs) if training.hidden else ()
        points = RoundingPoints(c.plan, c.model, _levels(c, training, tensors), training.scaling)
        start = rounded_start(c.model, quantizing.rounded_model(c, c.plan), points)
        student = GraphModule(start, points, compared, hidden)
        return student, GraphModule(c.model, None, compared, hidden), difference


def float_difference(c: Compilation) -> float:
    """Return the largest difference of the float module to ONNX Runtime on a sample, relative to each output."""
    assert c.model is not None and c.dataset is not None
    feeds = next(iter(c.dataset.batches(1)))
    expected = run(open_session(c.model, SessionConfig(threads=c.options.threads)), feeds)
    module = GraphModule(c.model)
    with torch.no_grad():
        actual = module({name: torch.from_numpy(np.array(array)) for name, array in feeds.items()})
    worst = 0.0
    for name, array in expected.items():
        found = actual[name].numpy()
        if found.shape != array.shape:
            return float("inf")
        size = float(np.abs(array.astype(np.float64)).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.abs(found.astype(np.float64) - array).max(initial=0.0)) / size)
    return worst


def _trained(c: Compilation, training: Training, student: GraphModule, teacher: GraphModule) -> Outcome:
    assert c.model is not None and c.dataset is not None and c.options.output is not None
    data = _data(c, training)
    place = checkpoint_of(c.options.output)
    settings = {
        **training.settings(),
        "recipe": c.options.recipe,
        "target": c.options.target,
        "samples": len(data.train),
        "judging": len(data.held),
    }
    resume = read_checkpoint(place, settings) if training.resume else None
    schedule = Schedule(
        training.epochs, training.minutes, training.rate, training.scale_rate, training.save_every
    )
    loss = Distillation(
        training.loss, training.temperature, training.label_share, training.hidden, student.hidden
    )
    alignment = _alignment(c.model, student, teacher, data) if training.align else None
    loop = Loop(student, teacher, data, loss, schedule, settings, place, c.progress.step, alignment)
    return loop.run(resume)


def _alignment(
    model: ir.Model, student: GraphModule, teacher: GraphModule, data: TrainingData
) -> Alignment | None:
    assert student.points is not None, "the student rounds"
    return alignment_of(model, student.points, teacher, next(data.some(data.batch)).feeds)


def _data(c: Compilation, training: Training) -> TrainingData:
    assert c.dataset is not None
    labels = None if training.labels is None else read_labels(training.labels)
    return load(
        c.dataset,
        labels,
        batch=training.batch,
        seed=training.seed,
        mixture=training.mixture,
        held=training.held,
        judging=c.validation,
    )


def written_model(
    c: Compilation, student: GraphModule, levels: dict[str, tuple[int, int]]
) -> tuple[ir.Model, Plan]:
    """Return the Q/DQ model of a trained module, and its plan."""
    assert c.model is not None
    plan = trained_plan(student)
    c.model = with_trained_weights(c.model, student)
    model = quantizing.draft_model(c, plan)
    moved = frozenset(
        o.name or ""
        for n in c.model.graph
        if (d := plan.nodes.get(n.name or "")) is not None and d.role == "carrier" and d.integer
        for o in n.outputs
    )
    SaturateActivations(levels, moved, integers=plan.runtime == "onnxruntime").run(model)
    return model, plan


def _summary(outcome: Outcome) -> str:
    return (
        f"{outcome.steps} steps, held-out loss {outcome.first_loss:.4g} -> {outcome.best_loss:.4g} "
        f"(best at step {outcome.best_step})"
    )
