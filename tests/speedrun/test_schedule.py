"""Plans of steps by hand, and what a config refuses."""

import pytest

from speedrun.config import RaceConfig, numbers
from speedrun.schedule import Plan, momentum, mtp_weights, plan

FLAT = {"steps": 12, "warmup": 0, "cooldown": 0.0}


def plans(**changes) -> list[Plan]:
    config = RaceConfig(**{**FLAT, **changes})
    return [plan(step, config) for step in range(config.steps)]


def test_without_switches_every_step_is_the_same():
    assert set(plans(batch=8, context=64, eval_stride=64)) == {Plan(8, 64, 0, "", 1.0, 0.95, (1.0,), False)}


def test_lists_hold_for_equal_parts():
    assert [p.rows for p in plans(batches="8,16,24")] == [8] * 4 + [16] * 4 + [24] * 4
    assert [p.window for p in plans(windows="32,64")] == [32] * 6 + [64] * 6
    assert [p.rows for p in plans(steps=5, batches="1,2")] == [1, 1, 1, 2, 2]


def test_rates_grow_with_the_batch():
    assert [p.lr_share for p in plans(batches="4,16")] == [1.0] * 6 + [2.0] * 6
    assert [p.lr_share for p in plans(batches="4,16", batch_lr=0.0)] == [1.0] * 12


def test_short_windows_keep_the_tokens_of_a_step():
    found = plans(contexts="32,128", batch=3, context=128)
    assert {p.rows * p.context for p in found} == {3 * 128} and found[0].context == 32 and found[-1].context == 128
    assert {p.rows * p.context for p in plans(contexts="64,128", batches="2,4", context=128)} == {256, 512}


def test_yarn_remembers_the_windows_so_far():
    found = [p.stretched for p in plans(windows="16,32,64", yarn=True)]
    assert found == ["16"] * 4 + ["16,32"] * 4 + ["16,32,64"] * 4
    assert {p.stretched for p in plans(windows="16,32,64")} == {""}


def test_momentum_rises_in_a_straight_line():
    config = RaceConfig(momentum=0.95, momentum_start=0.85, momentum_warmup=4)
    assert [round(momentum(step, config), 6) for step in range(6)] == [0.85, 0.875, 0.9, 0.925, 0.95, 0.95]
    assert momentum(0, RaceConfig(momentum=0.9)) == 0.9


def test_losses_of_later_tokens_fade():
    config = RaceConfig(mtp="1,0.5,0.25", mtp_until=0.5)
    assert mtp_weights(0.0, config) == (1.0, 0.5, 0.25)
    assert mtp_weights(0.25, config) == (1.0, 0.25, 0.125)
    assert mtp_weights(0.5, config) == mtp_weights(1.0, config) == (1.0,)
    assert mtp_weights(0.3, RaceConfig()) == (1.0,)


def test_a_head_is_untied_once():
    assert [p.untied for p in plans(tied=True, untie_at=0.5)] == [False] * 6 + [True] * 6
    assert not any(p.untied for p in plans(tied=True))


def test_numbers():
    assert numbers("") == [] and numbers("1,0.5") == [1.0, 0.5]
    for text in ("a", "1,,2", "nan", "1;2"):
        with pytest.raises(ValueError, match="expected numbers with commas"):
            numbers(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": "8,0"}, r"batches '8,0': expected whole numbers of at least 1, got \[0.0\]"),
        ({"windows": "1.5"}, "windows '1.5'"),
        ({"contexts": "96"}, "contexts '96': expected divisors of the context, 128"),
        ({"mtp": "0.5,0.25"}, "mtp '0.5,0.25': expected 1 and then weights"),
        ({"untie_at": 0.5}, "untie_at 0.5 with an untied head"),
        ({"yarn": True}, "yarn with windows '': expected --windows that grow"),
        ({"yarn": True, "windows": "128,64"}, "yarn with windows '128,64': expected --windows that grow"),
        ({"yarn": True, "windows": "64,128", "positions": "learned"}, "yarn with positions learned: expected rotary"),
        ({"windows": "64,128", "window_pattern": "L"}, "windows with window_pattern 'L': expected an S"),
        ({"cuda_graphs": True}, "cuda_graphs without compile"),
        ({"fp8_head": True, "fused_loss": True}, "fp8_head and fused_loss: expected one"),
        ({"mtp": "1,0.5", "fused_loss": True}, "mtp and fused_loss"),
        ({"normuon": 1.0}, "normuon 1.0: expected 0 to less than 1"),
        ({"momentum_warmup": 0}, "momentum_warmup 0"),
        ({"mtp_until": 2.0}, "mtp_until 2.0: expected 0 to 1"),
        ({"value_tables": 9}, "value_tables 9: expected at most half of the layers"),
        ({"without_attention": "9"}, "without_attention '9': expected layers from 0"),
        ({"bigrams": 1}, "bigrams 1: expected 2 rows or more"),
        ({"value_gate": True, "value_embeddings": False}, "value_gate without value_embeddings"),
    ],
)
def test_impossible_races_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RaceConfig(**changes)
