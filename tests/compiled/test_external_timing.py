"""Several boards at once, some of which fail; scripted boards, no kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bitwright.compiler.errors import ToolchainError
from bitwright.compiler.tune.external import ExternalMeasurer
from bitwright.compiler.tune.kernels import Batch, Candidate
from bitwright.targets.backend import KernelChoice


@dataclass
class Board:
    broken: bool = False
    executed: str = "remote"
    hardware: str = "board scripted"
    ran: list[str] = field(default_factory=list)

    def run(self, library, symbol, arguments):
        self.ran.append(symbol)
        if self.broken or symbol == "k3":
            raise ToolchainError("the connection was lost")
        return (2.0 if symbol == "k0" else 1.0), np.full(4, symbol == "k2", np.uint8)


BENCH = SimpleNamespace(arguments=lambda kernel: [], library=lambda batch, folder: Path(folder, "k.so"))


def measure(*boards: Board) -> dict[str, object]:
    candidates = tuple(Candidate(KernelChoice("t", "i", (("n", k),)), f"k{k}", None) for k in range(6))
    timings = ExternalMeasurer(boards).measure(
        BENCH, Batch(candidates, {}, None), rounds=1, announce=lambda _: None
    )
    return {f"k{dict(t.choice.params)['n']}": t for t in timings}


def test_every_candidate_is_compared_with_the_default_on_its_own_board():
    boards = [Board(), Board()]
    found = measure(*boards)
    assert [found[k].status for k in sorted(found)] == ["ok", "ok", "wrong", "crashed", "ok", "ok"]
    assert (found["k1"].seconds, found["k1"].default_s) == (1.0, 2.0)
    assert sum(len(b.ran) for b in boards) == 1 + 2 * 5


def test_a_model_runs_the_default_once():
    model = Board(executed="modelled")
    measure(model)
    assert model.ran.count("k0") == 1


def test_a_board_that_fails_is_left_out_and_costs_no_candidate():
    good, bad = Board(), Board(broken=True)
    assert measure(bad, good)["k1"].status == "ok"
    assert measure(good, bad)["k5"].status == "ok"
    assert set(bad.ran) == {"k0"}


def test_without_a_board_that_works_nothing_is_blamed_on_the_candidates():
    with pytest.raises(ToolchainError, match="connection was lost"):
        measure(Board(broken=True), Board(broken=True))
