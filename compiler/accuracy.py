"""Phase accuracy: the user's metric on the real quantized model, and the loop that keeps its drop within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from bitwright.compiler import frontend, quantizing
from bitwright.compiler.allocate.accuracy_loop import hold_accuracy
from bitwright.compiler.allocate.moves import upgrades
from bitwright.compiler.allocate.problem import Problem
from bitwright.compiler.allocation import allocation_problem, apply_formats, budget_of
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import AccuracyGateError
from bitwright.compiler.ingest.evaluator import PERPLEXITY, is_perplexity, load_eval
from bitwright.compiler.ort.accuracy import Accuracy, Metric, measure
from bitwright.compiler.ort.session import SessionConfig, callable_model, local_config, open_session
from bitwright.compiler.plan.planner import RuntimeName, observed_tensors


def requantize(
    c: Compilation, runtime: RuntimeName, notes: list[str], keep: frozenset[str] = frozenset()
) -> None:
    """Plan and quantize the model in its present formats."""
    c.selection = frontend.reselect(c, runtime, keep)
    frontend.calibrate(c, observed_tensors(c.selection), [])
    c.plan = quantizing.with_searched_scales(c, frontend.allocate(c, c.selection, runtime))
    c.quantized = quantizing.quantized_model(c, c.plan, notes)


def hold(c: Compilation, runtime: RuntimeName, notes: list[str], keep: frozenset[str] = frozenset()) -> None:
    """Measure the user's metric; where it drops too far move the worst layers up, one format at a time.

    Args:
        c: Has a quantized model; another one takes its place if layers had to be moved.
        runtime: Which of the two runtimes it is for.
        notes: Told what was measured.
        keep: Layers that stay in float whatever happens.

    Raises:
        AccuracyGateError: No formats within the budgets hold the bound; the message says what is reachable.
    """
    if c.options.evaluate is None:
        return
    assert c.model is not None and c.quantized is not None
    metric, config = (
        load_eval(c.options.evaluate),
        local_config(c.profile.runtimes.onnxruntime, threads=c.options.threads),
    )
    kind = PERPLEXITY if is_perplexity(c.options.evaluate) else ""
    c.accuracy = replace(measure(metric, c.model, c.quantized, config), kind=kind)
    notes.append(_line(c.accuracy))
    if c.options.max_drop is not None and c.accuracy.drop > c.options.max_drop:
        _improve(c, runtime, metric, notes, keep)


def remeasure(c: Compilation, notes: list[str]) -> None:
    """Measure the user's metric again, because the quantized model has changed.

    Raises:
        AccuracyGateError: It drops by more than the user allows.
    """
    if c.options.evaluate is None or c.accuracy is None:
        return
    config = local_config(c.profile.runtimes.onnxruntime, threads=c.options.threads)
    value = _value(load_eval(c.options.evaluate), c.quantized, config)
    c.accuracy = replace(c.accuracy, quantized_value=value)
    notes.append(_line(c.accuracy))
    if c.options.max_drop is not None and c.accuracy.drop > c.options.max_drop:
        what = f"the metric drops by {c.accuracy.drop:.3%}, more than {c.options.max_drop:.3%}"
        raise AccuracyGateError(
            what, where="--kv-cache", fix="choose a wider type for the cache, or allow a larger drop"
        )


def _line(found: Accuracy) -> str:
    sign, name = (-1, found.kind) if found.kind == PERPLEXITY else (1, "metric")
    before, after = sign * found.float_value, sign * found.quantized_value
    return f"{name} {before:.6g} in float, {after:.6g} quantized, drop {found.drop:.3%}"


def _improve(
    c: Compilation, runtime: RuntimeName, metric: Metric, notes: list[str], keep: frozenset[str]
) -> None:
    assert c.accuracy is not None and c.options.max_drop is not None and c.plan is not None
    reached = c.accuracy
    problem = allocation_problem(c, runtime, notes)
    start = _formats_now(c, problem)
    moves = upgrades(problem, start, budget=budget_of(c, problem))
    config = local_config(c.profile.runtimes.onnxruntime, threads=c.options.threads)

    def build(formats: Mapping[str, str]) -> None:
        apply_formats(c, runtime, problem, formats)
        requantize(c, runtime, [], keep)

    def evaluate(formats: Mapping[str, str]) -> float:
        if formats == start:
            return reached.quantized_value
        c.progress.step(0, 0, "the metric with other formats")
        build(formats)
        return _value(metric, c.quantized, config)

    result = hold_accuracy(
        evaluate, start, moves, float_value=reached.float_value, max_drop=c.options.max_drop
    )
    build(result.formats)
    c.accuracy = replace(reached, quantized_value=result.trial.value)
    notes.append(
        f"{len(result.moved)} of {len(moves)} moves made after {len(result.trials)} trials; "
        f"{_line(c.accuracy)}"
    )
    notes.extend(f"{m.group}: {m.before} to {m.after}" for m in result.moved)


def _value(metric: Metric, model: ir.Model | None, config: SessionConfig) -> float:
    assert model is not None
    return metric(callable_model(open_session(model, config)))


def _formats_now(c: Compilation, problem: Problem) -> dict[str, str]:
    """Return the formats of the present plan; a format that is no choice of its group counts as float."""
    assert c.plan is not None
    found = {}
    for group in problem.groups:
        decision = c.plan.nodes.get(group.members[0])
        fmt = "float" if decision is None else decision.format
        found[group.name] = fmt if any(choice.format == fmt for choice in group.choices) else "float"
    return found
