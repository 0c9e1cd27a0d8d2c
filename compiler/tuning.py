"""Tuning inside a compilation: what is looked up, what is measured, and what the lowering is told."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from bitwright.compiler.artifact import function_models
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import ToolchainError, UsageError
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.workload import workloads_of
from bitwright.compiler.tune.child import TuningChild
from bitwright.compiler.tune.hardware import cannot_time, hardware_key, processor_of
from bitwright.compiler.tune.outcome import Tuning
from bitwright.compiler.tune.store import TuningStore, default_place
from bitwright.compiler.tune.tuner import Tuner
from bitwright.targets.backend import backend_for


def tune(c: Compilation, notes: list[str], *, resume: bool = False) -> None:
    """Choose the kernels: from the store's records, and by measuring what is not in it if the user allows.

    Args:
        c: With the static model.
        notes: Receives what was found.
        resume: Go on with searches that an earlier budget ended.

    Raises:
        ToolchainError: Kernels are to be measured, and nothing here can.
        UsageError: The store cannot be read or written.
    """
    assert c.static is not None
    budget, farm = c.options.tune, c.options.farm
    store = TuningStore(c.options.tuning_store or default_place())
    processor = processor_of(c.profile, farm)
    if not budget.off:
        _require_timer(c, processor)
    if processor is None:
        return
    models = [c.static, *function_models(c).values()]
    tuner = Tuner(
        workloads_of(map(extract_program, models)),
        hardware_key(c.profile, processor),
        store,
        budget,
        partial(_open_child, models, c),
        c.progress.step,
        resume,
    )
    c.tuning = tuner.run()
    notes.extend(_sentences(c.tuning))


def _require_timer(c: Compilation, processor: str | None) -> None:
    """Check that what is to be measured can be.

    Raises:
        ToolchainError: It cannot.
        UsageError: Boards are named, and no tracker.
    """
    if c.options.farm is not None and c.options.farm.tracker is None:
        msg = "the boards can be measured on only through their tracker"
        raise UsageError(msg, where="--device-key", fix="pass --tracker HOST:PORT, or --tune off")
    if processor is None:
        why = cannot_time(c.profile, backend_for(c.profile.family))
        what = f"this machine cannot time kernels for '{c.profile.name}': {why}"
        raise ToolchainError(what, where="--tune", fix="pass --tracker HOST:PORT --device-key KEY")


def _open_child(models: list[ir.Model], c: Compilation) -> TuningChild:
    return TuningChild(models, c.profile, c.options.farm)


def _sentences(tuning: Tuning) -> list[str]:
    sources = [kernel.source for kernel in tuning.kernels]
    known = sum(k.record is not None for k in tuning.kernels)
    tuned, recorded = sources.count("tuned"), sources.count("record")
    head = (
        f"{len(sources)} kinds of dot products: {tuned} tuned now, {recorded} by earlier records, "
        f"{len(sources) - tuned - recorded} by default ({known} are in the store)"
    )
    measured = f"{tuning.trials} kernels measured in {tuning.seconds:.1f} s"
    spent = measured if tuning.trials else "nothing was measured"
    gain = f"; their time is {tuning.ratio:.2f} of the defaults'" if tuning.ratio is not None else ""
    return [f"{head}; {spent}{gain}", *tuning.notes]
