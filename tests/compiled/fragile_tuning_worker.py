"""The tuner's worker with candidates that crash it or compute something else, by the number of pixels."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitwright.compiler.tune import worker
from bitwright.compiler.tune.kernels import Bench
from bitwright.compiler.tune.native import NativeMeasurer

CRASHES, LIES = 3, 2


def pixels(choice) -> int:
    return dict(choice.params).get("pixels", 0)


class Fragile(NativeMeasurer):
    def measure(self, bench, batch, *, rounds, announce):
        def execute(choice):
            announce(choice)
            if pixels(choice) == CRASHES:
                os.kill(os.getpid(), signal.SIGSEGV)

        return super().measure(bench, batch, rounds=rounds, announce=execute)


class Lying(Bench):
    def build(self, choices):
        batch = super().build(choices)
        lies = [
            replace(
                c, kernel=replace(c.kernel, constants=tuple(np.zeros_like(a) for a in c.kernel.constants))
            )
            if pixels(c.choice) == LIES
            else c
            for c in batch.candidates
        ]
        return replace(batch, candidates=tuple(lies))


worker.NativeMeasurer = Fragile
worker.Bench = Lying
sys.exit(worker.main(Path(sys.argv[1])))
