"""Mistakes built into kernels (kernels/seeded_*.cu): the model must find each one and say what it is.

Each runs under four orders of threads and three timings of asynchronous operations, in the fast and the checked build.
The checked build must report it in every one of the twelve, in the words below. The fast build keeps no happens-before:
there a mistake is reported, in the same words, or makes the numbers wrong, or cannot be seen; the table says which. The
kernels without a mistake must be silent and right everywhere, whatever the seed.
"""

import itertools
import re

import pytest

seeded = pytest.importorskip("tests.cuda._seeded", reason="make native builds the kernels")
seeded_checked = pytest.importorskip("tests.cuda._seeded_checked", reason="make native builds the kernels")

ORDERS = ("fifo", "reverse", "random", "priority")
ASYNC = ("eager", "lazy", "random")
CONFIGURATIONS = list(itertools.product(range(len(ORDERS)), range(len(ASYNC))))

RACE = r"data race on .* is not ordered after the (read|write) by "
DEADLOCK = r"^deadlock:\n  block "
UNWRITTEN = r"read of .*, which nobody has written in this block"
NOT_LANDED = rf"in flight|mbarrier was not waited for|{UNWRITTEN}"
RELEASED = r"TMA load overwrites .* which the wgmma .* may still read|is not ordered after|more arrivals than"
NOT_INITIALISED = r"mbarrier smem\+0x\w+ .*is used without a barrier after its mbarrier\.init"
DIVERGED = r"lanes of one warp execute different \.aligned instructions"
TOUCHED = r"registers of the wgmma issued at .* are touched before wgmma_wait_group"
ARRIVALS_LEFT = r"named barrier \d of block .* is left with 128 of 256 arrivals"
TURNS_OVERLAP = (
    r"reductions to sum\+.* take turns: that of thread 0 .* of block \(1,0,0\), issued at \S+, may not be over when "
    r"that of thread 0 .* of block \([23],0,0\), issued at \S+, begins\n  bulk_wait_group"
)
ALWAYS, SOMETIMES, NEVER = "in every configuration", "in some configuration", "in none"

# (kernel, mistake): (what the report says, where the fast build shows it by a report or by wrong numbers)
EXPECTED = {
    ("tiled", "no_barrier_after_load"): (rf"{UNWRITTEN}|{RACE}", ALWAYS),
    ("tiled", "no_barrier_before_refill"): (RACE, ALWAYS),
    ("tiled", "no_bounds_check"): (r"out-of-bounds (read|write) of 4 bytes, \d+ bytes past the end of [abc] ", ALWAYS),
    ("tiled", "divergent_barrier"): (rf"{UNWRITTEN}|{RACE}|{DIVERGED}", ALWAYS),
    ("reduce", "no_barrier"): (rf"{UNWRITTEN}|{RACE}", SOMETIMES),
    ("reduce", "half_a_warp"): (rf"{DEADLOCK}(.|\n)*warp operation, mask 0xffffffff, lanes missing 0xffff0000", ALWAYS),
    ("reduce", "unwritten_partials"): (UNWRITTEN, ALWAYS),
    ("reduce", "no_atomic"): (r"data race on plain\+0 (.|\n)*blocks of a grid are ordered by nothing but", NEVER),
    ("reduce", "no_fence_of_last_block"): (r"data race on sums\+", NEVER),
    ("reduce", "no_threadfence"): (r"data race on sums\+(.|\n)*blocks of a grid are ordered by nothing but", NEVER),
    ("handoff", "no_release"): (r"data race on data\+", NEVER),
    ("handoff", "no_acquire"): (r"data race on data\+", SOMETIMES),
    ("ampere", "no_copy_wait"): (rf"cp\.async|{UNWRITTEN}", SOMETIMES),
    ("ampere", "no_barrier_before_copy"): (rf"{RACE}(.|\n)*refilled before those who use it", SOMETIMES),
    ("ampere", "misaligned_row"): (r"ldmatrix: the row of lane \d+, smem\+0x\w+, is not 16-byte aligned", ALWAYS),
    ("ampere", "divergent_warp"): (rf"{DEADLOCK}(.|\n)*lanes missing 0x00000080", ALWAYS),
    ("ampere", "misaligned_copy"): (r"cp\.async of 16 bytes: the destination smem\+0x\w+ is not aligned", ALWAYS),
    ("scale", "no_fence"): (r"no fence\.proxy\.async between the write to smem\+0x\w+ by thread", ALWAYS),
    ("scale", "no_barrier_before_store"): (rf"{RACE}|no fence\.proxy\.async", SOMETIMES),
    ("scale", "no_store_wait"): (r"TMA store issued at .* was not waited for", SOMETIMES),
    ("scale", "no_load_wait"): (NOT_LANDED, SOMETIMES),
    ("scale", "tx_too_small"): (rf"{DEADLOCK}(.|\n)*parity 0(.|\n)*pending arrivals 0 of 1, tx-count -4096", ALWAYS),
    ("scale", "tx_too_large"): (rf"{DEADLOCK}(.|\n)*parity 0(.|\n)*pending arrivals 0 of 1, tx-count 8192", ALWAYS),
    ("scale", "no_init"): (r"mbarrier smem\+0x2000 is used before mbarrier\.init", ALWAYS),
    ("scale", "wrong_parity"): (rf"{NOT_LANDED}|{DEADLOCK}(.|\n)*wait\(parity 1\)", ALWAYS),
    ("scale", "misaligned_tile"): (r"TMA load: shared address smem\+0x10 is not 128-byte aligned", ALWAYS),
    ("scale", "over_its_barrier"): (r"TMA load .* overwrites its own mbarrier at smem\+0x2000", ALWAYS),
    ("scale", "load_while_storing"): (rf"TMA load .* in flight there|{RACE}", SOMETIMES),
    ("scale", "barrier_overwritten"): (r"mbarrier smem\+0x2000 .*overwritten", ALWAYS),
    ("scale", "wait_in_another_thread"): (r"TMA store issued at .* was not waited for", SOMETIMES),
    ("scale", "no_init_fence"): (r"counts on mbarrier smem\+0x2000 without a fence_mbarrier_init", NEVER),
    ("scale", "map_not_aligned"): (r"the tensor map is not 64-byte aligned", ALWAYS),
    ("staging", "no_read_wait"): (rf"{RACE}(.|\n)*bulk_wait_group", SOMETIMES),
    ("staging", "no_barrier_after_wait"): (rf"{RACE}(.|\n)*bulk_wait_group", SOMETIMES),
    ("staging", "no_fence_after_stmatrix"): (r"no fence\.proxy\.async between the write to", ALWAYS),
    ("staging", "no_wait_at_exit"): (r"TMA store issued at .* was not waited for", SOMETIMES),
    ("hopper", "no_full_wait"): (rf"{NOT_LANDED}|{RELEASED}|{DEADLOCK}", ALWAYS),
    ("hopper", "full_parity"): (rf"{NOT_LANDED}|{RELEASED}|{DEADLOCK}", ALWAYS),
    ("hopper", "no_empty_arrive"): (rf"{DEADLOCK}(.|\n)*threads 0: mbarrier wait\(parity 0\).*arrivals 2 of 2", ALWAYS),
    ("hopper", "empty_parity"): (rf"{DEADLOCK}(.|\n)*threads 0: mbarrier wait\(parity 0\).*arrivals 2 of 2", ALWAYS),
    ("hopper", "no_empty_wait"): (rf"{NOT_LANDED}|{RELEASED}|{DEADLOCK}", ALWAYS),
    ("hopper", "swizzle"): (
        r"descriptor of operand A says 128-byte swizzle, but the TMA load .* with no swizzle",
        ALWAYS,
    ),
    ("hopper", "tx_short"): (NOT_LANDED, SOMETIMES),
    ("hopper", "tx_long"): (rf"{DEADLOCK}(.|\n)*pending arrivals 0 of 1, tx-count 32768", ALWAYS),
    ("hopper", "early_release"): (RELEASED, SOMETIMES),
    ("hopper", "no_wgmma_wait"): (rf"{RELEASED}|a wgmma .* was never waited for|before wgmma_wait_group", ALWAYS),
    ("hopper", "no_init_barrier"): (r"mbarrier smem\+0x18000 is used .*mbarrier\.init", SOMETIMES),
    ("hopper", "no_wgmma_fence"): (r"wgmma without a wgmma\.fence before the first", ALWAYS),
    ("hopper", "accumulator_touched_after_fence"): (
        r"wgmma without a wgmma\.fence since its registers were touched at .*/kernels/seeded_hopper",
        NEVER,
    ),
    ("hopper", "store_out_of_bounds"): (r"out-of-bounds write of 4 bytes, \d+ bytes past the end of c \(65536", ALWAYS),
    ("hopper", "descriptor_stride"): (None, ALWAYS),  # a legal tile, only not the one that was meant: wrong numbers
    ("hopper", "double_release"): (rf"{RELEASED}|{DEADLOCK}", SOMETIMES),
    ("hopper", "divergent_operands"): (r"the threads of the warpgroup disagree on the operands", ALWAYS),
    ("hopper", "touch_accumulator"): (
        r"registers of the wgmma issued at .* are touched before wgmma_wait_group",
        ALWAYS,
    ),
    ("hopper", "no_register_release"): (rf"{DEADLOCK}(.|\n)*setmaxnreg\.inc to 232 .* 0 free, 2048 are needed", ALWAYS),
    ("hopper", "operand_past_the_end"): (
        r"wgmma: the descriptor of operand B: .* past the block's 99328 bytes",
        ALWAYS,
    ),
    ("hopper", "a_registers_changed"): (
        r"registers of the wgmma issued at .* are touched before wgmma_wait_group",
        NEVER,
    ),
    ("cluster", "no_cluster_sync_after_init"): (r"which may not have started: no cluster barrier", ALWAYS),
    ("cluster", "remote_before_start"): (r"write to smem.* whose block may not have started", NEVER),
    ("cluster", "relaxed_cluster_arrive"): (rf"{RACE}", NEVER),
    ("cluster", "relaxed_without_fence"): (NOT_INITIALISED, NEVER),
    ("cluster", "empty_multicast"): (r"TMA load: the multicast mask is 0", ALWAYS),
    ("cluster", "exit_early"): (r"which has exited|of a block that has exited", SOMETIMES),
    ("cluster", "wrong_empty_count"): (rf"{RELEASED}|in flight|{DEADLOCK}", SOMETIMES),
    ("cluster", "peer_not_waited_for"): (rf"{RELEASED}|in flight", ALWAYS),
    ("cluster", "own_release_only"): (
        rf"{DEADLOCK}(.|\n)*threads 128: mbarrier wait\(parity 0\).*arrivals 1 of 2",
        ALWAYS,
    ),
    ("cluster", "remote_read_race"): (rf"{UNWRITTEN}|{RACE}", ALWAYS),
    ("cluster", "half_of_the_bytes"): (rf"{NOT_LANDED}|{RELEASED}|{DEADLOCK}", ALWAYS),
    ("attention", "no_first_turn"): (rf"{DEADLOCK}(.|\n)*named barrier 1 \(128 of 256 threads arrived\)", ALWAYS),
    ("attention", "turn_not_given"): (rf"{DEADLOCK}(.|\n)*named barrier 2 \(128 of 256 threads arrived\)", ALWAYS),
    ("attention", "turn_given_twice"): (rf"{DEADLOCK}(.|\n)*named barrier [12] |{ARRIVALS_LEFT}", ALWAYS),
    ("attention", "last_turn_given_too"): (ARRIVALS_LEFT, ALWAYS),
    ("attention", "scores_read_early"): (TOUCHED, ALWAYS),
    ("attention", "probabilities_overwritten"): (TOUCHED, NEVER),
    ("attention", "output_scaled_early"): (TOUCHED, SOMETIMES),
    ("attention", "no_fence_after_softmax"): (r"wgmma without a wgmma\.fence since its registers were touched", NEVER),
    ("attention", "k_released_early"): (RELEASED, SOMETIMES),
    ("attention", "v_released_early"): (RELEASED, SOMETIMES),
    ("attention", "v_not_waited_for"): (rf"{NOT_LANDED}|{RELEASED}", SOMETIMES),
    ("attention", "no_fence_before_output_store"): (r"no fence\.proxy\.async between the write to", ALWAYS),
    ("attention", "staging_refilled_early"): (rf"{RACE}(.|\n)*bulk_wait_group", SOMETIMES),
    ("turns", "turn_passed_early"): (TURNS_OVERLAP, SOMETIMES),
    ("turns", "turn_passed_after_reading"): (TURNS_OVERLAP, SOMETIMES),
    ("turns", "turn_passed_early_in_order"): (TURNS_OVERLAP, NEVER),
    ("turns", "turn_passed_early_among_loads"): (TURNS_OVERLAP, NEVER),
    ("turns", "turn_not_passed"): (r"every thread that can run spins", ALWAYS),
    ("turns", "turn_not_awaited"): (rf"{RACE}|every thread that can run spins", SOMETIMES),
    ("turns", "turn_awaited_by_another_thread"): (rf"{RACE}|every thread that can run spins", ALWAYS),
    ("turns", "reduce_source_overwritten"): (rf"{RACE}(.|\n)*bulk_wait_group", NEVER),
    ("misuse", "barrier_count_differs"): (r"named barrier 1: it expects \d+ threads here, but \d+ where", ALWAYS),
    ("misuse", "barrier_count_odd"): (r"named barrier 1: 100 threads, not a multiple of 32", ALWAYS),
    ("misuse", "missing_at_barrier"): (rf"{DEADLOCK}(.|\n)*named barrier 1 \(96 of 128 threads arrived\)", ALWAYS),
    ("misuse", "spin_on_memory"): (r"it spins on memory|spins without progress", ALWAYS),
    ("misuse", "spin_on_atomic"): (r"every thread that can run spins", ALWAYS),
    ("misuse", "poll_forever"): (r"every thread that can run spins", ALWAYS),
    ("misuse", "registers_missing"): (rf"{DEADLOCK}(.|\n)*setmaxnreg\.inc to 256 registers a thread", ALWAYS),
    ("misuse", "registers_decreased_by_inc"): (r"setmaxnreg\.inc to 24 registers from 248", ALWAYS),
    ("misuse", "cluster_wait_without_arrive"): (r"barrier\.cluster\.wait without an arrive before it", ALWAYS),
    ("misuse", "wgmma_at_exit"): (r"a wgmma issued at .* was never waited for", ALWAYS),
    ("misuse", "unwritten_shared"): (UNWRITTEN, ALWAYS),
    ("misuse", "past_shared_memory"): (r"out-of-bounds write of 4 bytes, 1024 bytes past the end of the shared", NEVER),
    ("misuse", "bulk_size"): (r"bulk load of 24 bytes, expected a multiple of 16", ALWAYS),
    ("misuse", "lanes_in_different_operations"): (r"lanes of one warp meet in different operations", ALWAYS),
    ("misuse", "static_pointer"): (r"bulk load: .* is not in the block's dynamic shared memory", ALWAYS),
    ("misuse", "rank_too_large"): (r"mapa to block rank 1 of a cluster of 1", ALWAYS),
    ("misuse", "divergent_aligned"): (DIVERGED, ALWAYS),
    ("misuse", "registers_by_one_warp"): (r"setmaxnreg at .* by some of the warps of warpgroup 0 .* only", ALWAYS),
    ("misuse", "barrier_between_warps_missing"): (rf"{RACE}(.|\n)*a barrier must lie between what the warps", NEVER),
    ("misuse", "shared_memory_too_small"): (r"a type of 9216 bytes, but the launch gave the block 9152", ALWAYS),
    ("misuse", "misaligned_pair"): (r"write of 8 bytes at smem\+0x\w+, which is not a multiple of them", NEVER),
    ("misuse", "misaligned_atomic"): (r"an atomic at an address that is not aligned", ALWAYS),
}
# Where a mistake cannot be seen even by the checked build, because the schedule itself is a correct execution in which
# no rule is broken: two extra arrivals that cancel out, a block that exits when all that was meant for it has come.
INVISIBLE = {("hopper", "double_release"), ("cluster", "exit_early")}


def outcome(module, kernel, bug, order, asynchronous, seed=1):
    """The report; or "wrong" or "right" after a launch that went through."""
    try:
        error = module.run(kernel, bug, order=order, async_=asynchronous, seed=seed, workers=1, timeout_s=0.2)
    except RuntimeError as report:
        return str(report)
    return "right" if error == 0 else "wrong"


def test_every_mistake_has_an_expectation():
    built = {(kernel, bug) for kernel, bugs in seeded.KERNELS.items() for bug in bugs if bug not in SILENT}
    assert built == set(EXPECTED)
    assert len(EXPECTED) >= 30


# Correct kernels: the first of each file, and what looks like a mistake and is none.
SILENT = {
    "none",
    "fence_before_barrier",
    "volatile_flag",
    "fence_by_issuer",
    "over_the_edge",
    "wgmma_chain",
    "relaxed_init",
    "arrive_and_exit",
    "blocks_in_order",
    "adds_without_turns",
    "adds_without_turns_in_order",
    "adds_within_a_cluster",
    "clock_wait",
    "mixed_barrier_zero",
    "partial_warp",
}


@pytest.mark.parametrize(("kernel", "bug"), EXPECTED)
def test_checked_build_reports_it_everywhere(kernel, bug):
    pattern, _ = EXPECTED[kernel, bug]
    seen = 0
    for order, asynchronous in CONFIGURATIONS:
        text = outcome(seeded_checked, kernel, bug, order, asynchronous)
        configuration = f"{ORDERS[order]}, {ASYNC[asynchronous]}: {text}"
        if pattern is None:
            assert text == "wrong", configuration
            continue
        if text == "right" and (kernel, bug) in INVISIBLE:
            continue
        seen += 1
        assert re.search(pattern, text), configuration
        assert "/kernels/seeded_" in text, configuration  # where in the source
    assert pattern is None or seen >= len(CONFIGURATIONS) // 2


@pytest.mark.parametrize(("kernel", "bug"), EXPECTED)
def test_fast_build_shows_what_it_can(kernel, bug):
    pattern, shown = EXPECTED[kernel, bug]
    outcomes = [outcome(seeded, kernel, bug, *configuration) for configuration in CONFIGURATIONS]
    for text in outcomes:
        assert text in ("right", "wrong") or (pattern and re.search(pattern, text)), text
    visible = sum(text != "right" for text in outcomes)
    assert (visible == len(outcomes)) == (shown == ALWAYS), outcomes
    assert (visible == 0) == (shown == NEVER), outcomes


@pytest.mark.parametrize("module", [seeded, seeded_checked], ids=["fast", "checked"])
@pytest.mark.parametrize(("kernel", "bug"), [(k, b) for k, bugs in seeded.KERNELS.items() for b in bugs if b in SILENT])
def test_no_false_alarm(module, kernel, bug):
    for (order, asynchronous), seed in itertools.product(CONFIGURATIONS, (1, 2, 3)):
        assert outcome(module, kernel, bug, order, asynchronous, seed) == "right", (
            ORDERS[order],
            ASYNC[asynchronous],
            seed,
        )


def test_the_process_survives_and_the_next_launch_is_right():
    for module in (seeded, seeded_checked, seeded):
        assert outcome(module, "hopper", "no_empty_arrive", 0, 1).startswith("deadlock")
        assert outcome(module, "hopper", "none", 0, 1) == "right"
        assert "spins" in outcome(module, "misuse", "spin_on_memory", 0, 1)
        assert outcome(module, "cluster", "none", 3, 2) == "right"


def test_a_schedule_is_repeatable():
    def texts(seed):
        return [outcome(seeded_checked, "tiled", "no_barrier_before_refill", order, 1, seed) for order in (2, 3)]

    assert texts(5) == texts(5)
    assert len({tuple(texts(seed)) for seed in range(6)}) > 1
