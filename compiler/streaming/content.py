"""The report and the plan of a model that was quantized in parts: those of the parts, put together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bitwright.compiler.compilation import Compilation, PhaseRecord
from bitwright.compiler.graph.saving import weight_bytes
from bitwright.compiler.plan.plan_file import plan_to_dict
from bitwright.compiler.report.content import port, report_content
from bitwright.compiler.report.decisions import recipe_section
from bitwright.compiler.report.sizes import size_ledger

LEFT_OUT = (
    "the time against float in ONNX Runtime",
    "what ONNX Runtime fuses (audit)",
    "what the worst layers cost the outputs",
)
Plain = dict[str, Any]


class Content:
    """Collects reports and plans part by part; a part's models are not needed afterwards."""

    def __init__(self) -> None:
        self._reports: list[Plain] = []
        self._plans: list[Plain] = []
        self._phases: dict[str, PhaseRecord] = {}
        self._taken: Plain = {}

    def add(self, c: Compilation) -> None:
        """Take what is to be said about a finished part."""
        assert c.plan is not None, "the part is planned"
        said = {
            "report": report_content(c),
            "plan": plan_to_dict(c.plan, {}),
            "phases": [asdict(p) for p in c.phases],
        }
        self.take(json.loads(json.dumps(said)))

    @property
    def last(self) -> Plain:
        """What was taken last, as JSON values."""
        return self._taken

    def take(self, said: Plain) -> None:
        """Take what :attr:`last` said in an earlier run."""
        self._taken = said
        self._reports.append(said["report"])
        self._plans.append(said["plan"])
        for phase in (PhaseRecord(p["name"], p["seconds"], tuple(p["notes"])) for p in said["phases"]):
            known = self._phases.get(phase.name, PhaseRecord(phase.name, 0.0))
            notes = tuple(dict.fromkeys((*known.notes, *phase.notes)))
            self._phases[phase.name] = PhaseRecord(phase.name, known.seconds + phase.seconds, notes)

    def plan(self, c: Compilation) -> Plain:
        """Return the plan of the whole as plain data."""
        first = self._plans[0]
        lists = {key: _chained(p[key] for p in self._plans) for key in ("nodes", "activations", "weights")}
        return {**first, "recipe": c.recipe.as_plain(), **lists}

    def report(self, c: Compilation, way: str, samples: int, written: int) -> Plain:
        """Return the report of the whole.

        Args:
            c: The whole: options, source, the model that was cut, the result, and the phases around the parts.
            way: How it was streamed.
            samples: How many calibrated.
            written: Bytes of the constants of the result.
        """
        reports, source = self._reports, c.source
        assert source is not None, "ingest is done"
        found = {**reports[0]}
        found["model"] = {
            **_summed(reports, "model", ("nodes_normalized", "parameters")),
            "nodes": len(list(source.model.graph)),
            "inputs": [port(v) for v in source.model.graph.inputs],
            "outputs": [port(v) for v in source.model.graph.outputs],
        }
        found["recipe"] = recipe_section(c)
        found["summary"] = self._summary(c, written)
        found["migrations"] = _migrations(reports)
        found["phases"] = [asdict(p) for p in (*c.phases, *self._phases.values())]
        for name in ("layers", "noise", "float", "not_lowered"):
            found[name] = _chained(r[name] for r in reports)
        found["sizes"] = size_ledger(c.model, c.quantized)
        found["warnings"] = list(dict.fromkeys(_chained(r["warnings"] for r in reports) + _own_warnings(c)))
        found["streaming"] = {
            "way": way,
            "parts": len(reports),
            "samples": samples,
            "left_out": list(LEFT_OUT),
        }
        return found

    def _summary(self, c: Compilation, written: int) -> Plain:
        assert c.source is not None
        parts = [r["summary"] for r in self._reports]
        counts = ("integer_anchors", "quantized_anchors", "anchors", "macs")
        total = sum(p["macs"] for p in parts)
        outputs = {v.name for v in c.source.model.graph.outputs}
        shares = {
            key: sum(p[key] * p["macs"] for p in parts) / total if total else 0.0
            for key in ("integer_macs_share", "quantized_macs_share")
        }
        noise = {k: v for p in parts for k, v in p["output_sqnr_db"].items() if k in outputs}
        return {
            **parts[0],
            **{key: sum(p[key] for p in parts) for key in counts},
            **shares,
            "formats": _added(p["formats"] for p in parts),
            "parameters_by_bits": _added(p["parameters_by_bits"] for p in parts),
            "float_bytes": weight_bytes(c.source.model),
            "bytes": written,
            "output_sqnr_db": noise,
        }


def _own_warnings(c: Compilation) -> list[str]:
    return [*(c.source.warnings if c.source else ()), *(c.dataset.warnings if c.dataset else ())]


def _chained(lists: Iterable[list[Any]]) -> list[Any]:
    return [row for rows in lists for row in rows]


def _summed(reports: Sequence[Plain], section: str, keys: Sequence[str]) -> Plain:
    return {**reports[0][section], **{k: sum(r[section][k] for r in reports) for k in keys}}


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for part in counts:
        found.update(part)
    return dict(found.most_common())


def _migrations(reports: Sequence[Plain]) -> list[Plain]:
    found: dict[str, Plain] = {}
    for row in _chained(r["migrations"] for r in reports):
        known = found.setdefault(row["rewrite"], {**row, "changes": 0, "notes": []})
        known["changes"] += row["changes"]
        known["notes"] = [*known["notes"], *row["notes"]]
    return list(found.values())
