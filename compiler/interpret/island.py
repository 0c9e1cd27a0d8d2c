"""Running float islands with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir


class OrtRunner:
    """Runs island models in ONNX Runtime, optimizations off; one session a model, kept for later calls."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        # The model is kept beside its session: its id stays unique as long as the entry lives.
        self._sessions: dict[int, tuple[ir.Model, Any]] = {}

    def __call__(self, model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run ``model`` on ``feeds`` (by input name) and return all its outputs by name."""
        session = self._session(model)
        names = [v.name or "" for v in model.graph.outputs]
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    def _session(self, model: ir.Model) -> Any:
        known = self._sessions.get(id(model))
        if known is None:
            known = self._sessions[id(model)] = (model, self._load(model))
        return known[1]

    def _load(self, model: ir.Model) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = self._threads
        # A session made from bytes has no folder to read external weights from.
        inside = ir.external_data.load_to_model(model.clone())
        data = ir.to_proto(inside).SerializeToString()
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
