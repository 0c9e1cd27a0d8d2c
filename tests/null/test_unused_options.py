"""Options that nothing would use are refused, not ignored."""

from pathlib import Path

import numpy as np
import pytest

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import UsageError
from bitwright.compiler.options import Options
from bitwright.targets.loader import load_profile


def compilation(tmp_path: Path, target: str = "x86-avx2", **changes: object) -> Compilation:
    data = [{"x": np.zeros(3, np.float32)}]
    options = Options(model=tmp_path / "m.onnx", target=target, data=data, **changes)  # type: ignore[arg-type]
    return Compilation(options, load_profile(target))


@pytest.mark.parametrize(
    ("option", "value"), [("scheduler", "tcp://127.0.0.1:8786"), ("cache", Path("sensitivities"))]
)
def test_what_only_measuring_uses_is_refused_where_nothing_is_measured(
    tmp_path: Path, option: str, value: object
) -> None:
    with pytest.raises(UsageError, match="'int8' chooses no formats") as caught:
        compilation(tmp_path, **{option: value}).refuse_unused_options()
    assert caught.value.where == f"--{option}"
    compilation(tmp_path, recipe="mixed", **{option: value}).refuse_unused_options()
    compilation(tmp_path, budget={"size": 1000.0}, **{option: value}).refuse_unused_options()
    compilation(tmp_path).refuse_unused_options()
