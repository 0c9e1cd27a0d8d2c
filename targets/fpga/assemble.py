"""From layers to a network: engines joined by streams, with converters, forks and FIFOs where they are needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil, lcm

from bitwright.compiler.errors import ProfileError, nearest
from bitwright.compiler.program.ops import Program
from bitwright.targets.fpga.engines.dot import MatrixVectorLayer
from bitwright.targets.fpga.names import identifier
from bitwright.targets.fpga.network import Engine, Folding, Layer, Network, Stream
from bitwright.targets.fpga.recognise import Circuit, recognise
from bitwright.targets.schema import Profile

WIDEST_LANES = 256
JOIN_SLACK = 64
JOINS = 2


def build_network(
    program: Program, profile: Profile, foldings: Mapping[str, Folding] | None = None
) -> Network:
    """Return the streaming network of a program.

    Args:
        program: The integer program.
        profile: Target.
        foldings: Folding by name of the layer; the smallest for those that are not named.

    Raises:
        PerformanceGateError: A step inside the network has no circuit.
        ProfileError: A folding is illegal, or names no layer.
    """
    return assemble(recognise(program, profile), program, foldings or {})


def assemble(circuit: Circuit, program: Program, foldings: Mapping[str, Folding]) -> Network:
    """Return the network of a circuit; arguments and errors as :func:`build_network`."""
    known = tuple(layer.name for layer in circuit.layers)
    for name in foldings:
        if name not in known:
            what = f"there is no layer '{name}' to fold"
            raise ProfileError(what, fix=nearest(name, known))
    chosen = {
        layer.name: layer.check(foldings[layer.name]) if layer.name in foldings else layer.legal_foldings()[0]
        for layer in circuit.layers
    }
    return _Assembly(circuit, program, chosen).network()


@dataclass
class _Assembly:
    """A network that is being put together."""

    circuit: Circuit
    program: Program
    foldings: Mapping[str, Folding]
    engines: list[Engine] = field(default_factory=list)
    streams: dict[str, Stream] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    # Tensor -> streams of it that nobody reads yet, one a reader.
    offered: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    # Tensor -> tensor before it -> most of a frame that the way between them can hold.
    held: dict[str, dict[str, float]] = field(default_factory=dict)

    def network(self) -> Network:
        source = self._source()
        self.held[self.circuit.source] = {self.circuit.source: 0.0}
        self._offer(self.circuit.source, source, "input")
        for layer in self.circuit.layers:
            self._add_layer(layer)
        (output,) = self.offered[self.circuit.result]
        return Network(
            tuple(self.engines), self.streams, source, output, self.circuit.layers, dict(self.foldings)
        )

    def _readers(self, tensor: str) -> int:
        inside = sum(layer.sources.count(tensor) for layer in self.circuit.layers)
        return inside + (tensor == self.circuit.result)

    def _source(self) -> str:
        """Return the stream that the host feeds, as wide as its first reader takes it."""
        tensor = self.program.tensor(self.circuit.source)
        first = next(layer for layer in self.circuit.layers if self.circuit.source in layer.sources)
        image = len(tensor.shape) == 4
        channels = tensor.shape[1] if image else tensor.shape[-1]
        elements = 1
        for size in tensor.shape:
            elements *= size
        lanes = first.input_lanes(self.foldings[first.name])
        return self._stream("from_host", tensor.name, elements // channels, channels, lanes, 8)

    def _stream(self, name: str, tensor: str, positions: int, channels: int, lanes: int, bits: int) -> str:
        own = self._name(name)
        self.streams[own] = Stream(own, tensor, positions, channels, lanes, bits)
        return own

    def _name(self, wanted: str) -> str:
        word, number = identifier(wanted), 1
        while word in self.taken:
            number += 1
            word = f"{identifier(wanted)}_{number}"
        self.taken.add(word)
        return word

    def _add_layer(self, layer: Layer) -> None:
        folding = self.foldings[layer.name]
        engines = layer.engines(folding)
        lanes = layer.input_lanes(folding)
        inputs = [self._taken(tensor, lanes, layer) for tensor in layer.sources]
        if len(inputs) == JOINS:
            inputs = [self._wait(name, k, layer) for k, name in enumerate(inputs)]
        elif isinstance(layer, MatrixVectorLayer) and layer.window is None:
            inputs = [self._whole_vector(inputs[0], layer, folding)]
        self._count_held(layer, engines)
        for engine in engines:
            last = engine is engines[-1]
            own = self._name(engine.name)
            first = self.streams[inputs[0]]
            # The windows of one layer are no tensor of the program.
            out = self._stream(
                f"{own}_out",
                layer.tensor if last else "",
                layer.positions
                if last
                else layer.positions * engine.parameters["KH"] * engine.parameters["KW"],
                layer.channels if last else first.channels,
                layer.output_lanes(folding) if last else lanes,
                layer.bits if last else 8,
            )
            self.engines.append(replace(engine, name=own, inputs=tuple(inputs), outputs=(out,)))
            inputs = [out]
        self._offer(layer.tensor, inputs[0], layer.node)

    def _offer(self, tensor: str, stream: str, node: str) -> None:
        """Make one stream for every reader of a tensor."""
        readers = self._readers(tensor)
        if readers == 1:
            self.offered[tensor].append(stream)
            return
        data = self.streams[stream]
        copies = [replace(data, name=self._name(f"{stream}_copy")) for _ in range(readers)]
        self.streams |= {copy.name: copy for copy in copies}
        self.engines.append(
            Engine(
                name=self._name(f"{stream}_fork"),
                node=node,
                module="stream_fork",
                parameters={"WIDTH": data.lanes * data.bits, "COUNT": readers},
                cycles=data.beats,
                inputs=(stream,),
                outputs=tuple(copy.name for copy in copies),
                note=f"{readers} readers",
            )
        )
        self.offered[tensor] += [copy.name for copy in copies]

    def _taken(self, tensor: str, lanes: int, layer: Layer) -> str:
        """Return the next unread stream of a tensor, as wide as a layer takes it."""
        name = self.offered[tensor].pop(0)
        data = self.streams[name]
        if data.lanes == lanes:
            return name
        wide = lcm(data.lanes, lanes)
        if wide > WIDEST_LANES or data.elements % wide:
            wide = 1 if data.lanes % lanes and lanes % data.lanes else max(data.lanes, lanes)
        for width in dict.fromkeys((wide, lanes)):
            name = self._convert(name, width, layer)
        return name

    def _convert(self, name: str, lanes: int, layer: Layer) -> str:
        data = self.streams[name]
        if data.lanes == lanes:
            return name
        widen = lanes > data.lanes
        ratio = lanes // data.lanes if widen else data.lanes // lanes
        out = self._stream(f"{name}_x{lanes}", data.tensor, data.positions, data.channels, lanes, data.bits)
        self.engines.append(
            Engine(
                name=self._name(f"{out}_width"),
                node=layer.node,
                module="stream_widen" if widen else "stream_narrow",
                parameters={"WIDTH": min(lanes, data.lanes) * data.bits, "RATIO": ratio},
                cycles=data.elements // min(lanes, data.lanes),
                capacity=max(lanes, data.lanes),
                inputs=(name,),
                outputs=(out,),
                note=f"{data.lanes} to {lanes} elements side by side",
            )
        )
        return out

    def _fifo(self, name: str, depth: int, layer: Layer, why: str) -> str:
        data = self.streams[name]
        out = self._name(f"{name}_waiting")
        self.streams[out] = replace(data, name=out)
        self.engines.append(
            Engine(
                name=self._name(f"{out}_fifo"),
                node=layer.node,
                module="stream_fifo",
                parameters={"WIDTH": data.lanes * data.bits, "DEPTH": depth},
                cycles=data.beats,
                capacity=depth * data.lanes,
                inputs=(name,),
                outputs=(out,),
                note=why,
            )
        )
        return out

    def _whole_vector(self, name: str, layer: MatrixVectorLayer, folding: Folding) -> str:
        """Let the layer before compute a vector while the last one is still in use."""
        if layer.outputs == folding.pe or name == next(iter(self.streams)):
            return name
        beats = layer.reduction // folding.simd
        return self._fifo(name, beats + 2, layer, "the next vector, while this one is multiplied")

    def _wait(self, name: str, number: int, layer: Layer) -> str:
        """Hold one operand of a join for as long as the other one may be under way."""
        mine, other = (self.held[layer.sources[k]] for k in (number, 1 - number))
        shared = [tensor for tensor in mine if tensor in other]
        longest = min((mine[tensor] + other[tensor], other[tensor]) for tensor in shared)[1]
        data = self.streams[name]
        depth = ceil(longest * data.elements / data.lanes) + -(-JOIN_SLACK // data.lanes)
        return self._fifo(name, depth, layer, "waits for the other operand")

    def _count_held(self, layer: Layer, engines: tuple[Engine, ...]) -> None:
        """Note for all tensors before a layer what the ways from them to its result can hold, as shares of a frame."""
        held: dict[str, float] = {}
        for tensor in layer.sources:
            shape = self.program.tensor(tensor).shape
            elements = 1
            for size in shape:
                elements *= size
            own = sum(min(engine.capacity, elements) for engine in engines) / elements
            for before, share in self.held[tensor].items():
                held[before] = max(held.get(before, 0.0), share + own)
        self.held[layer.tensor] = {**held, layer.tensor: 0.0}
