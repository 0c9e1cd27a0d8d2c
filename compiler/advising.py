"""Which change of the plan would help each of the worst layers: the next better formats, tried on the outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import onnx_ir as ir

from bitwright.compiler import frontend, quantizing
from bitwright.compiler.compilation import Change, Compilation
from bitwright.compiler.errors import DataError
from bitwright.compiler.ort.session import local_config, open_session, run
from bitwright.compiler.ort.what_if import WORTHWHILE_DB, output_noise
from bitwright.compiler.plan.planner import RuntimeName, observed_tensors
from bitwright.compiler.plan.support import why_weight_unfit
from bitwright.compiler.plan.units import Unit

FLOAT = "float"
# A format that keeps this share of what float would gain is better advice than float.
MOST = 0.7
# The outputs are float for all purposes.
CLEAN_DB = 60.0
# Format -> better ones, the smallest step first.
FINER = {
    "binary": ("w2", "w4", "w8"),
    "ternary": ("w4", "w8"),
    "w2": ("w3", "w4", "w8"),
    "w3": ("w4", "w8"),
    "nf4": ("w8",),
    "w4": ("w8",),
    "w8": ("fp16-weights",),
    "binary-a8": ("w2a8", "w4a8", "int8"),
    "ternary-a8": ("w3a8", "w4a8", "int8"),
    "w2a8": ("w3a8", "w4a8", "int8"),
    "w3a8": ("w4a8", "int8"),
    "w4a8": ("int8", "w8"),
    "w5a8": ("w6a8", "int8"),
    "w6a8": ("int8",),
    "int8": ("w8a16", "w8"),
    "int8-dynamic": ("int8-row", "w8"),
    "int8-row": ("w8",),
    "fp8": ("w8a16", "w8"),
    "fp8-weights": ("w8", "fp16-weights"),
}


def choose_changes(c: Compilation, runtime: RuntimeName, keep: frozenset[str] = frozenset()) -> None:
    """Try better formats for every layer that costs the outputs something, each alone.

    Weights are rounded to nearest in these trials, in all layers alike: what is compared is made in no time.

    Args:
        c: Has a quantized model and knows what its worst layers cost.
        runtime: Which of the two runtimes it is for.
        keep: Layers that stay in float whatever happens.
    """
    costly = [found.node for found in c.advice if found.gain_db >= WORTHWHILE_DB]
    if not costly or _clean(c) or c.selection is None:
        return
    units = {unit.name: unit for unit in c.selection.units}
    trials = _Trials(c, runtime, keep)
    for done, node in enumerate(costly):
        c.progress.step(done, len(costly), "better formats")
        fmt = c.plan.nodes[node].format if c.plan is not None else FLOAT
        most = trials.gain(node, FLOAT)
        c.changes[node] = next(_good_enough(c, trials, units[node], fmt, most), Change(FLOAT, most))


def _clean(c: Compilation) -> bool:
    """Tell whether the outputs are so close to float that nothing is worth changing."""
    assert c.model is not None
    found = [c.sqnr_db[v.name] for v in c.model.graph.outputs if v.name in c.sqnr_db]
    return bool(found) and min(found) >= CLEAN_DB


def _good_enough(c: Compilation, trials: _Trials, unit: Unit, fmt: str, most: float) -> Iterator[Change]:
    for better in FINER.get(fmt, ()):
        if not _runs(c, better, unit):
            continue
        try:
            gain = trials.gain(unit.name, better)
        except DataError:  # ONNX Runtime does not execute this combination, so it is no advice
            continue
        if gain >= MOST * max(most, WORTHWHILE_DB):
            yield Change(better, gain)


def _runs(c: Compilation, fmt: str, unit: Unit) -> bool:
    combo = None if unit.rule is None else unit.rule.combo_for((fmt,))
    if combo is None or combo.weight is None:
        return False
    return why_weight_unfit(unit.head, c.profile.qspace(combo.weight)) is None


class _Trials:
    """The SQNR of the outputs with single layers in other formats."""

    def __init__(self, c: Compilation, runtime: RuntimeName, keep: frozenset[str]) -> None:
        assert c.model is not None and c.dataset is not None
        self._c, self._runtime, self._keep = c, runtime, keep
        self._config = local_config(c.profile.runtimes.onnxruntime, threads=c.options.threads)
        self._feeds = list(islice(c.dataset.batches(1), frontend.ERROR_SAMPLES))
        reference = open_session(c.model, self._config)
        self._exact = [run(reference, sample) for sample in self._feeds]
        self._base = self._noise(self._model({}))

    def gain(self, node: str, fmt: str) -> float:
        """Return what the output that gains most would gain in dB."""
        found = self._noise(self._model({node: fmt}))
        return max((found[name] - self._base[name] for name in self._base), default=0.0)

    def _noise(self, model: ir.Model) -> dict[str, float]:
        return output_noise(model, self._feeds, self._exact, self._config)

    def _model(self, formats: dict[str, str]) -> ir.Model:
        c, saved = self._c, self._c.formats
        c.formats = replace(saved, by_node={**saved.by_node, **formats})
        try:
            selection = frontend.reselect(c, self._runtime, self._keep)
        finally:
            c.formats = saved
        frontend.calibrate(c, observed_tensors(selection), [])
        return quantizing.draft_model(c, frontend.allocate(c, selection, self._runtime))
