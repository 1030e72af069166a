"""Effects against scipy and closed formulas; every switch in both positions; ablations that stop, go on, go stale."""

import json
import math
import random
import re
import signal
import statistics
import subprocess
import time
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import pytest

from common.cli import UserError
from common.dist import World, init_from_env
from common.log import read_jsonl
from speedrun import ablate, effects, stale, step_times, train
from speedrun.ablate import AblateConfig
from speedrun.config import RaceConfig
from speedrun.effects import Effect, holm, median_effect, paired_effect, slope_of, student_quantile, to_same_loss
from speedrun.model import build
from speedrun.record_log import source_digests
from speedrun.schedule import plan
from speedrun.switches import Switch, choose, pieces, switches, unfit
from speedrun.winners import Choice

# The tricks that the chapter promises, by the names of their switches.
TRICKS = [
    "zero-init", "qk-norm", "relu2", "relu2-gelu", "untied", "untie-late", "softcap", "value-embeddings",
    "value-tables", "value-gate", "attention-gate", "without-attention", "x0-skip", "unet-skips", "backout", "smear",
    "bigrams", "windows", "yarn", "document-mask", "documents", "batches", "contexts", "mtp", "muon", "momentum-warmup",
    "normuon", "cautious-decay", "cautious", "bf16-weights", "fp8-head", "fp8-mlp", "fused-loss", "compile",
    "cuda-graphs", "prefetch", "overlap",
]  # fmt: skip


@pytest.fixture
def tiny(monkeypatch) -> RaceConfig:
    """A base that takes a second, on one file of text."""
    base = replace(
        ablate.BASES["smoke"], corpus=subprocess.__file__, tokenizer="bpe:300", width=16, mlp_width=16, context=32,
        eval_stride=32, steps=6, warmup=2, eval_every=3, eval_windows=4, dtype="float32", peak_tflops=1.0,
    )  # fmt: skip
    monkeypatch.setitem(ablate.BASES, "tiny", base)
    return base


@pytest.fixture
def world() -> World:
    return init_from_env("cpu")


def config(tmp_path, **changes) -> AblateConfig:
    options = {"base": "tiny", "seeds": 2, "rounds": 0, "switches": "smear,muon", "device": "cpu"} | changes
    return AblateConfig(folder=tmp_path / "runs", out=tmp_path / "results", **options)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_paired_effects_are_scipys():
    stats, generator = pytest.importorskip("scipy.stats"), random.Random(1)
    for n in (2, 3, 5, 12):
        on, off = ([generator.gauss(1.3, 0.02) for _ in range(n)] for _ in range(2))
        wanted = stats.ttest_rel(on, off)
        interval = wanted.confidence_interval(0.95)
        ours = paired_effect(on, off)
        assert ours.value == pytest.approx(wanted.statistic * stats.sem([a - b for a, b in zip(on, off, strict=True)]))
        assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
        assert ours.p_value == pytest.approx(wanted.pvalue, rel=1e-9)


@pytest.mark.parametrize("share", [0.6, 0.9, 0.975, 0.999])
def test_quantiles_of_students_t_by_closed_formulas(share):
    assert student_quantile(share, 1) == pytest.approx(math.tan(math.pi * (share - 0.5)), rel=1e-9)
    x = 2 * share - 1  # two degrees of freedom: P(|T| < t) = t / sqrt(2 + t^2)
    assert student_quantile(share, 2) == pytest.approx(x * math.sqrt(2 / (1 - x * x)), rel=1e-9)


def test_an_effect_is_on_minus_off():
    effect = paired_effect([1.0, 2.0, 3.5], [1.5, 2.5, 4.0])  # the same difference: no chance in it
    assert effect == Effect(-0.5, -0.5, -0.5, 0.0)
    assert paired_effect([1.0, 2.0], [1.0, 2.0]) == Effect(0.0, 0.0, 0.0, 1.0)
    effect = paired_effect([1.0, 1.2], [1.3, 1.3])  # differences -0.3, -0.1; t of one degree of freedom is 12.706
    assert (effect.value, effect.high) == pytest.approx((-0.2, -0.2 + 0.1 * math.tan(0.475 * math.pi)))
    for on, off in (([1.0], [1.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="expected as many, at least 2 seeds"):
            paired_effect(on, off)
    with pytest.raises(ValueError, match="expected finite numbers"):
        paired_effect([1.0, math.nan], [1.0, 1.0])


def test_holms_correction_rejects_what_the_stepwise_test_rejects():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # by hand
    assert holm([]) == [] and holm([0.7, 0.9]) == [1.0, 1.0]
    generator = random.Random(0)
    for _ in range(200):
        p_values = [generator.random() ** 4 for _ in range(generator.randrange(1, 9))]
        rejected, order = set(), sorted(range(len(p_values)), key=p_values.__getitem__)
        for rank, index in enumerate(order):  # Holm 1979: stop at the first that is too large
            if p_values[index] > 0.05 / (len(p_values) - rank):
                break
            rejected.add(index)
        assert {index for index, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


def test_the_median_s_interval_holds_it_as_often_as_it_says():
    stats = pytest.importorskip("scipy.stats")
    for n in (6, 9, 15, 40):
        effect = median_effect([float(i) for i in range(1, n + 1)])
        k = int(effect.low)
        outside = 2 * stats.binom.cdf(k - 1, n, 0.5)
        assert effect.high == n + 1 - k and outside <= 0.05 < 2 * stats.binom.cdf(k, n, 0.5)
        assert effect.value == statistics.median(range(1, n + 1))
    with pytest.raises(ValueError, match="5 ratios: expected more"):
        median_effect([1.0] * 5)
    with pytest.raises(ValueError, match="expected positive finite ratios"):
        median_effect([1.0] * 8 + [math.nan])


def test_time_to_the_same_loss_on_a_line_that_is_known():
    """Bits are 3 - 0.25 ln(steps), with the switch 3 - 0.03 - 0.25 ln(steps), each step 1.2 times as long."""
    steps = 400
    target = 3 - 0.25 * math.log(steps)
    needed = math.exp((3 - 0.03 - target) / 0.25)
    bits, step = Effect(-0.03, -0.04, -0.02, 0.01), Effect(1.2, 1.1, 1.3)
    found = to_same_loss(bits, step, slope=-0.25, reach=0.25 * math.log(2))
    assert found.value == pytest.approx(1.2 * needed / steps)
    assert found.low < found.value < found.high and found.low == pytest.approx(1.1 * math.exp(-0.16))
    assert to_same_loss(bits, step, slope=-0.25, reach=0.035) is None, "beyond what the base measured"
    assert to_same_loss(bits, step, slope=0.1, reach=1.0) is None, "a base that steps make worse"
    assert to_same_loss(bits, step, slope=math.nan, reach=math.nan) is None
    for steps in (400, 7):  # half of 7 is 3
        whole, half = ([3 + seed - 0.25 * math.log(n) for seed in range(3)] for n in (steps, steps // 2))
        slope, reach = slope_of(whole, half, steps)
        assert slope == pytest.approx(-0.25) and reach == pytest.approx(0.25 * math.log(steps / (steps // 2)))
    assert all(map(math.isnan, slope_of([], [], 400) + slope_of([1.0, math.nan], [2.0, 2.0], 400)))


# ---- the list --------------------------------------------------------------------------------------------------------


def test_every_trick_is_in_the_list():
    assert [switch.name for switch in switches(ablate.SMALL)] == TRICKS


@pytest.mark.parametrize("base", ["small", "quick", "smoke"])
@pytest.mark.parametrize("name", TRICKS)
def test_each_switch_in_both_positions(base, name):
    base = ablate.BASES[base]
    (switch,) = choose(name, switches(base))
    on, off = switch.sides(base)
    assert type(on) is type(off) is RaceConfig
    differing = {f.name for f in fields(RaceConfig) if getattr(on, f.name) != getattr(off, f.name)}
    assert differing and differing <= switch.on.keys()
    for side, wanted in ((on, switch.on), (off, switch.off)):
        assert {key: getattr(side, key) for key in (*wanted, *switch.needs)} == {**wanted, **switch.needs}
        others = {f.name for f in fields(RaceConfig)} - switch.on.keys() - switch.needs.keys()
        assert all(getattr(side, key) == getattr(base, key) for key in others)


def test_activations_are_compared_at_about_equal_parameters():
    for base in (ablate.SMALL, replace(ablate.SMALL, mlp="relu2", mlp_width=516)):
        (switch,) = choose("relu2", switches(base))
        sizes = [build(side, 256).num_parameters() for side in switch.sides(base)]
        assert abs(sizes[0] / sizes[1] - 1) <= 0.01, sizes


@pytest.mark.parametrize(("base", "name"), [("small", "batches"), ("small", "contexts"), ("fineweb", "batches")])
def test_schedules_see_as_many_tokens_in_all(base, name):
    (switch,) = choose(name, switches(ablate.BASES[base]))
    on, off = switch.sides(ablate.BASES[base])
    tokens = [sum(now.rows * now.context for now in (plan(step, side) for step in range(side.steps)))
              for side in (on, off)]  # fmt: skip
    assert tokens[0] == tokens[1]
    # Where the batch is the base's, so is the rate; at its largest, before the rates fall.
    third = [plan(step, on) for step in range(on.steps)]
    same = next(now for now in third if now.rows * now.context == off.batch * off.context and now.lr_share >= 1)
    step = on.steps // 3 if on.contexts == off.contexts else on.warmup
    assert same.lr_share * on.muon_lr == pytest.approx(plan(step, off).lr_share * off.muon_lr)


def test_a_recipe_runs_once_whatever_it_is_called():
    base = ablate.SMALL
    found = pieces(
        base, choose("relu2,relu2-gelu,qk-norm,windows,yarn,cautious,cautious-decay,prefetch", switches(base))
    )
    assert found.sides["relu2"] == ("relu2", "base") and found.sides["relu2-gelu"] == ("relu2", "relu2-gelu-off")
    assert found.sides["qk-norm"] == ("base", "qk-norm-off"), "on in the base: its off side is what is run"
    assert found.sides["yarn"] == ("yarn", "windows") and found.sides["cautious"][0] == found.sides["cautious-decay"][0]
    assert "prefetch" not in found.sides, "it changes no number"
    assert len(set(map(str, found.arms.values()))) == len(found.arms)
    assert found.arms["base-half"].steps == base.steps // 2


def test_unknown_switches_name_the_nearest():
    known = switches(ablate.SMALL)
    for asked, near in (("unet", "unet-skips"), ("qk_norm", "qk-norm"), ("relu", "relu2"), ("yarm", "yarn")):
        with pytest.raises(ValueError, match=rf"switch '{asked}' is unknown: nearest: .*{near}"):
            choose(f"muon,{asked}", known)
    with pytest.raises(ValueError, match="expected some of zero-init, qk-norm"):
        choose("%%%", known)
    assert [each.name for each in choose("smear, muon", known)] == ["smear", "muon"]
    assert choose("", known) == known


def test_what_cannot_be_measured_here_says_why():
    base, known = ablate.SMALL, {switch.name: switch for switch in switches(ablate.SMALL)}
    here = {"cuda": False, "compiler": True}
    assert unfit(known["fp8-mlp"], base, **here) == "needs a GPU" == unfit(known["fused-loss"], base, **here)
    assert unfit(known["fp8-mlp"], base, cuda=True, compiler=True) == ""
    assert unfit(known["compile"], base, cuda=False, compiler=False) == "needs a C++ compiler"
    assert "ranks" in unfit(known["overlap"], base, **here)
    for recipe in ablate.BASES.values():  # the others find what they contradict set aside on both sides
        reasons = {switch.name: unfit(switch, recipe, cuda=True, compiler=True) for switch in switches(recipe)}
        refused = {name for name, reason in reasons.items() if reason}
        assert refused == {"overlap"} | ({"yarn"} & refused if recipe.positions != "rotary" else set())
    with pytest.raises(ValueError, match="expected equal"):
        Switch("lame", "", on={"smear": True}, off={"yarn": False})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seeds": 1}, "expected at least 2"), ({"base": "huge"}, "expected one of"), ({"rounds": 5}, "at least 6"),
     ({"steps": 1}, "expected at least 2"), ({"steps": -3}, "expected at least 2")],
)  # fmt: skip
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        AblateConfig(**changes)


def test_quick_fills_in_what_was_not_given():
    asked = ablate.configured(["--quick", "--seeds", "4"])
    assert (asked.base, asked.seeds, asked.switches) == ("quick", 4, ablate.QUICK_SWITCHES)
    assert ablate.configured([]) == AblateConfig()
    choose(ablate.QUICK_SWITCHES, switches(ablate.BASES["quick"]))


# ---- ablations -------------------------------------------------------------------------------------------------------


def test_two_switches_two_seeds_from_end_to_end(tiny, tmp_path, world, monkeypatch):
    monkeypatch.setattr("common.timing.SETTLE_S", 0.0)
    asked = config(tmp_path, switches="smear,muon,fp8-head,prefetch", rounds=6)
    rows, (result, picture) = ablate.ablate(asked, world)
    by_name = {row["switch"]: row for row in rows}
    assert list(by_name)[2:] == ["fp8-head", "prefetch"] and by_name["fp8-head"]["reason"] == "needs a GPU"
    root = tmp_path / "runs" / "tiny-6"

    def reached(arm, seed):
        return read_jsonl(root / arm / str(seed) / "metrics.jsonl")[-1]["held_out_bits_per_byte"]

    for name, arms in (("smear", ("smear", "base")), ("muon", ("base", "muon-off"))):
        on, off = ([reached(arm, seed) for seed in range(2)] for arm in arms)
        assert by_name[name]["bits"] == paired_effect(on, off)
        assert by_name[name]["time"].low > 0
    assert by_name["prefetch"]["bits"] is None and by_name["prefetch"]["time"]
    assert reached("base", 0) != reached("base", 1) and len(read_jsonl(root / "base-half" / "0" / "metrics.jsonl")) == 3
    assert not list(root.rglob("checkpoints")), "weights that nobody will ask for"
    filed = json.loads(result.read_text())
    assert result.name.startswith("ablation_") and len(filed["rows"]) == 4 and filed["config"]["recipe"]["steps"] == 6
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    lines = effects.as_lines(rows)
    assert "fp8-head          needs a GPU" in lines and "chance alone would make 0.1" in lines

    # Again: nothing is run, nothing is timed, the same comes out. One state gone: one run.
    made = []
    monkeypatch.setattr(ablate, "race", lambda *asked: made.append(asked[0]) or train.race(*asked))
    monkeypatch.setattr(ablate, "step_ratios", lambda *_: pytest.fail("timed before"))
    assert ablate.ablate(asked, world)[0] == rows and not made
    (root / "smear" / "1" / ablate.STATE).unlink()
    assert ablate.ablate(asked, world)[0] == rows
    assert [(run.smear, run.seed) for run in made] == [(True, 1)]


def test_ctrl_c_and_on_again(tiny, tmp_path, world, monkeypatch, capsys):
    """In the middle of a run: it goes on from its checkpoint to the bits of the undisturbed one."""
    asked, pressed, update = config(tmp_path, switches="smear"), [], train.update
    undisturbed = train.race(replace(ablate.recipe(asked), smear=True, folder=tmp_path / "whole"), world)

    def pressing(run, now):
        update(run, now)
        if run.config.smear and run.step == 2 and not pressed:
            pressed.append(run.config.seed)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "update", pressing)
    with pytest.raises(KeyboardInterrupt):
        ablate.ablate(asked, world)
    folder = tmp_path / "runs" / "tiny-6" / "smear" / "0"
    assert not ablate.finished(ablate.state_of(folder)) and len(read_jsonl(folder / "metrics.jsonl")) == 3
    capsys.readouterr()
    ablate.ablate(asked, world)
    assert ablate.state_of(folder)["bits_per_byte"] == undisturbed.bits_per_byte
    assert len(json.loads((folder / "config.json").read_text())["sittings"]) == 2
    assert len(re.findall(r"^ +\d+/6 .* left \d:\d\d$", capsys.readouterr().out, re.MULTILINE)) == 5


def test_ctrl_c_while_a_run_is_evaluated_ends_the_ablation_too(tiny, tmp_path, world, monkeypatch):
    evaluate = train.evaluate

    def pressing(run):
        if run.step == run.config.steps:
            signal.raise_signal(signal.SIGINT)
        return evaluate(run)

    monkeypatch.setattr(train, "evaluate", pressing)
    with pytest.raises(KeyboardInterrupt):
        ablate.ablate(config(tmp_path), world)
    states = list((tmp_path / "runs").rglob(ablate.STATE))
    assert len(states) == 1 and ablate.finished(ablate.state_of(states[0].parent)), "it is finished, and the last"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and signal.set_wakeup_fd(-1) == -1


@pytest.fixture
def races(monkeypatch) -> list[RaceConfig]:
    """Races that take no time: what was asked for. With Muon they reach more, with smear some do not end."""
    made = []

    def race(asked: RaceConfig, world) -> SimpleNamespace:
        made.append(asked)
        if asked.corpus == "far away":
            raise UserError("no network")
        (asked.folder / "metrics.jsonl").touch()
        if asked.smear and asked.seed == 1:
            raise UserError("loss nan at step 3: stopped")
        bits = 2.0 - 0.5 * (asked.optimizer == "muon") + 0.1 * asked.seed
        return SimpleNamespace(bits_per_byte=bits, seconds=1.0, data=SimpleNamespace(digest=f"of {asked.corpus}"))

    monkeypatch.setattr(ablate, "race", race)
    return made


def test_stale_runs(tiny, races, tmp_path, world, monkeypatch):
    asked = config(tmp_path, switches="muon")
    ablate.ablate(asked, world)
    runs = len(races)
    assert runs == 6  # base, base-half, muon-off
    monkeypatch.setattr(stale, "sources", lambda: {**stale.source_digests(), "speedrun/optim.py": "changed"})
    with pytest.raises(ValueError, match=r"tiny-6/base/0 is of another run: source .*speedrun/optim.py.*--stale rerun"):
        ablate.ablate(asked, world)
    ablate.ablate(replace(asked, stale="keep"), world)
    assert len(races) == runs
    ablate.ablate(replace(asked, stale="rerun"), world)
    ablate.ablate(asked, world)
    assert len(races) == 2 * runs
    with monkeypatch.context() as patch:  # a new benchmark made "auto" choose others
        patch.setattr(stale, "choose", lambda *_: (Choice(norm="triton"), ""))
        with pytest.raises(ValueError, match="choice kernels: torch there, kernels: norm triton"):
            ablate.ablate(asked, world)
    monkeypatch.setitem(ablate.BASES, "tiny", replace(tiny, muon_lr=0.02))
    for policy in ("refuse", "keep"):
        with pytest.raises(ValueError, match="config muon_lr"):
            ablate.ablate(replace(asked, stale=policy), world)
    assert len(races) == 2 * runs


def test_times_of_another_config_are_not_kept(tiny, tmp_path, world, monkeypatch):
    """Of a switch that has times alone, no run says that the config is another."""
    timed = []
    monkeypatch.setattr(ablate, "step_ratios", lambda on, *_: timed.append(on.muon_lr) or [1.0] * 6)
    asked = config(tmp_path, switches="prefetch", rounds=6, stale="keep")
    ablate.ablate(asked, world)
    monkeypatch.setattr(stale, "sources", lambda: {"speedrun/optim.py": "changed"})
    ablate.ablate(asked, world)
    monkeypatch.setitem(ablate.BASES, "tiny", replace(tiny, muon_lr=0.02))
    ablate.ablate(asked, world)
    assert timed == [tiny.muon_lr, 0.02]


def test_what_only_this_machine_refuses_is_a_reason_too(tiny, races, tmp_path, world, monkeypatch):
    monkeypatch.setattr("minigpt.trainer.cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setitem(ablate.BASES, "tiny", replace(tiny, dtype="auto"))
    rows, _ = ablate.ablate(config(tmp_path, switches="bf16-weights,muon"), world)
    assert "bf16_weights where dtype auto is float32" in rows[-1]["reason"] and rows[0]["bits"]


def test_a_run_that_fails_is_a_reason_and_not_the_end(tiny, races, tmp_path, world):
    rows, _ = ablate.ablate(config(tmp_path), world)
    muon, smear = rows
    assert muon["switch"] == "muon" and muon["bits"].value == pytest.approx(-0.5)
    assert smear["bits"] is None and smear["reason"] == "smear, seed 1: loss nan at step 3: stopped"
    runs = len(races)
    assert ablate.ablate(config(tmp_path), world)[0] == rows and len(races) == runs, "it would fail again"


def test_a_download_that_fails_is_the_end_and_no_result(tiny, races, tmp_path, world, monkeypatch):
    monkeypatch.setitem(ablate.BASES, "tiny", replace(tiny, corpus="far away"))
    for _ in range(2):
        with pytest.raises(UserError, match="no network"):
            ablate.ablate(config(tmp_path), world)
    assert len(races) == 2, "it is tried again"


def test_texts_are_not_mixed(tiny, races, tmp_path, world):
    asked = config(tmp_path, switches="muon")
    _, (result, _) = ablate.ablate(asked, world)
    assert json.loads(result.read_text())["config"]["data_digest"].startswith("of ")
    path = tmp_path / "runs" / "tiny-6" / "base" / "1" / ablate.STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_digest": "of another Python"}))
    with pytest.raises(ValueError, match=r"on 2 texts, digests .*of another Python"):
        ablate.ablate(asked, world)


def test_a_switch_that_the_batch_forbids_says_so_before_anything_runs(tiny, races, tmp_path, world, monkeypatch):
    monkeypatch.setitem(ablate.BASES, "tiny", replace(tiny, batch=6, accumulate=6))
    rows, _ = ablate.ablate(config(tmp_path, switches="batches,muon"), world)
    assert "3 rows at step 0 over 1 ranks x accumulate 6" in rows[-1]["reason"]


def test_nothing_that_can_be_measured(tmp_path, world):
    with pytest.raises(ValueError, match="fp8-head: needs a GPU; overlap: needs two ranks"):
        ablate.ablate(config(tmp_path, base="smoke", switches="overlap,fp8-head"), world)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


# ---- time of a step, source of a run ---------------------------------------------------------------------------------


def test_a_switch_that_sleeps_takes_longer(tiny, world, monkeypatch):
    gradients = step_times.gradients

    def slow(run, *rest):
        time.sleep(0.05 if run.config.smear else 0.0)
        return gradients(run, *rest)

    monkeypatch.setattr(step_times, "gradients", slow)
    monkeypatch.setattr("common.timing.SETTLE_S", 0.0)
    ratios = step_times.step_ratios(replace(tiny, smear=True), tiny, 6, world)
    assert len(ratios) == 6 and statistics.median(ratios) > 1.5


def test_a_schedule_is_timed_in_all_its_parts(tiny, world, monkeypatch):
    steps = []
    make = train.batches

    def noted(run):
        batch_of = make(run)
        return lambda step: steps.append(step) or batch_of(step)

    monkeypatch.setattr(step_times, "batches", noted)
    monkeypatch.setattr("common.timing.SETTLE_S", 0.0)
    base = replace(tiny, steps=12, prefetch=False)
    assert step_times.starts(base) == [0]
    grown = replace(base, windows="8,16,32", untie_at=2 / 3, tied=True)
    assert step_times.starts(grown) == [0, 2, 4, 6, 8, 10]
    step_times.step_ratios(grown, base, 6, world)
    assert set(steps) == set(range(12))


def test_what_differs_is_named():
    before = {"source": {f"{letter}.py": letter for letter in "abcdefg"}, "torch": "2.11"}
    now = {"source": before["source"] | {"c.py": "x"}, "torch": "2.13"}
    assert stale.differences(before, now) == "source c.py; torch 2.11 there, 2.13 here"
    assert stale.differences(before, before | {"source": {}}) == "source a.py, b.py, c.py, d.py, e.py and 2 more"
    assert stale.differences(before, before) == ""
    assert stale.sources() == source_digests() and "speedrun/train.py" in stale.sources()


# ---- the chart -------------------------------------------------------------------------------------------------------


def test_the_chart_sorts_and_colours(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(effects, "save_figure", lambda figure, path: figures.append(figure) or path)
    rows = [
        {"switch": "hurts", "bits": Effect(0.02, 0.01, 0.03, 1e-4), "holm": 2e-4, "time": None},
        {"switch": "timed", "bits": None, "holm": None, "time": Effect(0.7, 0.6, 0.8)},
        {"switch": "refused", "bits": None, "holm": None, "time": None},
        {"switch": "helps", "bits": Effect(-0.02, -0.03, -0.01, 1e-4), "holm": 2e-4, "time": Effect(1.1, 1.0, 1.2)},
        {"switch": "perhaps", "bits": Effect(-0.01, -0.9, 0.88, 0.9), "holm": 0.9, "time": None},
    ]
    effects.chart(tmp_path / "x.png", rows, "title")
    left, right = figures[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["helps", "perhaps", "hurts", "timed"]
    dots = {line.get_ydata()[0]: line for line in left.lines if line.get_marker() == "o"}
    assert [dots[y].get_color() for y in range(3)] == [effects.HELPS, effects.UNCLEAR, effects.HURTS]
    assert dots[1].get_markerfacecolor() == "white" and dots[0].get_markerfacecolor() == effects.HELPS
    low, high = left.get_xlim()
    assert -0.1 < low < -0.02 and 0.02 < high < 0.1, "one wide interval does not flatten the others"
    arrows = [line for line in left.lines if line.get_marker() in (effects.CARETLEFTBASE, effects.CARETRIGHTBASE)]
    assert [line.get_ydata()[0] for line in arrows] == [1, 1]
    with pytest.raises(ValueError, match="nothing to draw"):
        effects.chart(tmp_path / "x.png", rows[2:3], "title")


def test_the_list_of_the_config_is_plain():
    assert all(json.dumps(asdict(switch)) for switch in switches(ablate.SMALL))
