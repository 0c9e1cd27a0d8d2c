"""How many random shapes the default run compares with the reference bit for bit: those of the other files, counted."""

from __future__ import annotations

import re
from dataclasses import replace

import test_arm_random_steps
import test_arm_weight_only
import test_cortex_m
import test_dot_properties_x86 as dots
import test_random_steps
import test_weight_only_kernels
from arm_trials import FAMILIES, random_cases
from random_steps import random_program
from weight_only_reference import random_case as weight_only_case


def products(cases) -> set[str]:
    """Return what tells cases apart besides their labels and numbers."""
    return {str(replace(case, label="", seed=0)) for case in cases}


def others(seeds, steps: int) -> set[str]:
    """Return what tells steps apart, without their numbers."""
    labels = [label for seed in seeds for label in random_program(seed, range(steps))[2].values()]
    return {re.sub(r"^.*?\]\): ", "", label) for label in labels}


def test_at_least_five_hundred_random_shapes_on_x86_and_under_the_emulators() -> None:
    numbers = range(dots.STEPS * dots.MODULES)
    x86 = {
        "products": products(dots.case_of(n, i) for i in dots.CPU_FLAG for n in numbers),
        "grouped weights": products(
            weight_only_case(n) for part in test_weight_only_kernels.RANDOM.values() for n in part
        ),
        "other steps": others(test_random_steps.PROCESSORS.values(), test_random_steps.STEPS),
    }
    emulated = {
        "products": products(case for row in FAMILIES for case in random_cases(row)),
        "grouped weights": products(
            weight_only_case(n) for part in test_arm_weight_only.RANDOM.values() for n in part
        ),
        "other steps": others(test_arm_random_steps.SEEDS.values(), test_arm_random_steps.STEPS),
        "microcontrollers": products(
            case
            for target in test_cortex_m.TARGETS
            for batch in range(test_cortex_m.BATCHES)
            for case in test_cortex_m.random_cases(batch, target)
        ),
    }
    counts = {
        place: {k: len(v) for k, v in kinds.items()} for place, kinds in (("x86", x86), ("qemu", emulated))
    }
    print(counts)
    assert sum(counts["x86"].values()) >= 500
    assert sum(counts["qemu"].values()) >= 500
