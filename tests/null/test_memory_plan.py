"""Working memory by layer, from the lives of storages and tensors."""

from bitwright.compiler.lower.memory_plan import MemoryPlan, Storage, dump_plans, load_plans, plan_memory
from bitwright.compiler.report.deployment import planned_text
from bitwright.targets.schema import Limits

CALLS = [("a", 0), ("b", 100), ("c", 0)]
# Two blocks of one page are in use at once in call 1; the block of call 2 has another size.
STORAGES = [Storage(1000, 0, 1), Storage(4096, 1, 1), Storage(4097, 2, 2)]
TENSORS = [Storage(900, 0, 1), Storage(4096, 1, 1), Storage(4000, 2, 2)]


def test_the_pool_keeps_for_every_size_what_was_in_use_at_once() -> None:
    plan = plan_memory(CALLS, STORAGES, TENSORS)
    assert [step.held_bytes for step in plan.steps] == [4096, 8192, 8192]
    assert [step.live_bytes for step in plan.steps] == [900, 4996, 4000]
    assert plan.pool_bytes == 2 * 4096 + 8192
    assert plan.live_bytes == 4996
    assert plan.peak_bytes == plan.pool_bytes + 100


def test_blocks_that_do_not_meet_are_one_block_of_the_pool() -> None:
    plan = plan_memory(CALLS, [Storage(10, 0, 0), Storage(20, 1, 1), Storage(30, 2, 2)], [])
    assert plan.storages == 3
    assert plan.pool_bytes == 4096


def test_a_function_without_calls_takes_nothing() -> None:
    assert plan_memory([], [], []).peak_bytes == 0


def test_the_plan_is_one_line() -> None:
    small, large = (MemoryPlan(1, (), size, size) for size in (1000, 18_800))
    assert planned_text({"a": small, "b": large}, Limits()) == "planned: working memory 18.8 kB"
    device = Limits(ram_bytes=256e3, flash_bytes=1e6)
    constants = MemoryPlan(1, (), 18_800, 16_000, 26_800)
    expected = "planned: RAM 18.8 kB of 256 kB, constants 26.8 kB of 1 MB flash"
    assert planned_text({"main": constants}, device) == expected
    assert planned_text({"main": constants}, Limits()) == "planned: RAM 18.8 kB, constants 26.8 kB"


def test_plans_survive_the_disk() -> None:
    plans = {"main": plan_memory(CALLS, STORAGES, TENSORS)}
    assert load_plans(dump_plans(plans)) == plans
