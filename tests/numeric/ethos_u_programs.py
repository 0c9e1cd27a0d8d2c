"""Small integer programs with one operator of interest, for the file writer and the reference kernels."""

from __future__ import annotations

import numpy as np

from bitwright.compiler.program.ops import (
    Dequantize,
    Move,
    Program,
    QAdd,
    QConcat,
    QConv,
    QGemm,
    QLut,
    QMul,
    QPool,
    Quantize,
    QuantParams,
    Step,
    Tensor,
)

Rng = np.random.Generator


def params(rng: Rng, low: float = 0.004, high: float = 0.2) -> QuantParams:
    """Random parameters; one in four has the zero point of a Relu."""
    zero = -128 if rng.random() < 0.25 else int(rng.integers(-100, 100))
    return QuantParams("int8", float(np.float32(np.exp(rng.uniform(np.log(low), np.log(high))))), zero)


def program(
    steps: list[Step], tensors: list[Tensor], constants: dict[str, np.ndarray] | None = None
) -> Program:
    """Put a float edge before the first step's input and behind the last step's output."""
    known = {t.name: t for t in tensors}
    written = {s.outputs[0] for s in steps}
    constants = constants or {}
    entries = [t for t in tensors if t.name not in written and t.name not in constants]
    edges: list[Step] = [
        Quantize(name=f"q_{t.name}", inputs=(f"{t.name}_f",), outputs=(t.name,)) for t in entries
    ]
    known |= {f"{t.name}_f": Tensor(f"{t.name}_f", t.shape, "float32") for t in entries}
    last = known[steps[-1].outputs[0]]
    known["result"] = Tensor("result", last.shape, "float32")
    end = Dequantize(name="end", inputs=(last.name,), outputs=("result",))
    inputs = tuple(f"{t.name}_f" for t in entries)
    return Program(inputs, ("result",), (*edges, *steps, end), known, constants)


def _bounds(rng: Rng, y: QuantParams) -> tuple[int, int]:
    """No activation, a Relu, a Relu6, or bounds that no activation has."""
    six = min(127, y.zero_point + int(np.floor(6 / np.float32(y.scale) + 0.5)))
    return [(-128, 127), (y.zero_point, 127), (y.zero_point, six), (-90, 70)][rng.integers(4)]


def conv(rng: Rng) -> Program:
    """A convolution: depthwise or not, strides, dilation, any padding."""
    depthwise = rng.random() < 0.4
    cin = int(rng.integers(2, 9))
    cout = cin * int(rng.integers(1, 3)) if depthwise else int(rng.integers(1, 12))
    kernel = tuple(int(k) for k in rng.integers(1, 5, 2))
    strides = tuple(int(k) for k in rng.integers(1, 4, 2))
    dilations = (1, 1) if max(strides) > 1 else tuple(int(k) for k in rng.integers(1, 3, 2))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    image = [int(rng.integers(r, r + 9)) for r in reach]
    if rng.random() < 0.4:  # TensorFlow's SAME
        total = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(image, strides, reach, strict=True)]
        pads = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    else:
        pads = tuple(int(p) for p in rng.integers(0, 3, 4))
    size = [(image[a] + pads[a] + pads[a + 2] - reach[a]) // strides[a] + 1 for a in (0, 1)]
    x, y = params(rng), params(rng, 0.05, 0.5)
    lower, upper = _bounds(rng, y)
    step = QConv(
        name="conv",
        inputs=("x",),
        outputs=("y",),
        weight=rng.integers(-127, 128, (cout, 1 if depthwise else cin, *kernel)).astype(np.int8),
        weight_scale=np.exp(rng.uniform(-7, -4, cout)).astype(np.float32),
        bias=rng.integers(-2000, 2000, cout).astype(np.int32),
        lower=lower,
        upper=upper,
        strides=strides,  # type: ignore[arg-type]
        pads=pads,  # type: ignore[arg-type]
        dilations=dilations,  # type: ignore[arg-type]
        group=cin if depthwise else 1,
    )
    shapes = [("x", (1, cin, *image), x), ("y", (1, cout, *size), y)]
    return program([step], [Tensor(n, s, "int8", q) for n, s, q in shapes])


def gemm(rng: Rng) -> Program:
    """A fully connected layer on a matrix, or on an image that is flattened before."""
    image = (1, *(int(n) for n in rng.integers(1, 5, 3)))
    flat = rng.random() < 0.5
    rows = 1 if flat else int(rng.integers(1, 4))
    depth = int(np.prod(image)) if flat else int(rng.integers(1, 40))
    width = int(rng.integers(1, 20))
    x, y = params(rng), params(rng, 0.05, 0.5)
    lower, upper = _bounds(rng, y)
    scale = np.exp(rng.uniform(-7, -4, width)).astype(np.float32)
    step = QGemm(
        name="gemm",
        inputs=("rows",),
        outputs=("y",),
        weight=rng.integers(-127, 128, (depth, width)).astype(np.int8),
        weight_scale=scale,
        bias=rng.integers(-2000, 2000, width).astype(np.int32),
        lower=lower,
        upper=upper,
    )
    tensors = [Tensor("rows", (rows, depth), "int8", x), Tensor("y", (rows, width), "int8", y)]
    if not flat:
        return program([step], tensors)
    pool = QPool(name="pool", inputs=("x",), outputs=("image",), kind="max", kernel=(1, 1))
    move = Move(name="flatten", inputs=("image",), outputs=("rows",), kind="reshape")
    tensors += [Tensor("x", image, "int8", x), Tensor("image", image, "int8", x)]
    return program([pool, move, step], tensors)


def _pair(rng: Rng) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes that broadcast: equal, one value a channel, or fewer axes."""
    a = (1, *(int(n) for n in rng.integers(1, 6, 3)))
    return a, [a, (1, a[1], 1, 1), (a[3],), (1, 1, a[2], a[3])][rng.integers(4)]


def add(rng: Rng) -> Program:
    """A sum; one operand may be a constant."""
    return _two(rng, QAdd)


def mul(rng: Rng) -> Program:
    """A product; one operand may be a constant."""
    return _two(rng, QMul)


def _two(rng: Rng, kind: type[QAdd] | type[QMul]) -> Program:
    a, b = _pair(rng)
    y = params(rng, 0.02, 0.5)
    lower, upper = _bounds(rng, y)
    step = kind(name="op", inputs=("a", "b"), outputs=("y",), lower=lower, upper=upper)
    tensors = [Tensor("a", a, "int8", params(rng)), Tensor("b", b, "int8", params(rng))]
    constants = {"b": rng.integers(-128, 128, b).astype(np.int8)} if rng.random() < 0.3 else {}
    return program([step], [*tensors, Tensor("y", np.broadcast_shapes(a, b), "int8", y)], constants)


def pool(rng: Rng) -> Program:
    """Maximum or average, with or without padding."""
    kind = "max" if rng.random() < 0.5 else "average"
    kernel = tuple(int(k) for k in rng.integers(1, 5, 2))
    strides = tuple(int(k) for k in rng.integers(1, 4, 2))
    image = [int(rng.integers(k + 1, k + 8)) for k in kernel]
    quant = params(rng)
    include, pads = False, (0, 0, 0, 0)
    style = rng.integers(3)
    if style == 1:
        total = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(image, strides, kernel, strict=True)]
        pads = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    elif style == 2 and kind == "average":
        include, pads = True, tuple(int(rng.integers(0, k)) for k in (*kernel, *kernel))  # type: ignore[assignment]
    size = [(image[a] + pads[a] + pads[a + 2] - kernel[a]) // strides[a] + 1 for a in (0, 1)]
    step = QPool(
        name="pool",
        inputs=("x",),
        outputs=("y",),
        kind=kind,
        kernel=kernel,  # type: ignore[arg-type]
        strides=strides,  # type: ignore[arg-type]
        pads=pads,
        count_include_pad=include,
    )
    channels = int(rng.integers(1, 6))
    # Averages may have a scale of their own.
    written = (
        params(rng, 0.5 * quant.scale, quant.scale) if kind == "average" and rng.random() < 0.6 else quant
    )
    shapes = [("x", (1, channels, *image), quant), ("y", (1, channels, *size), written)]
    return program([step], [Tensor(n, s, "int8", q) for n, s, q in shapes])


def moves(rng: Rng) -> Program:
    """A transposition, a slice, padding and a reshape behind each other; then joined with themselves."""
    shape = (1, *(int(n) for n in rng.integers(2, 6, 3)))
    quant = params(rng)
    perm = (0, *(1 + int(k) for k in rng.permutation(3)))
    turned = tuple(shape[k] for k in perm)
    starts = (0, *(int(rng.integers(0, n)) for n in turned[1:]))
    cut = (1, *(int(rng.integers(1, n - s + 1)) for n, s in zip(turned[1:], starts[1:], strict=True)))
    pads = (0, *(int(k) for k in rng.integers(0, 3, 3)), 0, *(int(k) for k in rng.integers(0, 3, 3)))
    padded = tuple(cut[k] + pads[k] + pads[k + 4] for k in range(4))
    axis = int(rng.integers(1, 4))
    joined = tuple(2 * n if k == axis else n for k, n in enumerate(padded))
    rows = (1, int(np.prod(joined)))
    steps: list[Step] = [
        Move(name="turn", inputs=("x",), outputs=("a",), kind="transpose", perm=perm),
        Move(name="cut", inputs=("a",), outputs=("b",), kind="slice", starts=starts, steps=(1, 1, 1, 1)),
        Move(name="pad", inputs=("b",), outputs=("c",), kind="pad", pads=pads, fill=quant.zero_point),
        QConcat(name="join", inputs=("c", "c"), outputs=("d",), axis=axis),
        Move(name="flat", inputs=("d",), outputs=("e",), kind="reshape"),
    ]
    shapes = dict(zip("xabcde", (shape, turned, cut, padded, joined, rows), strict=True))
    return program(steps, [Tensor(n, s, "int8", quant) for n, s in shapes.items()])


def resize(rng: Rng) -> Program:
    """Nearest-neighbour resizing by whole factors."""
    shape = (1, *(int(n) for n in rng.integers(1, 5, 3)))
    factors = (1, 1, *(int(k) for k in rng.integers(1, 4, 2)))
    size = tuple(n * k for n, k in zip(shape, factors, strict=True))
    indices = tuple(np.arange(n) // k for n, k in zip(size, factors, strict=True))
    quant = params(rng)
    step = Move(name="resize", inputs=("x",), outputs=("y",), kind="resize_nearest", indices=indices)
    return program([step], [Tensor("x", shape, "int8", quant), Tensor("y", size, "int8", quant)])


def lut(rng: Rng) -> Program:
    """A function of one tensor, as the table that the front makes of it."""
    from bitwright.compiler.program.affine import all_integers, dequantize, quantize

    functions = {
        "Sigmoid": (lambda v: 1 / (1 + np.exp(-v)), QuantParams("int8", 1 / 256, -128)),
        "Tanh": (np.tanh, QuantParams("int8", 1 / 128, 0)),
        "Relu": (lambda v: np.maximum(v, 0), None),
        "HardSwish": (lambda v: v * np.clip(v / 6 + 0.5, 0, 1), None),
        "requantize": (lambda v: v, None),
    }
    name = list(functions)[rng.integers(len(functions))]
    function, prescribed = functions[name]
    x = params(rng, 0.02, 0.1)
    y = prescribed or QuantParams(
        "int8", float(np.float32(x.scale * rng.uniform(0.6, 1.2))), int(rng.integers(-128, 0))
    )
    values = np.asarray(function(dequantize(all_integers(x), x).astype(np.float64)), np.float32)
    step = QLut(name="lut", inputs=("x",), outputs=("y",), table=quantize(values, y), function=name)
    shape = (1, *(int(n) for n in rng.integers(1, 6, 3)))
    return program([step], [Tensor("x", shape, "int8", x), Tensor("y", shape, "int8", y)])
