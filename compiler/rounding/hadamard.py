"""Orthogonal matrices that spread one large element over all: Hadamard matrices of many orders, with random signs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def spreading_matrix(order: int, seed: int) -> Float64:
    """Return an orthogonal matrix whose entries all have one magnitude where such a matrix is known.

    That is a Hadamard matrix with random signs of its rows, divided by ``sqrt(order)`` (Ashkboos et al. 2024, "QuaRot",
    section 3); of other orders a random orthogonal matrix, uniformly distributed.

    Args:
        order: Rows and columns, at least 1.
        seed: Of the signs, or of the random matrix.

    Returns:
        Q with ``Q Q^T = 1``, float64, shape (order, order).
    """
    generator = np.random.default_rng(seed)
    known = hadamard(order)
    if known is not None:
        signs = generator.choice([-1.0, 1.0], order)
        spread: Float64 = signs[:, None] * known / np.sqrt(order)
        return spread
    q, r = np.linalg.qr(generator.standard_normal((order, order)))
    found: Float64 = q * np.sign(np.diagonal(r))
    return found


def hadamard(order: int) -> Float64 | None:
    """Return a Hadamard matrix (entries 1 and -1, ``H H^T = order``), None where these constructions give none.

    A small matrix of Paley's (order q + 1, or 2 q + 2, for a prime q), doubled as often as needed (Sylvester): all
    multiples of 4 up to 32, and the widths of most language models (192, 576, 896, 960, 1536, 2048, ...).
    """
    doublings = 0
    while True:
        small = _smallest(order)
        if small is not None:
            break
        if order % 2:
            return None
        order, doublings = order // 2, doublings + 1
    for _ in range(doublings):
        small = np.block([[small, small], [small, -small]])
    return small


def _smallest(order: int) -> Float64 | None:
    """Return a matrix of an order that is not made of a smaller one."""
    if order == 1:
        return np.ones((1, 1))
    if order % 4 or order & (order - 1) == 0:
        return None
    # Half the order first: the less of a matrix is irregular, the better; a large prime is the last resort.
    if order % 8 == 0 and hadamard(order // 2) is not None:
        return None
    if _is_prime(order - 1):
        return _paley(order - 1)
    half = order // 2 - 1
    return _paley_symmetric(half) if half % 4 == 1 and _is_prime(half) else None


def _residues(prime: int) -> Float64:
    """Return Jacobsthal's matrix: 1 where the difference of row and column is a square, else -1, and 0."""
    kind = -np.ones(prime)
    kind[np.arange(1, prime) ** 2 % prime] = 1
    kind[0] = 0
    places = np.arange(prime)
    found: Float64 = kind[(places[:, None] - places) % prime]
    return found


def _bordered(prime: int, sign: float) -> Float64:
    found = np.zeros((prime + 1, prime + 1))
    found[0, 1:], found[1:, 0], found[1:, 1:] = 1, sign, _residues(prime)
    return found


def _paley(prime: int) -> Float64:
    """Return Paley's first construction, for a prime of 3 modulo 4."""
    return np.eye(prime + 1) + _bordered(prime, -1.0)


def _paley_symmetric(prime: int) -> Float64:
    """Return Paley's second construction, for a prime of 1 modulo 4: order ``2 prime + 2``."""
    core, identity = _bordered(prime, 1.0), np.eye(prime + 1)
    return np.kron(core, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(identity, [[1.0, -1.0], [-1.0, -1.0]])


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % k for k in range(2, int(number**0.5) + 1))
