"""Tuning inside a compilation: what is looked up, what is measured, and what the lowering is told."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from bitwright.compiler.artifact import function_models
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import ToolchainError, UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.workload import workloads_of
from bitwright.compiler.tune.child import TuningChild
from bitwright.compiler.tune.farm import require_answer
from bitwright.compiler.tune.hardware import cannot_time, hardware_key, processor_of
from bitwright.compiler.tune.outcome import Tuning
from bitwright.compiler.tune.store import TuningStore, default_place
from bitwright.compiler.tune.tuner import Tuner
from bitwright.targets.backend import backend_for
from bitwright.targets.schema import GENERATED_FAMILIES, Profile


def check(options: Options, profile: Profile) -> None:
    """Check that what is to be measured can be, before any work is done.

    Raises:
        ToolchainError: It cannot, or nobody answers at the tracker's address.
        UsageError: Boards are named, and no tracker.
    """
    farm = options.farm
    if options.tune.off:
        return
    if farm is not None and farm.tracker is None:
        msg = "the boards can be measured on only through their tracker"
        raise UsageError(msg, where="--device-key", fix="pass --tracker HOST:PORT, or --tune off")
    if farm is not None and farm.tracker is not None:
        require_answer(farm.tracker)
    elif processor_of(profile, None) is None:
        why = cannot_time(profile, backend_for(profile.family))
        what = f"this machine cannot time kernels for '{profile.name}': {why}"
        raise ToolchainError(what, where="--tune", fix="pass --tracker HOST:PORT --device-key KEY")


def tune(c: Compilation, notes: list[str], *, resume: bool = False) -> None:
    """Choose the kernels: from the store's records, and by measuring what is not in it if the user allows.

    Args:
        c: With the static model.
        notes: Receives what was found.
        resume: Go on with searches that an earlier budget ended.

    Raises:
        ToolchainError: A default kernel crashes, or the boards are gone.
        UsageError: The store cannot be read or written.
    """
    assert c.static is not None
    if c.profile.family in GENERATED_FAMILIES:
        return
    processor = processor_of(c.profile, c.options.farm)
    if processor is None:
        return
    store = TuningStore(c.options.tuning_store or default_place())
    models = [c.static, *function_models(c).values()]
    tuner = Tuner(
        workloads_of(map(extract_program, models)),
        hardware_key(c.profile, processor),
        store,
        c.options.tune,
        partial(_open_child, models, c),
        c.progress.step,
        resume,
    )
    c.tuning = tuner.run()
    notes.extend(_sentences(c.tuning))


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
