"""Quantizing a model part by part, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright.compiler import frontend, fusion, quantizing
from bitwright.compiler.bundle.model_files import files_appearing_whole
from bitwright.compiler.compilation import Compilation, Progress
from bitwright.compiler.errors import InternalError
from bitwright.compiler.graph.mapped import release_pages
from bitwright.compiler.graph.saving import weight_bytes
from bitwright.compiler.ort.equality import largest_difference
from bitwright.compiler.ort.session import SessionConfig, local_config, open_session, run, runs_here
from bitwright.compiler.plan.plan_file import plan_text
from bitwright.compiler.plan.planner import runtime_of
from bitwright.compiler.report.written import companion
from bitwright.compiler.streaming.chain import Part, chain_of
from bitwright.compiler.streaming.content import LEFT_OUT, Content
from bitwright.compiler.streaming.extraction import part_model, prepared
from bitwright.compiler.streaming.heap import give_back, keep_heap_small
from bitwright.compiler.streaming.held import PartData, Stream
from bitwright.compiler.streaming.joining import PartWriter
from bitwright.compiler.streaming.kept import TIED, KeptParts, damaged, kept_parts, settings_of
from bitwright.compiler.streaming.noise import measure_noise
from bitwright.compiler.streaming.part import RUNTIME, part_compilation, plan_part, round_part
from bitwright.compiler.streaming.tying import tied_as_plain, tied_from_plain, tied_tables, with_tied_scales
from bitwright.passes.block_tables import TiedTable

# Samples that both streams follow, to say how far the quantized model is from the float one.
COMPARED = frontend.ERROR_SAMPLES
# Kernels that round their inputs to 8 bits pass on last bits of float sums as whole steps (2.5e-3 behind six layers); a
# wrong joint shows up as an error of order one.
JOINED_BOUND = 5e-2


def stream(c: Compilation, way: str, output: Path, config: SessionConfig) -> dict[str, Any]:
    """Quantize a model part by part and write it with its companions.

    Args:
        c: A compilation whose model and data were read.
        way: ``quantized``: a part is calibrated on what the quantized parts before it make; ``float``: on what the
            float model makes, as when a model is quantized as a whole.
        output: The .onnx file; its weights go to a .onnx.data file beside it.
        config: How the deployment is opened, for the .session.json.

    Returns:
        The content of the report.

    Raises:
        ModelError: The model is no chain of parts.
        UsageError: The recipe has no format that the target runs, or an option names what the model lacks; there are
            no finished parts of an earlier run to go on from, or they were made with other settings.
        DataError: They are damaged.
    """
    assert c.source is not None and c.dataset is not None, "ingest is done"
    keep_heap_small()
    with c.recorded("cut") as notes:
        notes.extend(frontend.check_recipe(c, RUNTIME))
        whole = prepared(c.source.model, runtime_of(c.profile, "artifact").opset)
        parts = chain_of(whole)
        frontend.check_known_nodes(c, whole)
        notes.append(f"{len(parts)} parts; {way} values pass between them")
    with (
        kept_parts(output, settings_of(c, way), c.options.resume) as kept,
        files_appearing_whole(output) as folder,
    ):
        run_ = _Run(c, whole, parts, way, kept)
        with c.recorded("parts") as notes:
            run_.through(notes)
        with c.recorded("join") as notes:
            c.model, c.quantized = whole, run_.writer.joined(whole, parts)
            ir.save(c.quantized, kept.folder / output.name)
            run_.check(kept.folder / output.name, notes)
            notes.append(f"not measured part by part: {'; '.join(LEFT_OUT)}")
            joined = c.quantized
        with c.recorded("fuse") as notes:
            _fuse(c, config, notes)
        with c.recorded("compact") as notes:
            if run_.compact:
                quantizing.compact_weights(c.quantized, notes)
        if run_.compact or c.quantized is not joined:
            # Constants that stayed the same included: the file holds nothing that the model does not read.
            ir.save(c.quantized, folder / output.name, external_data=kept.data.name)
        else:
            for file in (kept.data, kept.folder / output.name):
                file.replace(folder / file.name)
        report = run_.content.report(c, way, len(run_.main.data), weight_bytes(c.quantized))
        _write_beside(run_.content, c, folder, output, config, report)
    return report


def _fuse(c: Compilation, config: SessionConfig, notes: list[str]) -> None:
    """Write a decoder's attention as ONNX Runtime's operator where that is proven equal; it is not timed."""
    if runs_here(runtime_of(c.profile, RUNTIME)):
        c.options = replace(c.options, gate=False)
        fusion.fuse(c, config, notes)
    else:
        fusion.leave(c, notes)


def _write_beside(
    content: Content,
    c: Compilation,
    folder: Path,
    output: Path,
    config: SessionConfig,
    report: Mapping[str, Any],
) -> None:
    texts = {
        ".session.json": config.to_json(),
        ".plan.yaml": plan_text(content.plan(c)),
        ".report.json": json.dumps(report, indent=1, allow_nan=False) + "\n",
    }
    for suffix, text in texts.items():
        (folder / companion(output, suffix).name).write_text(text)


class _Run:
    """The loop's state: two streams of samples, what is written, what is to be reported."""

    def __init__(
        self, c: Compilation, whole: ir.Model, parts: Sequence[Part], way: str, kept: KeptParts
    ) -> None:
        self._c, self._whole, self._parts, self._kept = c, whole, parts, kept
        self.writer = PartWriter(kept.data, kept.end)
        # Outputs are kept from part to part: in an arena each would keep the weights of the session that made it.
        self._config = replace(
            local_config(c.profile.runtimes.onnxruntime, threads=c.options.threads), arena=False
        )
        samples = frontend.samples_of(c)
        plain = SessionConfig(threads=c.options.threads, arena=False)
        shared = list(dict.fromkeys(v.name or "" for p in parts for v in p.shared))
        follows = {"float": COMPARED, "quantized": COMPARED, way: None}
        self._float = Stream(samples, follows["float"], plain, shared)
        self._quantized = Stream(samples, follows["quantized"], self._config, shared)
        self.main = self._quantized if way == "quantized" else self._float
        self._entry: ir.Shape | None = None
        self._last: dict[str, np.ndarray] = {}
        self._tied: tuple[TiedTable, ...] = ()
        self.content = Content()
        self.compact = False

    def through(self, notes: list[str]) -> None:
        """Quantize all parts that are not finished yet."""
        try:
            if self._kept.count:
                self._take_over()
                notes.append(f"{self._kept.count} finished parts were taken over from an interrupted run")
            for number in range(self._kept.count, len(self._parts)):
                self._step(self._parts[number], number, len(self._parts))
                give_back()
        finally:
            self.writer.close()

    def _step(self, part: Part, number: int, total: int) -> None:
        """Quantize one part, write it, and take both streams through it."""
        c = self._c
        c.progress.step(number, total, "parts")
        progress = _Within(c.progress, number, total)
        state = self._begun(part, self.main, progress)
        plan_part(state)
        if part.entry is None:
            self._tied = self._tied_tables(state, progress)
        state.tied = self._tied
        with_tied_scales(state)
        round_part(state)
        with state.recorded("noise"):
            exact, actual = (PartData(s, part) for s in (self._float, self._quantized))
            measure_noise(state, islice(exact, COMPARED), islice(actual, COMPARED), self._config)
        assert state.quantized is not None and state.normalized is not None
        with state.recorded("pass on"):
            outputs = self._outputs(part, state.quantized)
            self._quantized.advance(part, state.quantized)
            self._float.advance(part, state.normalized)
        assert state.plan is not None
        self.compact = self.compact or quantizing.is_compact_plan(state.plan, c.profile)
        self.content.add(state)
        self._keep(state.quantized, outputs)
        release_pages(self._whole)

    def _keep(self, quantized: ir.Model, outputs: dict[str, np.ndarray]) -> None:
        """Write a finished part, and what a later run needs to go on behind it."""
        kept, streams = self._kept, {"float": self._float, "quantized": self._quantized}
        self._last |= outputs
        weights = self.writer.add(quantized)
        self.writer.flush()
        tied, arrays = tied_as_plain(self._tied)
        beside = [] if kept.count else [TIED]
        if not kept.count:
            kept.write_arrays(TIED, arrays)
            for name, each in streams.items():
                if each.first is not None:
                    beside.append(f"first.{name}.onnx")
                    kept.write_model(beside[-1], each.first)
        record = {
            "said": self.content.last,
            "weights": weights,
            "end": self.writer.end,
            "entry": None if self._entry is None else [_plain_dim(d) for d in self._entry],
            "tied": tied,
            "compact": self.compact,
        }
        passed = {name: each.held for name, each in streams.items()}
        kept.write(record, quantized, outputs, passed, beside)

    def _take_over(self) -> None:
        """Stand where an interrupted run stood behind its last finished part.

        Raises:
            DataError: What it left is damaged.
        """
        kept = self._kept
        try:
            kept.check()
            for number in range(kept.count):
                record = kept.record(number)
                self.writer.take(kept.model(number), record["weights"])
                self.content.take(record["said"])
                self._last |= kept.outputs(number)
            self.compact = record["compact"]
            self._tied = tied_from_plain(record["tied"], kept.arrays(TIED))
            self._entry = None if record["entry"] is None else ir.Shape(record["entry"])
            for name, each in {"float": self._float, "quantized": self._quantized}.items():
                each.restore(kept.passed(name), kept.read_model(f"first.{name}.onnx"))
        except (KeyError, ValueError, TypeError, OSError) as error:
            raise damaged(kept.folder) from error

    def _begun(self, part: Part, stream: Stream, progress: Progress) -> Compilation:
        """Return what a part begins with, calibrated on a stream that has reached it."""
        sample = next(iter(PartData(stream, part)))
        if part.entry is not None:
            self._entry = _agreed(self._entry or part.entry.shape, sample[part.entry.name or ""].shape)
        model = part_model(self._whole, part, sample, self._entry)
        return part_compilation(self._c, model, PartData(stream, part, model), progress)

    def _tied_tables(self, first: Compilation, progress: Progress) -> tuple[TiedTable, ...]:
        """Return the tables that later parts read, too; the float model is run for their scales if there are any."""
        exact = replace(self._float, most=None)
        return tied_tables(
            first, self._parts, exact, lambda part, stream: self._begun(part, stream, progress)
        )

    def _outputs(self, part: Part, quantized: ir.Model) -> dict[str, np.ndarray]:
        """Return what a part makes of the first sample's outputs, for the check of the joined model."""
        names = [v.name or "" for v in part.outputs if v.is_graph_output()]
        if not names:
            return {}
        sample = next(iter(PartData(self._quantized, part)))
        found = run(open_session(quantized, self._config), sample)
        return {name: found[name] for name in names}

    def check(self, path: Path, notes: list[str]) -> None:
        """Run the joined model on the first sample and compare it with what its parts made."""
        sample = next(self._quantized.samples())
        found = run(open_session(path, self._config), sample)
        difference = largest_difference(self._last, {name: found[name] for name in self._last})
        notes.append(f"largest relative difference of the joined model to its parts: {difference:.2e}")
        if not difference <= JOINED_BOUND:
            what = f"the joined model differs from its parts by {difference:.2e} (allowed {JOINED_BOUND:.0e})"
            raise InternalError(what, where=str(self._c.options.model), fix="please report this model")
        for each in (self._float, self._quantized):
            each.close()


def _agreed(shape: ir.Shape | None, sizes: tuple[int, ...]) -> ir.Shape | None:
    """Return a shape if it fits an array; the residual stream has one shape all the way."""
    if shape is None or len(shape) != len(sizes):
        return None
    fits = all(not isinstance(d, int) or d == n for d, n in zip(shape, sizes, strict=True))
    return shape if fits else None


def _plain_dim(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


@dataclass
class _Within:
    """Tells progress inside a part as progress of the whole."""

    outer: Progress
    number: int
    total: int
    name: str = ""

    def phase(self, name: str) -> None:
        """A phase of the part begins."""
        self.name = name
        self.outer.step(self.number, self.total, f"parts: {name}")

    def step(self, done: int, total: int, what: str) -> None:
        """Work inside the phase."""
        figure = f" {done}/{total} {what}" if total else ""
        self.outer.step(self.number, self.total, f"parts: {self.name}{figure}")

    def note(self, text: str) -> None:
        """Something that a reader wants to know at once."""
        self.outer.note(text)
