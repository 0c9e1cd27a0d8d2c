"""Functions of one float32 vector as polynomials: a few roundings off, and no call of a library.

Arguments are variables (``vectors.keep``): each is used many times.
"""

from __future__ import annotations

from math import log2, sqrt

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.float.vectors import keep, multiply_add, number, polynomial
from bitwright.compiler.lower.templates.scaffold import Expr, splat, vector_type

# exp: x = n ln 2 + r with |r| <= ln 2 / 2; a polynomial of r (Cephes) times 2^n. Beyond the bounds the
# result would be no normal number.
EXP_LOWEST, EXP_HIGHEST = -87.33654, 88.37626
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# erf and tanh: quotients of polynomials (Eigen); beyond the bounds they are 1 to the last bit.
ERF_BOUND = 4.0
ERF_ODD = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
ERF_EVEN = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
TANH_BOUND = 7.90531110763549805
TANH_ODD = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
TANH_EVEN = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
GELU_TANH_CUBIC, GELU_TANH_LINEAR = 0.044715, 0.7978845608028654


def exp(x: Expr, lanes: int) -> Expr:
    """Return e^x; results below the smallest normal number become 0.

    Denormal numbers would make whatever multiplies them a hundred times slower: what a mask hides in a Softmax.
    """
    argument = keep(x)
    x = keep(between(argument, EXP_LOWEST, EXP_HIGHEST, lanes))
    n = keep(T.nearbyint(x * number(log2(2.718281828459045), lanes)))
    r = multiply_add(n, number(-LN2_LOW, lanes), multiply_add(n, number(-LN2_HIGH, lanes), x, lanes), lanes)
    r = keep(r)
    power = multiply_add(polynomial(r, EXP, lanes), r * r, r + number(1, lanes), lanes)
    exponent = (T.cast(n, vector_type("int32", lanes)) + splat(T.int32(127), lanes)) << splat(
        T.int32(23), lanes
    )
    result = power * T.reinterpret(exponent, dtype=vector_type("float32", lanes))
    return tirx.Select(argument < number(EXP_LOWEST, lanes), number(0, lanes), result)


def between(x: Expr, low: float, high: float, lanes: int) -> Expr:
    """Clip."""
    return T.max(T.min(x, number(high, lanes)), number(low, lanes))


def sigmoid(x: Expr, lanes: int) -> Expr:
    """Return 1 / (1 + e^-x)."""
    return number(1, lanes) / (number(1, lanes) + exp(-x, lanes))


def silu(x: Expr, lanes: int) -> Expr:
    """Return x / (1 + e^-x)."""
    return x / (number(1, lanes) + exp(-x, lanes))


def erf(x: Expr, lanes: int) -> Expr:
    """Return the error function."""
    return _odd_quotient(x, ERF_BOUND, ERF_ODD, ERF_EVEN, lanes)


def tanh(x: Expr, lanes: int) -> Expr:
    """Return the hyperbolic tangent."""
    return _odd_quotient(x, TANH_BOUND, TANH_ODD, TANH_EVEN, lanes)


def _odd_quotient(x: Expr, bound: float, odd: tuple[float, ...], even: tuple[float, ...], lanes: int) -> Expr:
    x = keep(between(x, -bound, bound, lanes))
    square = keep(x * x)
    return x * polynomial(square, odd, lanes) / polynomial(square, even, lanes)


def gelu(x: Expr, lanes: int) -> Expr:
    """Return x times the normal distribution's cumulative probability."""
    probability = number(0.5, lanes) * erf(keep(x * number(sqrt(0.5), lanes)), lanes)
    return x * (number(0.5, lanes) + probability)


def gelu_tanh(x: Expr, lanes: int) -> Expr:
    """Return Gelu in its approximation by a tangent."""
    inner = x * multiply_add(
        number(GELU_TANH_CUBIC * GELU_TANH_LINEAR, lanes), x * x, number(GELU_TANH_LINEAR, lanes), lanes
    )
    half = number(0.5, lanes) * x
    return multiply_add(half, tanh(keep(inner), lanes), half, lanes)
