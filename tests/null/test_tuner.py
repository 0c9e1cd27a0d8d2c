"""The tuner with a scripted clock: what it measures, what it remembers, and how it is interrupted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bitwright.compiler.errors import ToolchainError
from bitwright.compiler.program.workload import Workload
from bitwright.compiler.tune.budget import OFF, TuneBudget
from bitwright.compiler.tune.outcome import Tuning
from bitwright.compiler.tune.records import Key
from bitwright.compiler.tune.store import TuningStore
from bitwright.compiler.tune.timing import Timing
from bitwright.compiler.tune.tuner import Tuner
from bitwright.targets.backend import KernelChoice

BIG = Workload("big", ("a", "b"), "big")
SMALL = Workload("small", ("c",), "small")
TINY = Workload("tiny", ("d",), "tiny")
AMPLE = TuneBudget(trials=500)


def choice(number: int) -> KernelChoice:
    return KernelChoice("t", "i", (("n", number),))


@dataclass
class Clock:
    """Times by a table: workload -> seconds of every candidate, a status instead of a time that cannot be."""

    times: dict[str, list[float | str]]
    executed: str = "native"
    interrupt_after: int = 10**9
    lucky: dict[tuple[str, int], float] = field(default_factory=dict)
    opened: int = 0
    measured: list[tuple[str, int]] = field(default_factory=list)

    def __enter__(self) -> Clock:
        self.opened += 1
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def candidates(self, workload: str) -> tuple[KernelChoice, ...]:
        return tuple(map(choice, range(len(self.times[workload]))))

    def measure(self, workload: str, choices, rounds: int) -> list[Timing]:
        if len(self.measured) >= self.interrupt_after:
            raise KeyboardInterrupt
        self.measured += [(workload, dict(c.params)["n"]) for c in choices[len(choices) > 1 :]]
        return [self._timing(workload, c, rounds) for c in choices]

    def _timing(self, workload: str, one: KernelChoice, rounds: int) -> Timing:
        number = dict(one.params)["n"]
        found, default = self.times[workload][number], self.times[workload][0]
        if isinstance(found, str):
            return Timing(one, found, detail="scripted")
        if rounds < 20:  # a first look may be lucky, a second one is not
            found = self.lucky.get((workload, number), found)
        return Timing(one, "ok", found, default)


def flat(count: int, default: float = 1.0) -> list[float | str]:
    return [default, *[default * 1.1] * (count - 1)]


def run(clock: Clock, path: Path, budget: TuneBudget = AMPLE, **others) -> Tuning:
    workloads = [w for w in (BIG, SMALL, TINY) if w.key in clock.times]
    return Tuner(workloads, "f | cpu", TuningStore(path), budget, lambda: clock, **others).run()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "store.jsonl"


@pytest.fixture
def clock() -> Clock:
    times = {"big": flat(60), "small": flat(60), "tiny": flat(60, 0.001)}
    times["big"][7], times["small"][40] = 0.5, 0.4
    return Clock(times)


def test_the_fastest_kernel_is_found_and_used(clock, path):
    found = run(clock, path)
    kernel = found.kernels[0]
    assert (kernel.choice, kernel.ratio, kernel.source) == (choice(7), 0.5, "tuned")
    assert found.choices["big"] == choice(7)
    assert "tiny" not in found.choices
    assert 10 < found.trials < len(clock.measured)  # the second look at the leaders is no trial
    assert found.executed == "native"


def test_a_second_run_measures_nothing_and_does_not_even_start_the_child(clock, path):
    first = run(clock, path)
    again = Clock(clock.times)
    second = run(again, path)
    assert (again.opened, again.measured, second.trials) == (0, [], 0)
    assert second.choices == first.choices
    assert {k.source for k in second.kernels} <= {"record", "default"}


def test_a_workload_with_no_share_of_the_time_gets_no_trial(clock, path):
    run(clock, path)
    assert [n for name, n in clock.measured if name == "tiny"] == [0]


def test_such_a_workload_is_tuned_in_a_model_where_it_matters(clock, path):
    run(clock, path)
    alone = Clock({"tiny": clock.times["tiny"]})
    run(alone, path)
    assert len(alone.measured) > 8


def test_off_uses_records_and_measures_nothing(clock, path):
    assert run(clock, path, OFF).choices == {}
    assert not path.exists()
    run(clock, path)
    again = Clock(clock.times)
    assert run(again, path, OFF).choices["big"] == choice(7)
    assert again.opened == 0


@pytest.mark.parametrize("trials", [1, 5, 20])
def test_a_budget_of_trials_is_kept(trials, clock, path):
    assert run(clock, path, TuneBudget(trials=trials)).trials <= max(trials, 1)


def test_a_budget_of_seconds_that_is_over_lets_nothing_begin(clock, path):
    assert run(clock, path, TuneBudget(seconds=1e-9)).trials <= 1


def test_an_interrupted_run_keeps_what_it_found_and_goes_on_later(clock, path):
    clock.interrupt_after = 30
    first = run(clock, path)
    assert first.interrupted and "interrupted" in first.notes[-1]
    assert first.choices["big"] == choice(7)
    known = {(r.key.workload, dict(r.choice.params)["n"]) for r in _trials(path)}
    again = Clock(clock.times)
    run(again, path)
    searched = [one for one in again.measured if one not in {("big", 0), ("small", 0)}]
    repeated = [one for one in searched if one in known]
    # Only the second look at the leaders measures something again.
    assert len(repeated) <= 6


def _trials(path: Path):
    contents = TuningStore(path).read()
    return [r for k in contents.known.values() for r in k.trials.values()]


def test_a_search_that_a_budget_ended_goes_on_only_if_asked(clock, path):
    assert "goes on" in run(clock, path, TuneBudget(trials=12)).notes[-1]
    again = Clock({"big": clock.times["big"]})
    run(again, path)
    assert again.opened == 0
    run(again, path, resume=True)
    assert again.opened == 1


def test_kernels_that_are_wrong_or_crash_are_rejected_reported_and_not_tried_again(path):
    times = flat(30)
    times[2], times[3], times[4] = "wrong", "crashed", 0.8
    clock = Clock({"big": times})
    found = run(clock, path)
    assert found.choices == {"big": choice(4)}
    assert any("1 kernels computed other results" in note for note in found.notes)
    assert any("crashed" in note for note in found.notes)
    statuses = {dict(r.choice.params)["n"]: r.status for r in _trials(path)}
    assert (statuses[2], statuses[3]) == ("wrong", "crashed")
    again = Clock({"big": times})
    run(again, path, resume=True)
    assert ("big", 2) not in again.measured


def test_a_lucky_first_look_does_not_win(path):
    clock = Clock({"big": flat(30)}, lucky={("big", 5): 0.3})
    found = run(clock, path)
    assert found.choices == {}
    assert found.kernels[0].record is not None
    assert math.isclose(found.kernels[0].record.ratio, 1.0)


def test_a_gain_that_is_noise_is_no_reason_to_leave_the_default(path):
    times = flat(30)
    times[5] = 0.98
    assert run(Clock({"big": times}), path).choices == {}
    interrupted = Clock({"big": times}, interrupt_after=9)
    assert run(interrupted, path.with_name("other")).choices == {}


def test_records_of_other_hardware_are_not_used(clock, path):
    run(clock, path)
    other = Clock(clock.times)
    Tuner([BIG], "f | another cpu", TuningStore(path), TuneBudget(trials=9), lambda: other).run()
    assert other.opened == 1


def test_a_timer_that_cannot_work_says_so_and_the_store_stays(clock, path):
    class Broken(Clock):
        def __enter__(self):
            raise ToolchainError("no tracker answers")

    with pytest.raises(ToolchainError, match="no tracker"):
        run(Broken(clock.times), path)
    assert not path.exists()


def test_damaged_lines_are_mentioned(clock, path):
    run(clock, path)
    with path.open("ab") as file:
        file.write(b"torn")
    assert "1 damaged" in run(clock, path).notes[0]


def test_the_report_names_the_record_of_every_kernel(clock, path):
    plain = run(clock, path).as_plain()
    row = plain["kernels"][0]
    assert row["source"] == "tuned" and row["ratio"] == 0.5 and row["trials"] > 8
    lines = path.read_text().splitlines()
    assert any(line.startswith(row["record"]) for line in lines)


def test_progress_tells_the_best_so_far(clock, path):
    told: list[tuple[int, int, str]] = []
    run(clock, path, TuneBudget(trials=40), report=lambda *line: told.append(line))
    assert told[-1][1] == 40 and "of the default" in told[-1][2]
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)


def test_what_another_tuner_found_meanwhile_is_used(clock, path):
    class Meanwhile(Clock):
        def __exit__(self, *_):
            other = Clock({"small": clock.times["small"]})
            Tuner([SMALL], "f | cpu", TuningStore(path), TuneBudget(trials=99), lambda: other).run()

    meanwhile = Meanwhile(clock.times)
    found = run(meanwhile, path, TuneBudget(trials=4))
    known = TuningStore(path).read().of(Key("small", "f | cpu"))
    assert known.finished is not None
    assert found.choices.get("small") == (known.finished.choice if known.finished.ratio < 1 else None)
