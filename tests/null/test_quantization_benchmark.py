"""The benchmark against other quantizers: what it runs, what it keeps, what it writes."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from quantization.compare import Runner
from quantization.competitors import ALL, COMPETITORS
from quantization.fidelity import Fidelity
from quantization.isolate import run_isolated
from quantization.job import Job, read_job
from quantization.paired import competitor_named, table
from quantization.picture import draw, tool_of
from quantization.results import append_result, read_results
from quantization.table import markdown

MEASURED = {
    "metric": 0.91,
    "sqnr_db": 28.76,
    "cosine": 0.99,
    "least_cosine": 0.9,
    "agreement": 0.989,
    "cosine_with_padded": 0.98,
    "bytes": 47_400,
    "time": {"": {"ratio": 1.049, "spread": 0.01, "first_s": 1e-3}},
    "wall_s": 4.4,
    "cpu_s": 4.0,
    "peak_bytes": 176e6,
}


def isolated(code: str, tmp_path: Path, **limits: float):
    limits = {"time_limit_s": 20, **limits}
    return run_isolated([sys.executable, "-c", code], environment={}, log=tmp_path / "log", **limits)


def test_a_process_is_judged_by_its_own_memory(tmp_path):
    idle = isolated("import time; time.sleep(0.3)", tmp_path)
    large = isolated("import time; x = bytearray(200_000_000); time.sleep(0.3)", tmp_path)
    assert (idle.exit_code, idle.ended_for) == (0, "")
    assert 0.3 <= idle.wall_s < 10
    # The interpreter itself takes the rest; both hold it.
    assert 195e6 < large.peak_bytes - idle.peak_bytes < 215e6


def test_memory_of_children_counts(tmp_path):
    inner = "import time; x = bytearray(100_000_000); time.sleep(0.4)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    assert isolated(code, tmp_path).peak_bytes > 100e6


def test_exit_code_and_output_are_kept(tmp_path):
    usage = isolated("print('said'); raise SystemExit(3)", tmp_path)
    assert usage.exit_code == 3
    assert (tmp_path / "log").read_text() == "said\n"


def test_time_limit(tmp_path):
    usage = isolated("import time; time.sleep(60)", tmp_path, time_limit_s=0.3)
    assert usage.ended_for == "time"
    assert usage.exit_code < 0
    assert usage.wall_s < 10


def test_memory_limit(tmp_path):
    code = "import time; x = bytearray(300_000_000); time.sleep(60)"
    usage = isolated(code, tmp_path, memory_limit_bytes=150e6)
    assert usage.ended_for == "memory"
    assert usage.wall_s < 10


def test_results_survive_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, {"model": "a", "competitor": "x", "metric": 1})
    with path.open("a") as file:
        file.write('{"model": "a", "compet')
    append_result(path, {"model": "a", "competitor": "y", "metric": 2})
    append_result(path, {"model": "a", "competitor": "x", "metric": 3})
    assert {k: row["metric"] for k, row in read_results(path).items()} == {("a", "x"): 3, ("a", "y"): 2}


def test_no_results_yet(tmp_path):
    assert read_results(tmp_path / "none.jsonl") == {}


def test_a_job_survives_its_text(tmp_path):
    job = Job("kws_dscnn", "quantization.rivals.shipped:quantize", str(tmp_path / "q.onnx"), {"file": "x"})
    assert read_job(job.to_json()) == job


def test_competitors_are_told_apart():
    assert [n for n, count in Counter(c.name for c in COMPETITORS).items() if count > 1] == []
    assert [n for n, count in Counter(c.label for c in COMPETITORS).items() if count > 1] == []
    assert all(set(c.models) <= set(ALL) for c in COMPETITORS)
    assert {tool_of(c.name) for c in COMPETITORS if c.is_ours} == {"bitwright"}


@pytest.mark.parametrize("competitor", COMPETITORS, ids=lambda c: c.name)
def test_every_competitor_names_a_function_that_exists(competitor):
    module, function = competitor.function.split(":")
    source = Path(__file__).parents[2] / "benchmarks" / Path(*module.split(".")).with_suffix(".py")
    assert f"\ndef {function}(job: Job) -> None:" in source.read_text()


def test_fidelity_of_known_noise():
    x = np.array([[3.0, 4.0], [0.0, 5.0]])
    noisy = np.array([[3.0, 4.5], [0.5, 5.0]])
    fidelity = Fidelity(lambda _: {"y": x}, lambda _: {"y": noisy})
    assert fidelity({"x": x})["y"] is noisy
    found = fidelity.summary()
    assert found["sqnr_db"] == pytest.approx(10 * np.log10(50 / 0.5))
    cosines = [27 / (5 * np.hypot(3, 4.5)), 25 / (5 * np.hypot(0.5, 5))]
    assert found["cosine"] == pytest.approx(np.mean(cosines))
    assert found["least_cosine"] == pytest.approx(min(cosines))
    assert found["agreement"] == 1


def test_fidelity_leaves_padded_texts_out():
    good, bad = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    fidelity = Fidelity(lambda _: {"y": np.stack([good, good])}, lambda _: {"y": np.stack([good, bad])})
    fidelity({"attention_mask": np.array([[1, 1], [1, 0]])})
    found = fidelity.summary()
    assert found["sqnr_db"] == float("inf")
    assert (found["cosine"], found["cosine_with_padded"]) == (1.0, 0.5)


def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, present: bool) -> dict:
    """Let the competitor whose model comes with the zoo take part in a zoo of one file."""
    competitor = competitor_named("tflite")
    source = tmp_path / "zoo" / "kws_dscnn" / competitor.settings["file"]
    source.parent.mkdir(parents=True)
    if present:
        source.write_bytes(b"model")
    monkeypatch.setenv("BITWRIGHT_ZOO", str(tmp_path / "zoo"))
    return Runner({"own": sys.executable}).quantize(competitor, "kws_dscnn", tmp_path)


def test_a_rival_runs_in_its_own_process(tmp_path, monkeypatch):
    row = shipped(tmp_path, monkeypatch, present=True)
    assert "error" not in row
    assert (tmp_path / "model.onnx").read_bytes() == b"model"
    assert row["wall_s"] > row["call_s"] >= 0
    assert row["peak_bytes"] > 5e6


def test_a_rival_that_fails_is_a_row_with_its_message(tmp_path, monkeypatch):
    row = shipped(tmp_path, monkeypatch, present=False)
    assert row["error"].startswith("FileNotFoundError: [Errno 2]")


def test_a_missing_environment_is_said():
    row = Runner({"own": sys.executable}).row(competitor_named("nncf"), "kws_dscnn")
    assert row == {"error": "no interpreter with nncf was named"}


def test_table_and_picture(tmp_path):
    results = {
        ("kws_dscnn", "fp32"): {"metric": 0.91, "bytes": 103_000},
        ("kws_dscnn", "bitwright-int8"): MEASURED,
        ("kws_dscnn", "nncf"): {"error": "RuntimeError: a | b", "wall_s": 1.0},
    }
    lines = markdown(results).splitlines()
    assert lines[0] == "### kws_dscnn"
    assert "| **Bitwright**, int8, gate off | 0.9100 | 28.8 | 0.989 | 1.05 | 0.0474 | 4 | 176 |" in lines
    assert any("RuntimeError: a \\| b" in line for line in lines)
    assert {line.replace("\\|", "").count("|") for line in lines[2:]} == {9}
    draw(results, tmp_path / "a.svg")
    draw(results, tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "Bitwright" in text
    assert text == (tmp_path / "b.svg").read_text()


def test_paired_ratio_is_of_the_rounds():
    def turns(*walls: float) -> list[dict[str, float]]:
        return [{"wall_s": w, "cpu_s": 1.0, "peak_bytes": 1e6} for w in walls]

    text = table({"ours": turns(1, 2, 9), "rival": turns(4, 16, 9)})
    # The median of 1/4, 2/16 and 9/9, not the ratio of the medians, which is 2/9.
    assert "| ratio, median of 3 pairs | 0.25 | 1.00 | 1.00 |" in text
    assert "| ours | 2.0 | 1.0 | 1.0 |" in text
