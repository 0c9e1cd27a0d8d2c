"""What is measured: models of the zoo at one size each, and layers of usual shapes with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from zoo import Feeds, model_named

SEED, SAMPLES = 0, 16


@dataclass(frozen=True)
class BenchModel:
    """One row of the table.

    Attributes:
        name: Of the row and of its files.
        what: What it is, for the table.
        dims: Sizes of dynamic dimensions.
        build: Writes the model into a folder if it must be made, and returns its path.
        samples: Calibration samples of that size.
    """

    name: str
    what: str
    build: Callable[[Path], Path]
    samples: Callable[[], Iterator[Feeds]]
    dims: Mapping[str, int] = field(default_factory=dict)


def _zoo(name: str, what: str, *, tokens: int = 0) -> BenchModel:
    model = model_named(name)

    def samples() -> Iterator[Feeds]:
        for sample, _ in zip(model.samples(), range(32), strict=False):
            yield {k: np.resize(v, (1, tokens)) for k, v in sample.items()} if tokens else sample

    return BenchModel(
        f"{name}-{tokens}" if tokens else name,
        f"{what}, {tokens} tokens" if tokens else what,
        lambda _: model.path,
        samples,
        {"N": 1, "T": tokens} if tokens else {},
    )


def _made(name: str, what: str, text: str, shapes: Mapping[str, tuple[int, ...]]) -> BenchModel:
    """Return a model given as ONNX text; ``shapes`` are those of its weights, in order, without the input ``x``."""
    proto = onnx.parser.parse_model(text)
    (x,) = proto.graph.input
    size = tuple(d.dim_value for d in x.type.tensor_type.shape.dim)

    def build(folder: Path) -> Path:
        random = np.random.default_rng(SEED)
        whole = onnx.parser.parse_model(text)
        for weight, shape in shapes.items():
            # Weights of this spread keep the variance of what flows through.
            spread = (
                0.1
                if len(shape) == 1
                else float(np.prod(shape[1:] if len(shape) == 4 else shape[:1])) ** -0.5
            )
            array = random.normal(0, spread, shape).astype(np.float32)
            whole.graph.initializer.append(onnx.numpy_helper.from_array(array, weight))
        onnx.save(whole, folder / "model.onnx")
        return folder / "model.onnx"

    def samples() -> Iterator[Feeds]:
        random = np.random.default_rng(SEED + 1)
        return ({"x": random.normal(size=size).astype(np.float32)} for _ in range(SAMPLES))

    return BenchModel(name, what, build, samples)


def _graph(x: str, y: str, lines: list[str]) -> str:
    body = "\n  ".join(lines)
    return (
        f'<ir_version: 8, opset_import: ["" : 17]>\nlayers (float[{x}] x) => (float[{y}] y)\n{{\n  {body}\n}}'
    )


def _mlp(rows: int) -> BenchModel:
    lines = ["h = Gemm(x, up, up_bias)", "r = Relu(h)", "y = Gemm(r, down, down_bias)"]
    shapes = {"up": (384, 1536), "up_bias": (1536,), "down": (1536, 384), "down_bias": (384,)}
    return _made(
        f"mlp-{rows}", f"384 to 1536 to 384, M={rows}", _graph(f"{rows},384", f"{rows},384", lines), shapes
    )


def _conv(size: int, channels: int) -> BenchModel:
    """Return two 3x3 convolutions, a residual Add behind the second."""
    lines = [
        "a = Conv<pads=[1,1,1,1]>(x, w1, b1)",
        "r = Relu(a)",
        "b = Conv<pads=[1,1,1,1]>(r, w2, b2)",
        "s = Add(b, x)",
        "y = Relu(s)",
    ]
    shape, kernel = f"1,{channels},{size},{size}", (channels, channels, 3, 3)
    shapes = {"w1": kernel, "b1": (channels,), "w2": kernel, "b2": (channels,)}
    what = f"two 3x3, {channels} channels at {size}x{size}"
    return _made(f"conv{size}", what, _graph(shape, shape, lines), shapes)


def _pointwise() -> BenchModel:
    lines = ["a = Conv(x, w1, b1)", "r = Relu(a)", "y = Conv(r, w2, b2)"]
    shapes = {"w1": (128, 256, 1, 1), "b1": (128,), "w2": (256, 128, 1, 1), "b2": (256,)}
    text = _graph("1,256,28,28", "1,256,28,28", lines)
    return _made("conv1x1", "two 1x1, 256 to 128 to 256 at 28x28", text, shapes)


def _depthwise() -> BenchModel:
    lines = ["a = Conv<pads=[1,1,1,1], group=256>(x, w1, b1)", "r = Relu(a)", "y = Conv(r, w2, b2)"]
    shapes = {"w1": (256, 1, 3, 3), "b1": (256,), "w2": (256, 256, 1, 1), "b2": (256,)}
    text = _graph("1,256,28,28", "1,256,28,28", lines)
    return _made("dw28", "3x3 depthwise and 1x1, 256 channels at 28x28", text, shapes)


def _deep() -> BenchModel:
    """Return a 1x1, eight 3x3 with a residual Add behind every second, a 1x1."""
    lines = ["e = Conv(x, w_in, b_in)", "r0 = Relu(e)"]
    shapes: dict[str, tuple[int, ...]] = {"w_in": (128, 256, 1, 1), "b_in": (128,)}
    for k in range(1, 9):
        shapes |= {f"w{k}": (128, 128, 3, 3), f"b{k}": (128,)}
        lines.append(f"c{k} = Conv<pads=[1,1,1,1]>(r{k - 1}, w{k}, b{k})")
        lines += (
            [f"s{k} = Add(c{k}, r{k - 2})", f"r{k} = Relu(s{k})"] if k % 2 == 0 else [f"r{k} = Relu(c{k})"]
        )
    lines.append("y = Conv(r8, w_out, b_out)")
    shapes |= {"w_out": (256, 128, 1, 1), "b_out": (256,)}
    text = _graph("1,256,28,28", "1,256,28,28", lines)
    return _made("deep28", "1x1, eight 3x3 with residuals, 1x1, 128 channels at 28x28", text, shapes)


MODELS: tuple[BenchModel, ...] = (
    _zoo("kws_dscnn", "keyword spotting"),
    _zoo("resnet8_cifar10", "image classification"),
    _zoo("vww_mobilenet", "visual wake words"),
    _zoo("ad_autoencoder", "anomaly detection"),
    _zoo("minilm_l6", "sentence embedding", tokens=32),
    _zoo("minilm_l6", "sentence embedding", tokens=128),
    _zoo("ppocr_rec", "text recognition"),
    *(_mlp(rows) for rows in (1, 16, 128, 1024)),
    _conv(56, 64),
    _conv(28, 128),
    _conv(14, 256),
    _pointwise(),
    _depthwise(),
    _deep(),
)


def models_named(names: list[str]) -> list[BenchModel]:
    """Return models in the order of the table.

    Raises:
        SystemExit: A name is not known.
    """
    known = [m.name for m in MODELS]
    unknown = [n for n in names if n not in known]
    if unknown:
        msg = f"unknown model '{unknown[0]}'; known: {', '.join(known)}"
        raise SystemExit(msg)
    return [m for m in MODELS if m.name in names]
