"""Which samples calibrate, and which judge formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from bitwright.compiler import frontend
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import DataError
from bitwright.compiler.ingest.dataset import dataset_from_memory
from bitwright.compiler.ingest.dataset_views import Held, Limited
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.options import Options
from bitwright.targets.loader import load_profile

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
identity (float[N,2] x) => (float[N,2] y)
{
  y = Relu(x)
}
"""
MANY = frontend.PLENTY * frontend.JUDGING


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def _numbered(count: int) -> dict[str, np.ndarray]:
    return {"x": np.repeat(np.arange(count, dtype=np.float32)[:, None], 2, axis=1)}


def _numbers(batches: Iterable[Mapping[str, np.ndarray]]) -> list[int]:
    return [int(n) for batch in batches for n in batch["x"][:, 0]]


def _compilation(path: Path, count: int, **options: object) -> Compilation:
    chosen = {"recipe": "mixed", **options}
    asked = Options(model=path, target="x86-avx2", data=_numbered(count), **chosen)  # type: ignore[arg-type]
    c = Compilation(asked, load_profile("x86-avx2"))
    frontend.ingest(c, [])
    return c


@pytest.mark.parametrize("size", [1, 7, 200])
def test_held_samples_and_the_others_are_everything(path: Path, size: int) -> None:
    dataset = dataset_from_memory(_numbered(50), read_model(path).model)
    back, rest = Held(dataset, 8, back=True), Held(dataset, 8, back=False)
    held, others = _numbers(back.batches(size)), _numbers(rest.batches(size))
    assert (len(held), len(others)) == (len(back), len(rest)) == (8, 42)
    assert sorted(held + others) == list(range(50))
    # Evenly spaced: data that is sorted by class is held back from every class.
    assert max(np.diff(held)) - min(np.diff(held)) <= 1
    assert all(len(batch["x"]) <= size for batch in rest.batches(size))


def test_the_first_samples_of_the_others(path: Path) -> None:
    dataset = dataset_from_memory(_numbered(50), read_model(path).model)
    rest = Held(dataset, 25, back=False)
    assert _numbers(Limited(rest, 3).batches(1)) == _numbers(rest.batches(1))[:3]


def test_an_allocation_is_judged_by_samples_that_calibrate_nothing(path: Path) -> None:
    c = _compilation(path, MANY)
    calibrating = _numbers(frontend.samples_of(c).batches(1))
    judging = _numbers(frontend.judging_samples(c).batches(1))
    assert len(judging) == frontend.JUDGING
    assert not set(calibrating) & set(judging)
    assert len(calibrating) + len(judging) == MANY


@pytest.mark.parametrize(
    ("count", "options"), [(MANY - 1, {}), (MANY, {"recipe": "int8"}), (MANY, {"samples": 5})]
)
def test_nothing_is_held_back_without_need_or_plenty(
    path: Path, count: int, options: dict[str, object]
) -> None:
    c = _compilation(path, count, **options)
    expected = options.get("samples", count)
    assert len(frontend.samples_of(c)) == expected
    first = _numbers(frontend.judging_samples(c).batches(1))
    assert first == list(range(min(frontend.JUDGING, int(str(expected)))))


@pytest.mark.parametrize(("given", "most", "used"), [(10, 64, 10), (1000, 64, 64), (1000, None, 1000)])
def test_the_users_own_samples_judge(path: Path, given: int, most: int | None, used: int) -> None:
    np.savez(path.with_name("judge.npz"), **_numbered(given))
    c = _compilation(path, MANY, validation=str(path.with_name("judge.npz")))
    assert len(frontend.samples_of(c)) == MANY
    assert len(_numbers(frontend.judging_samples(c, most).batches(1))) == used


def test_samples_of_another_model_are_refused(path: Path) -> None:
    np.savez(path.with_name("judge.npz"), x=np.zeros((4, 3), np.float32))
    with pytest.raises(DataError, match=r"judge\.npz"):
        _compilation(path, MANY, validation=str(path.with_name("judge.npz")))
