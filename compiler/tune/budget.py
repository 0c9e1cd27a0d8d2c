"""How much tuning may cost: ``60s``, ``5m``, ``200`` trials, or ``off``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bitwright.compiler.errors import UsageError

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_FORM = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_LIMIT = 10_000_000


@dataclass(frozen=True)
class TuneBudget:
    """Upper bounds; tuning ends earlier where the search expects no more gain.

    Attributes:
        seconds: Wall seconds, or None for no bound.
        trials: Kernels measured, or None for no bound.
    """

    seconds: float | None = None
    trials: int | None = None

    @property
    def off(self) -> bool:
        """Nothing may be measured: only records that are there already are used."""
        return self.trials == 0

    def spent(self, seconds: float, trials: int) -> bool:
        """Tell whether no further trial may begin."""
        late = self.seconds is not None and seconds >= self.seconds
        return late or (self.trials is not None and trials >= self.trials)


OFF = TuneBudget(trials=0)


def parse_budget(text: str) -> TuneBudget:
    """Return a budget from ``off``, a number of trials, or a time with the unit s, m or h.

    Raises:
        UsageError: It is none of these.
    """
    if text == "off":
        return OFF
    found = _FORM.fullmatch(text.strip())
    fix = "write 200 (trials), 60s, 5m, or off"
    if found is None or not text.isascii():
        what = f"'{text}' is no budget"
        raise UsageError(what, where="--tune", fix=fix)
    number, unit = found[1], found[2]
    if unit and unit not in _SECONDS:
        what = f"unknown unit '{unit}' in '{text}'"
        raise UsageError(what, where="--tune", fix=fix)
    amount = float(number) * _SECONDS.get(unit, 1.0)
    if not 0 < amount <= _LIMIT:
        what = f"'{text}' is not between 0 and {_LIMIT}"
        raise UsageError(what, where="--tune", fix=fix)
    if unit:
        return TuneBudget(seconds=amount)
    if "." in number:
        what = f"'{text}' is not a whole number of trials"
        raise UsageError(what, where="--tune", fix=fix)
    return TuneBudget(trials=int(number))
