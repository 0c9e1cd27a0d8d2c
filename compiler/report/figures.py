"""Figures as people read them: bytes, seconds, counts and ratios in a fixed, short form."""

from __future__ import annotations

DASH = "\N{EN DASH}"


def size_text(count: float) -> str:
    """Return bytes with a decimal prefix, e.g. ``83.3 kB``."""
    return _prefixed(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def seconds_text(seconds: float | None) -> str:
    """Return a time with the prefix that suits it, e.g. ``4.5 \N{MICRO SIGN}s``."""
    if seconds is None:
        return DASH
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} \N{MICRO SIGN}s" if seconds else "0"


def count_text(count: float) -> str:
    """Return a count with a prefix, e.g. ``12.5 M``."""
    return _prefixed(count, (("G", 1e9), ("M", 1e6), ("k", 1e3)), "")


def _prefixed(count: float, units: tuple[tuple[str, float], ...], base: str) -> str:
    for unit, scale in units:
        if count >= scale * 0.9995:
            value = count / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} {base}".rstrip()


def share_text(share: float) -> str:
    """Return a share in percent, never rounded up to 100 % or down to 0 %."""
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    if 0 < share < 0.0005:
        return "< 0.1 %"
    text = f"{share * 100:.1f}"
    return f"{text.removesuffix('.0')} %"


def number_text(value: float | None, digits: int = 4) -> str:
    """Return a real number with a few significant digits."""
    return DASH if value is None else f"{value:.{digits}g}"


def decibel_text(value: float | None) -> str:
    """Return a ratio in decibel; 200 dB and more is what two equal tensors get."""
    if value is None:
        return DASH
    return "exact" if value >= 200 else f"{value:.1f} dB"


def gain_text(value: float) -> str:
    """Return a gain in decibel with its sign."""
    return f"{round(value, 1) + 0.0:+.1f} dB"


def speed_text(ratio: float) -> str:
    """Return how many times as fast something is, given the ratio of the times (new over old)."""
    if ratio <= 0:
        return DASH
    return f"{1 / ratio:.2f}\N{MULTIPLICATION SIGN}"
