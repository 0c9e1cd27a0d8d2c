"""The measuring process: task metric, distance to float and paired time of one quantized model.

usage: python -m quantization.measure ZOO_NAME FILE.onnx RESULT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from zoo import Feeds, ZooModel, load, model_named

from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.ort.timing import time_reopened
from quantization.child import last_words
from quantization.fidelity import Fidelity

SESSIONS, ROUNDS = 5, 7
MINILM_LENGTHS = (128, 32)
TIMED_SAMPLES = 4


def session_config(model: Path) -> SessionConfig:
    """Return the session options written beside the model, or ONNX Runtime's defaults; one thread."""
    path = model.with_name(model.name.removesuffix(".onnx") + ".session.json")
    if not path.exists():
        return SessionConfig()
    options = json.loads(path.read_text())
    return SessionConfig(
        session_config_entries=options["session_config_entries"],
        disabled_optimizers=options["disabled_optimizers"],
    )


def _minilm_feeds(length: int) -> Feeds:
    """Return one text of ``length`` real tokens, joined from calibration texts."""
    data = load("minilm_l6")
    texts = [ids[:n] for ids, n in zip(data["calib_ids"], data["calib_len"], strict=True)]
    ids = np.concatenate(texts)[None, :length].astype(np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def timing_cases(model: ZooModel) -> dict[str, list[Feeds]]:
    """Return what is timed, by label: a sentence encoder at fixed lengths, others on their longest samples.

    Text lines differ in width by an order of magnitude: those nearest to the median are timed, too.
    """
    if model.name == "minilm_l6":
        return {f"{n} tokens": [_minilm_feeds(n)] for n in MINILM_LENGTHS}
    samples = sorted(model.samples(), key=lambda s: -max(a.size for a in s.values()))
    if model.name == "ppocr_rec":
        middle = (len(samples) - TIMED_SAMPLES) // 2
        return {
            "typical lines": samples[middle : middle + TIMED_SAMPLES],
            "longest lines": samples[:TIMED_SAMPLES],
        }
    return {"": samples[:TIMED_SAMPLES]}


def file_bytes(model: Path) -> int:
    """Return the size of the model and of weight files beside it that start with its name."""
    return sum(p.stat().st_size for p in model.parent.glob(model.name + "*"))


def measure(model: ZooModel, file: Path) -> dict[str, Any]:
    """Return everything that is measured of a written model."""
    config = session_config(file)
    reference, candidate = open_session(model.path), open_session(file, config)
    fidelity = Fidelity(lambda feeds: run(reference, feeds), lambda feeds: run(candidate, feeds))
    metric = model.evaluate(fidelity)
    times = {
        label: time_reopened(
            lambda: open_session(file, config),
            lambda: open_session(model.path),
            feeds,
            sessions=SESSIONS,
            rounds=ROUNDS,
        )
        for label, feeds in timing_cases(model).items()
    }
    return {
        "metric": metric,
        **fidelity.summary(),
        "bytes": file_bytes(file),
        "time": {k: {"ratio": t.ratio, "spread": t.spread, "first_s": t.first_s} for k, t in times.items()},
    }


def float_row(model: ZooModel) -> Mapping[str, Any]:
    """Return the float model's own figures."""
    session = open_session(model.path)
    return {"metric": model.evaluate(lambda feeds: run(session, feeds)), "bytes": file_bytes(model.path)}


def main() -> int:
    name, file, result = sys.argv[1:4]
    model = model_named(name)
    try:
        found = float_row(model) if file == "fp32" else measure(model, Path(file))
    except Exception as error:
        import traceback

        traceback.print_exc()
        found = {"error": last_words(error)}
    Path(result).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
