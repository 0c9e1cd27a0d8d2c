"""Foldings of a network's layers and what each would take: what the allocator chooses from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path

import onnx_ir as ir

from bitwright.compiler.program.extract import extract_program
from bitwright.targets.folding import FoldedLayer, FoldingValues, Option, Taken
from bitwright.targets.fpga.assemble import build_network
from bitwright.targets.fpga.cells import Cells
from bitwright.targets.fpga.cost_model import predict, table_of
from bitwright.targets.fpga.cost_table import CostTable
from bitwright.targets.fpga.network import BINARY, TERNARY, Engine, Folding, Layer, WeightCode
from bitwright.targets.fpga.recognise import layers_of
from bitwright.targets.schema import Profile
from bitwright.targets.sections.fpga import FpgaDevice

CODES: Mapping[str, WeightCode] = {
    "int8": WeightCode("integer", 8),
    **{f"w{bits}a8": WeightCode("integer", bits) for bits in (6, 5, 4, 3, 2)},
    "ternary-a8": TERNARY,
    "binary-a8": BINARY,
}


class Folder:
    """Foldings of streaming networks."""

    def layers(
        self, model: ir.Model, profile: Profile, formats: Mapping[str, Sequence[str]]
    ) -> tuple[FoldedLayer, ...]:
        """See :meth:`bitwright.targets.folding.Folder.layers`."""
        table = table_of(device_of(profile))
        return tuple(
            FoldedLayer(layer.name, layer.node, tuple(_options(layer, formats.get(layer.node, ()), table)))
            for layer in layers_of(extract_program(model), profile)
        )

    def beside(self, model: ir.Model, profile: Profile, foldings: Mapping[str, FoldingValues]) -> Taken:
        """See :meth:`bitwright.targets.folding.Folder.beside`."""
        chosen = {name: as_folding(values) for name, values in foldings.items()}
        network = build_network(extract_program(model), profile, chosen)
        own = {(e.module, e.node) for layer in network.layers for e in layer.engines(chosen[layer.name])}
        between = [e for e in network.engines if (e.module, e.node) not in own]
        cells = total(between, table_of(device_of(profile)))
        return Taken(network.interval, cells.luts, cells.ffs, cells.dsps, cells.brams)

    def probe(
        self, profile: Profile, path: Path, progress: Callable[[int, int, str], None]
    ) -> tuple[str, ...]:
        """See :meth:`bitwright.targets.folding.Folder.probe`."""
        from bitwright.targets.fpga.probe import probe_series

        return probe_series(device_of(profile).series, path, progress)

    def available(self, profile: Profile) -> Mapping[str, float]:
        """See :meth:`bitwright.targets.folding.Folder.available`."""
        device = device_of(profile)
        names = ("luts", "ffs", "dsps", "brams")
        return {name: float(int(getattr(device, name) * device.utilisation)) for name in names}


def _options(layer: Layer, formats: Sequence[str], table: CostTable) -> Iterator[Option]:
    menu: list[tuple[str, WeightCode | None]] = [("", None)]
    if layer.weights and formats:
        menu = [(name, CODES[name]) for name in formats]
    for name, code in menu:
        for folding in layer.legal_foldings():
            engines = layer.engines(folding, code)
            cells = total(engines, table)
            taken = Taken(max(e.cycles for e in engines), cells.luts, cells.ffs, cells.dsps, cells.brams)
            yield Option(name, as_values(folding), taken)


def total(engines: Sequence[Engine], table: CostTable) -> Cells:
    """Return what engines are predicted to take together."""
    return reduce(Cells.__add__, (predict(engine, table) for engine in engines), Cells())


def as_values(folding: Folding) -> dict[str, int]:
    """Return a folding as plan.yaml holds it."""
    return {"pe": folding.pe, "simd": folding.simd, "dsp": int(folding.dsp)}


def as_folding(values: FoldingValues) -> Folding:
    """Return the folding that :func:`as_values` wrote."""
    return Folding(values.get("pe", 1), values.get("simd", 1), bool(values.get("dsp", 0)))


def device_of(profile: Profile) -> FpgaDevice:
    """Return the device of a profile of this family."""
    assert profile.fpga is not None, "the profile's check wants the section"
    return profile.fpga


FOLDER = Folder()
