"""Every error a user can meet, by cause; each cause has one documented exit code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


def printable(text: object) -> str:
    """Return text with control characters escaped, so that names from a model cannot drive a terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text)
    )


class BitwrightError(Exception):
    """Base of all errors that are shown to the user without a traceback.

    Attributes:
        where: File, node, tensor or option the rule was broken at, e.g. ``model.onnx: node 'conv1'``.
        what: The rule that was broken, as one sentence.
        fix: What the user can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = printable(what), printable(where), printable(fix)
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The whole message: ``where: what`` and, on a second line, the fix."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  fix: {self.fix}" if self.fix else head


class InternalError(BitwrightError):
    """A bug of ours: an invariant between two phases does not hold."""


class UsageError(BitwrightError):
    """An option or argument is wrong."""

    exit_code = 2


class ProfileError(BitwrightError):
    """A target profile breaks the schema or contradicts itself."""

    exit_code = 2


class ModelError(BitwrightError):
    """The model is invalid, too large for the budgets, or uses what no runtime here can execute."""

    exit_code = 3


class DataError(BitwrightError):
    """The calibration or evaluation data does not fit the model."""

    exit_code = 3


class InfeasibleBudgetError(BitwrightError):
    """No allocation meets the budgets, or the device has less memory than the model needs; what is near is said."""

    exit_code = 4


class AccuracyGateError(BitwrightError):
    """The quantized model loses more accuracy than the user allows."""

    exit_code = 5


class PerformanceGateError(BitwrightError):
    """The result is slower than float or covers less than the user demands."""

    exit_code = 6


class ToolchainError(BitwrightError):
    """An external tool is missing, crashed or timed out."""

    exit_code = 7


class VerificationError(BitwrightError):
    """The executed artifact differs from the reference interpreter."""

    exit_code = 8


def to_record(error: BitwrightError) -> dict[str, str]:
    """Return an error as JSON values, for the process that asked for the work."""
    kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ == __name__)
    return {"class": kind, "what": error.what, "where": error.where, "fix": error.fix}


def from_record(record: Mapping[str, str]) -> BitwrightError:
    """Return the error that another process reported, of the same class; what is none of these is a bug of ours."""
    kind = globals().get(record["class"])
    if not (isinstance(kind, type) and issubclass(kind, BitwrightError)):
        kind = InternalError
    found: BitwrightError = kind(record["what"], where=record["where"], fix=record["fix"])
    return found


SHOWN_NAMES = 12


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Return ``"did you mean 'x'?"`` for the closest known name, or the list of known names."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    shown = sorted(known)[:SHOWN_NAMES]
    more = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
    return f"known: {', '.join(shown)}{more}"
