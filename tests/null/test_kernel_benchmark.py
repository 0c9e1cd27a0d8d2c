"""The benchmark of kernels: its models are valid and the same every time, its tables say what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from kernels.models import MODELS, models_named
from kernels.table import WITHOUT_AMX, fastest_rival, markdown

MADE = [m for m in MODELS if m.name.startswith(("mlp", "conv", "dw", "deep"))]


def contestant(kind: str, seconds: float) -> dict[str, Any]:
    return {"kind": kind, "median_s": seconds, "best_s": seconds, "medians": [[seconds] * 4] * 2}


def result(model: str, *, threads: int = 1, preempted: float = 0.0, **artifacts: float) -> dict[str, Any]:
    forms = {"fp32": contestant("onnxruntime", 4.0), "our Q/DQ": contestant("onnxruntime", 2.0)}
    names = {"host": "host", "vnni": "x86-avx512-vnni", "tuned": "host+tuned"}
    ours = {names[k]: contestant("artifact", v) for k, v in artifacts.items()}
    return {
        "model": model,
        "what": "a model",
        "threads": threads,
        "clock": "thread" if threads == 1 else "wall",
        "contestants": forms | ours,
        "surroundings": {"load": 1.0, "cores": 2, "preempted": preempted},
        "failures": [],
    }


@pytest.mark.parametrize("model", MADE, ids=lambda m: m.name)
def test_made_models_are_valid_and_reproducible(model, tmp_path: Path):
    path = model.build(tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    first = path.read_bytes()
    assert model.build(tmp_path).read_bytes() == first
    (x,) = onnx.load(path).graph.input
    sample = next(iter(model.samples()))["x"]
    assert sample.shape == tuple(d.dim_value for d in x.type.tensor_type.shape.dim)
    np.testing.assert_array_equal(sample, next(iter(model.samples()))["x"])


def test_models_keep_the_order_of_the_table():
    assert [m.name for m in models_named(["mlp-1", "kws_dscnn"])] == ["kws_dscnn", "mlp-1"]
    with pytest.raises(SystemExit, match="unknown model 'none'"):
        models_named(["none"])
    assert len({m.name for m in MODELS}) == len(MODELS) == 17


def test_the_fastest_form_counts():
    assert fastest_rival(result("m", host=1.0)) == "our Q/DQ"


def test_a_table_has_ratios_means_and_the_largest():
    text = markdown([result("one", host=0.5, vnni=2.0), result("two", host=2.0, vnni=2.0)])
    assert "| one | a model | our Q/DQ | 2000000 | 0.250 (0.25 to 0.25) | 1.000 (1.00 to 1.00) = |" in text
    assert "| **geometric mean** | 2 models | | | **0.500** | **1.000** |" in text
    assert "| largest | | | | 1.000 | 1.000 |" in text
    assert "host: geometric mean at most 0.50, none above 0.90: not met (1 above)" in text
    assert "x86-avx512-vnni: geometric mean at most 0.90, none above 1.10: not met (0 above)" in text


def test_tuned_is_compared_with_untuned_and_gaps_are_named():
    text = markdown([result("one", host=1.2, tuned=1.0), result("two", host=1.2)])
    assert "| not compiled |" in text and "untuned takes" not in text
    text = markdown([result("one", host=1.2, tuned=1.0)])
    assert "- host: untuned takes 1.20 of the tuned time." in text


def test_what_has_no_amx_meets_rivals_with_and_without_it():
    found = result("m", host=1.0, vnni=2.0)
    found["contestants"] |= {
        "fp32, no AMX": contestant("onnxruntime", 8.0),
        "our Q/DQ, no AMX": contestant("onnxruntime", 5.0),
    }
    assert fastest_rival(found) == "our Q/DQ" and fastest_rival(found, WITHOUT_AMX) == "our Q/DQ, no AMX"
    row = next(line for line in markdown([found]).splitlines() if line.startswith("| m |"))
    assert [cell.split()[0] for cell in row.split(" | ")[4:]] == ["0.500", "1.000", "0.400"]


def test_threads_have_tables_of_their_own_and_a_busy_machine_is_named():
    text = markdown([result("m", host=1.0, preempted=500.0), result("m", threads=2, host=1.0)])
    assert "One thread, processor time" in text and "2 threads, wall time" in text
    assert text.count("Other work ran on the machine during 1 of 1 measurements.") == 1
