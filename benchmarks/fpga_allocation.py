"""Formats and foldings chosen together on an FPGA: cells at equal cycles, frames at equal cells, against uniform int8.

``BITWRIGHT_ZOO=... python benchmarks/fpga_allocation.py [--models kws_dscnn resnet8_cifar10] [--target ecp5-85f]
[--synth] [--out DIR]``

Every plan is a Q/DQ model; its metric is that of ONNX Runtime on the samples that calibrate nothing. Cells are
predicted, with ``--synth`` also counted by yosys.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import zoo
from zoo import ZooModel, model_named

from bitwright.compiler import folding, pipeline
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import local_config, open_session, run
from bitwright.targets.folding import Taken
from bitwright.targets.generator import Request, generator_for
from bitwright.targets.loader import load_profile

MODELS = ("kws_dscnn", "resnet8_cifar10")
CELLS = ("luts", "dsps", "brams")
# Cells at equal cycles: of the uniform plan's look-up tables.
SHARE = 0.55
# Frames at equal cells: times those of the uniform plan, at least.
FASTER = 1.5
RIVALS = (
    ("hls4ml, residual CNN RN07", "Pynq-Z2 (XC7Z020)", 36.6, 0.835),
    ("FINN, CNV-W1A1 (weights and activations of 1 bit)", "Pynq-Z2 (XC7Z020)", 661.5, 0.845),
)


@dataclass(frozen=True)
class Plan:
    """A plan and what it takes.

    Attributes:
        name: What it is.
        recipe: Its recipe.
        taken: Predicted.
        fps: Frames a second at the profile's clock.
        metric: The task's.
        bits: Formats and how many layers have them.
        counted: Counted by yosys, if asked for.
    """

    name: str
    recipe: str
    taken: Taken
    fps: float
    metric: float
    bits: Mapping[str, int]
    counted: Mapping[str, float] | None = None


class Workshop:
    """Makes plans of one model for one target."""

    def __init__(self, model: ZooModel, target: str, cache: Path, *, synth: bool) -> None:
        self.model, self.profile, self.cache, self.synth = model, load_profile(target), cache, synth
        self.clock = self.profile.clock_hz

    def plan(self, name: str, recipe: str, **budget: float) -> Plan:
        """Quantize, choose foldings, and measure the metric."""
        samples = f"{zoo.__file__}:{self.model.samples.__name__}"
        options = Options(
            model=self.model.path,
            target=self.profile.name,
            data=samples,
            # 64 of the samples that calibrate judge the formats; by default 16 would.
            validation=samples,
            recipe=recipe,
            budget=budget,
            cache=self.cache,
        )
        c = Compilation(options, self.profile)
        for phase_name, phase in pipeline.FRONT:
            if phase_name not in ("audit", "tune"):
                with c.recorded(phase_name) as notes:
                    phase(c, notes)
        found = folding.folded(c, [])
        assert c.quantized is not None and c.plan is not None
        session = open_session(c.quantized, local_config(self.profile.runtimes.onnxruntime))
        metric = self.model.evaluate(lambda feeds: run(session, feeds))
        formats = Counter(d.format for d in c.plan.nodes.values() if d.constant_weight)
        taken = found.taken
        counted = self._counted(c, found.foldings) if self.synth else None
        return Plan(name, recipe, taken, self.clock / taken.cycles, metric, dict(formats), counted)

    def float_metric(self) -> float:
        """Return the metric of the float model."""
        import onnxruntime as ort

        session = ort.InferenceSession(str(self.model.path), providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        return self.model.evaluate(lambda feeds: dict(zip(names, session.run(None, feeds), strict=True)))

    def _counted(self, c: Compilation, foldings: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
        """Generate the circuit and let yosys count its cells."""
        assert c.static is not None
        request = Request(steps=frozenset({"synth"}), cache=self.cache, foldings=foldings)
        with tempfile.TemporaryDirectory() as place:
            generated = generator_for(self.profile.family).generate(
                c.static, self.profile, Path(place), request, lambda done, total, what: None
            )
        table = next(t for t in generated.tables if t.title == "Resources")
        last = next(row for row in table.rows if row[0] == "all")
        heads = dict(zip(table.columns, last, strict=True))
        words = {"luts": "#LUTs (yosys)", "dsps": "#DSP blocks (yosys)", "brams": "#block RAMs (yosys)"}
        return {kind: float(heads[word] or 0) for kind, word in words.items()}


def rows_of(shop: Workshop) -> tuple[float, list[Plan]]:
    """Return the float metric, and the plans of one model."""
    exact = shop.float_metric()
    fastest = shop.plan("uniform int8, as fast as the device allows", "int8")
    # The same frame rate with as few look-up tables as that takes.
    lean = shop.plan("uniform int8, that frame rate, fewest LUTs", "int8", fps=fastest.fps * 0.999)
    print(f"{shop.model.name}: float {exact:.4f}; int8 {fastest.fps:.0f} frames/s, {lean.taken}", flush=True)
    limits = {"luts": SHARE * lean.taken.luts, "dsps": max(lean.taken.dsps, 0)}
    equal = shop.plan(
        "mixed, that frame rate, 55 % of its LUTs", "short-mixed", fps=lean.fps * 0.999, **limits
    )
    # The budget of the first plan, too: what the device has.
    fast = shop.plan(f"mixed, {FASTER:g} x that frame rate at least", "short-mixed", fps=FASTER * lean.fps)
    return exact, [fastest, lean, equal, fast]


def table(shop: Workshop, exact: float, plans: list[Plan]) -> str:
    """Return the plans as a table in Markdown."""
    base, lean = plans[0], plans[1]
    lines = [
        f"### {shop.model.name} on {shop.profile.name}, {shop.clock / 1e6:g} MHz; float {exact:.4f}",
        "",
        "| plan | layers by format | top-1 | cycles a frame | frames/s | x int8 | LUTs | of int8's | DSP | BRAM |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in plans:
        formats = ", ".join(f"{n} {f}" for f, n in sorted(p.bits.items()))
        t = p.taken
        lines.append(
            f"| {p.name} | {formats} | {p.metric:.4f} | {t.cycles} | {p.fps:.0f} | {p.fps / base.fps:.2f} "
            f"| {_cell(p, 'luts')} | {t.luts / lean.taken.luts:.0%} | {_cell(p, 'dsps')} | {_cell(p, 'brams')} |"
        )
    return "\n".join(lines)


def _cell(plan: Plan, kind: str) -> str:
    predicted = getattr(plan.taken, kind)
    if plan.counted is None:
        return f"{predicted:.0f}"
    counted = plan.counted[kind]
    off = f" ({predicted / counted - 1:+.1%})" if counted else ""
    return f"{predicted:.0f}, yosys {counted:.0f}{off}"


def rivals() -> str:
    """Return the submissions to MLPerf Tiny beside which the image classifier stands."""
    lines = [
        "| submission to MLPerf Tiny v0.7 | device | frames/s | ms | top-1 |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {n} | {d} | {f} | {1e3 / f:.2f} | {a:.3f} |" for n, d, f, a in RIVALS]
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--target", default="ecp5-85f")
    parser.add_argument(
        "--synth", action="store_true", help="count the cells of every plan by yosys, too (hours)"
    )
    parser.add_argument("--out", type=Path, default=Path("fpga_allocation"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.models:
        shop = Workshop(model_named(name), asked.target, asked.out / "cache", synth=asked.synth)
        exact, plans = rows_of(shop)
        print(table(shop, exact, plans), flush=True)
        record = [{**vars(p), "taken": vars(p.taken)} for p in plans]
        (asked.out / f"{name}-{asked.target}.json").write_text(json.dumps(record, indent=1))
    print(rivals())


if __name__ == "__main__":
    main()
