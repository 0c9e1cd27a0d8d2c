"""Functions of the user: samples and metrics that raise, lie or are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.compiler.errors import BitwrightError, DataError, UsageError
from bitwright.compiler.ingest.dataset import open_dataset
from bitwright.compiler.ingest.evaluator import load_eval

from .bad_data import IMAGES, model, refused

# --- the user's functions
# ---------------------------------------------------------------------------------------


def script(folder: Path, body: str) -> Path:
    path = folder / "user.py"
    path.write_text("import numpy as np\n" + body)
    return path


def test_function(tmp_path):
    path = script(
        tmp_path,
        "def samples():\n    for k in range(3):\n        yield {'x': np.full((1, 2), k, np.float32)}\n",
    )
    dataset = open_dataset(f"{path}:samples", model("float[N, 2] x"))
    assert [float(s["x"][0, 0]) for s in dataset] == [0, 1, 2]
    assert [b["x"].shape for b in dataset.batches(2)] == [(2, 2), (1, 2)]


def test_function_names_and_files(tmp_path):
    path = script(tmp_path, "def samples():\n    return []\n")
    with pytest.raises(UsageError, match="did you mean 'samples'"):
        open_dataset(f"{path}:sampels", model(IMAGES))
    with pytest.raises(UsageError, match="there is no file"):
        open_dataset(f"{tmp_path}/none.py:samples", model(IMAGES))


@pytest.mark.parametrize(
    ("body", "line", "needle"),
    [
        ("def f():\n    return 1 / 0\n", 3, "ZeroDivisionError"),
        (
            "def f():\n    yield {'x': np.ones((1, 2), np.float32)}\n    raise KeyError('k')\n",
            4,
            "KeyError: 'k'",
        ),
        ("def f():\n    raise SystemExit(3)\n", 3, "SystemExit"),
        ("import nowhere_at_all\n", 2, "ModuleNotFoundError"),
        ("def f(:\n", 2, "SyntaxError"),
    ],
)
def test_function_that_raises(tmp_path, body, line, needle):
    path = script(tmp_path, body)
    with pytest.raises(DataError) as caught:
        open_dataset(f"{path}:f", model("float[N, 2] x"))
    assert caught.value.where == f"{path}:{line}"
    assert needle in caught.value.what


@pytest.mark.parametrize(
    ("value", "needle"),
    [
        ("5", "not an iterable"),
        ("{'x': 1}", "not an iterable"),
        ("[5]", "sample 0: is int"),
        ("[None]", "sample 0: is NoneType"),
        ("[]", "no sample"),
        ("[{'x': [[1.0, 2.0]]}]", "is float64"),
        ("[{'x': [[1.0], [2.0, 3.0]]}]", "sample 0, input 'x'"),
        ("[{'x': np.ones((1, 3), np.float32)}]", "[1, 3]"),
        ("[{'y': np.ones((1, 2), np.float32)}]", "'x'"),
    ],
)
def test_function_results(tmp_path, value, needle):
    path = script(tmp_path, f"def f():\n    return {value}\n")
    refused(f"{path}:f", model("float[N, 2] x"), needle)


def test_function_with_other_samples_the_second_time(tmp_path):
    body = "left = [3, 2]\ndef f():\n    return [{'x': np.ones((1, 2), np.float32)}] * left.pop(0)\n"
    dataset = open_dataset(f"{script(tmp_path, body)}:f", model("float[N, 2] x"))
    with pytest.raises(DataError, match="3 samples at first and 2 later"):
        list(dataset)


# --- the metric
# -------------------------------------------------------------------------------------------------


def double(feeds):
    return {"y": feeds["x"] * 2}


def test_metric(tmp_path):
    path = script(tmp_path, "def score(run):\n    return run({'x': np.float32(4)})['y']\n")
    assert load_eval(f"{path}:score")(double) == 8.0


@pytest.mark.parametrize("value", ["None", "'0.5'", "np.ones(2)", "True", "1j"])
def test_metric_that_is_no_number(tmp_path, value):
    path = script(tmp_path, f"def score(run):\n    return {value}\n")
    with pytest.raises(UsageError, match="not a number"):
        load_eval(f"{path}:score")(double)


def test_metric_that_is_not_finite_or_raises(tmp_path):
    path = script(
        tmp_path, "def score(run):\n    return float('nan')\ndef broken(run):\n    return run({'z': 1})\n"
    )
    with pytest.raises(DataError, match="returned nan"):
        load_eval(f"{path}:score")(double)
    with pytest.raises(DataError) as caught:
        load_eval(f"{path}:broken")(double)
    assert caught.value.where == f"{path}:5"

    def failing(feeds):
        raise BitwrightError("from the runtime")

    with pytest.raises(BitwrightError, match="from the runtime") as passed:
        load_eval(f"{path}:broken")(failing)
    assert type(passed.value) is BitwrightError


@pytest.mark.parametrize("spec", ["score", "user.py", "user.py:", "user.py:no such", ":f", ""])
def test_metric_spec(spec):
    with pytest.raises(UsageError, match=r"FILE\.py:FUNC"):
        load_eval(spec)


def test_a_users_script_gets_no_pycache_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    script = tmp_path / "metric.py"
    script.write_text("def score(run):\n    return 1.0\n")
    assert load_eval(f"{script}:score")(lambda feeds: {}) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["metric.py"]
