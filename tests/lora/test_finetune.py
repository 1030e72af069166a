"""The program: all methods on a tiny base, its files against each other, kills and interrupts, ranks, wrong calls."""

import json
import shutil
import signal
import sys
from dataclasses import asdict, replace

import pytest
import torch

from common.log import read_jsonl
from lora import report
from lora.adapter_file import load_own
from lora.finetune import configured, finetune
from lora.finetune_config import METHODS, PRESETS, FinetuneConfig
from lora.finetuner import Finetuner
from lora.judge import Judged, judge, loss_of, read_judged
from lora.peft_files import load_adapter
from lora.qlora import quantise_base
from lora.statistics import compare
from lora.task import load_task
from minigpt.checkpoint import TOKENIZER, load_run, save_checkpoint
from minigpt.hf import load_pretrained, save_pretrained
from minigpt.sample import SourceConfig, load_source
from minigpt.tokenizer import GPT4, Tokenizer
from tests.lora.finetune_runs import BYTES, TINY, alone, comm_of, lines, tiny_config, write_base, write_lines
from tests.lora.test_finetune_parts import LLAMA
from tests.minigpt import programs
from tests.minigpt.models import random_gpt

FILES = ("metrics.jsonl", "held_out.jsonl", "summary.json")


class Killed(BaseException):
    """What nothing in the program catches."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[FinetuneConfig, str]:
    config = tiny_config(tmp_path_factory.mktemp("finetune"), steps=40, eval_every=10, checkpoint_every=20)
    return config, finetune(config, alone())


def autocast():
    return torch.autocast("cpu", torch.bfloat16, enabled=False)


def test_every_method_learns_and_says_by_how_much(finished):
    config, text = finished
    assert (config.folder / "report.md").read_text() == text and (config.folder / "curves.png").stat().st_size > 5000
    base = read_judged(config.folder / "base.jsonl")
    for method in METHODS:
        summary = json.loads((config.folder / method / "summary.json").read_text())
        before, after = (read_judged(p) for p in (config.folder / summary["start"], config.folder / method / FILES[1]))
        assert loss_of(after) < loss_of(before) - 1 and summary["steps"] == 40
        rows = read_jsonl(config.folder / method / FILES[0])
        curve = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
        assert curve[0] == pytest.approx(loss_of(before), rel=1e-6) and len(curve) == 5
        assert curve[-1] == pytest.approx(loss_of(after), rel=1e-6)
        assert f"| {method} | {summary['trained']:,} of {summary['parameters']:,} |" in text
        assert f"| {loss_of(before):.3f} → {loss_of(after):.3f} |" in text
        right = [[each.exact for each in judged] for judged in (after, base)]
        assert str(compare(method, right[0], "base", right[1])) in text
    assert text.count("exact McNemar p") == 10 and base[0].prompt in text


def test_what_is_left_behind_answers_as_it_was_judged(finished):
    config, _ = finished
    source = load_source(SourceConfig(folder=config.folder_of_base))
    task = load_task(config, source)
    for method in METHODS:
        if method == "full":
            model, _ = load_run(config.folder / method)
        else:
            model = load_run(config.folder_of_base)[0]
            if method == "qlora":
                quantise_base(model, config.base_format)
            adapter = load_own(model, config.folder / method / "adapter")
            assert (adapter.blocks > 1) == (method == "bd-lora")
        judged = judge(model, task, source.tokenizer, comm_of(), autocast)
        assert judged == read_judged(config.folder / method / FILES[1]), method


def test_adapters_are_of_about_one_size_and_the_base_of_full_bytes(finished):
    config, _ = finished
    of = {method: json.loads((config.folder / method / FILES[2]).read_text()) for method in METHODS}
    assert of["lora"]["trained"] == of["qlora"]["trained"]
    assert of["bd-lora"]["trained"] == pytest.approx(of["lora"]["trained"], rel=0.2)
    assert of["bd-lora"]["rank"] > of["lora"]["rank"] and of["bd-lora"]["blocks"] == 2
    assert of["full"]["trained"] == of["full"]["parameters"]
    assert of["qlora"]["frozen_bytes"] != of["lora"]["frozen_bytes"] == of["bd-lora"]["frozen_bytes"]
    assert of["lora"]["frozen_sha256"] == of["bd-lora"]["frozen_sha256"]


def test_rows_come_in_the_same_order_for_all(finished):
    config, _ = finished
    tokens = {m: [row.get("tokens") for row in read_jsonl(config.folder / m / FILES[0])] for m in METHODS}
    assert len({tuple(each) for each in tokens.values()}) == 1


def test_a_killed_run_goes_on_and_done_methods_stay(finished, tmp_path, monkeypatch):
    config, text = finished
    mine = replace(config, folder=tmp_path / "run")
    original, calls = Finetuner.update, []

    def dying(self, stop=False):
        calls.append(self.method)
        if self.method == "qlora" and calls.count("qlora") == 27:
            raise Killed
        return original(self, stop)

    monkeypatch.setattr(Finetuner, "update", dying)
    with pytest.raises(Killed):
        finetune(mine, alone())
    assert not (mine.folder / "qlora" / "summary.json").exists() and len(calls) == 40 + 40 + 27
    monkeypatch.setattr(Finetuner, "update", lambda *a, **k: (calls.append(a[0].method), original(*a, **k))[1])
    calls.clear()
    assert without_seconds(finetune(replace(mine, resume=True), alone())) == without_seconds(text)
    assert calls == ["qlora"] * 20 + ["bd-lora"] * 40  # from the checkpoint of step 20 on
    for method in METHODS:
        for name in FILES[:2]:
            assert (mine.folder / method / name).read_bytes() == (config.folder / method / name).read_bytes(), method
    for method in METHODS[1:]:
        adapters = [each / method / "adapter" / "adapter.safetensors" for each in (mine.folder, config.folder)]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()
    calls.clear()
    assert without_seconds(finetune(replace(mine, resume=True), alone())) == without_seconds(text) and not calls


def without_seconds(text: str) -> list[str]:
    """The last column of the table is the only thing that a clock decides."""
    return [line.rpartition(" MB |")[0] or line for line in text.splitlines()]


def test_one_method_first_and_all_later(tmp_path):
    config = tiny_config(tmp_path, method="lora", steps=2)
    text = finetune(config, alone())
    assert "| lora |" in text and "| full |" not in text and text.count("exact McNemar p") == 1
    text = finetune(replace(config, method="all", resume=True), alone())
    assert all(f"| {method} |" in text for method in METHODS)


def test_the_report_keeps_methods_of_earlier_sittings(tmp_path):
    config = tiny_config(tmp_path, method="lora", steps=2)
    finetune(config, alone())
    text = finetune(replace(config, method="qlora", resume=True), alone())
    assert "| lora |" in text and "| qlora |" in text and text.count("exact McNemar p") == 3


def test_ctrl_c_during_the_last_step_stops_before_the_next_method(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, steps=2)
    update = Finetuner.update
    monkeypatch.setattr(Finetuner, "update", lambda self, stop=False: update(self, stop=self.step == 1))
    with pytest.raises(KeyboardInterrupt):
        finetune(config, alone())
    assert not (config.folder / "full" / "summary.json").exists() and not (config.folder / "lora").exists()
    monkeypatch.setattr(Finetuner, "update", update)
    assert "| bd-lora |" in finetune(replace(config, resume=True), alone())


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    config = tiny_config(tmp_path, method="lora", steps=4000, checkpoint_every=1000)
    flags = flags_of(config, "method", "steps", "checkpoint_every")
    process = programs.start("lora.finetune", *flags)
    code, out, err = programs.send_after(process, config.folder / "lora", 20, signal.SIGINT)
    assert code == 130, err
    assert f"continue with: python -m lora.finetune --folder {config.folder} --resume" in out
    steps = len((config.folder / "lora" / "metrics.jsonl").read_bytes().splitlines()) - 1
    assert f"holds step {steps}" in out and list((config.folder / "lora" / "checkpoints").glob(f"step_*{steps}"))


@pytest.mark.slow
def test_torchrun_computes_what_one_process_computes(tmp_path):
    config = tiny_config(tmp_path, method="bd-lora", batch=3)
    finetune(config, alone())
    two = replace(config, folder=tmp_path / "two")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    code, out, err = programs.run("lora.finetune", *flags_of(two, "method", "steps"), launcher=launcher)
    assert code == 0, err
    assert "2 ranks" in out and "| bd-lora |" in out
    one, other = (read_jsonl(each.folder / "bd-lora" / "metrics.jsonl") for each in (config, two))
    assert [row.keys() for row in one] == [row.keys() for row in other]
    for row, same in zip(one, other, strict=True):
        assert all(same[name] == pytest.approx(value, rel=1e-4) for name, value in row.items())


def flags_of(config: FinetuneConfig, *names: str) -> list[str]:
    """The command line of tiny_config with these fields of its own."""
    always = ("folder", "folder_of_base", "data", "held_out_share", "rank", "alpha", "batch", "warmup", "eval_every")
    pairs = {name: getattr(config, name) for name in (*always, "dtype", "device", "full_lr", "adapter_lr", *names)}
    return [text for name, value in pairs.items() for text in ("--" + name.replace("_", "-"), str(value))]


# -- command line and wrong calls --
def test_flags_beside_resume_are_compared(finished, tmp_path):
    config, _ = finished
    folder = ["--folder", str(config.folder), "--resume"]
    assert configured(folder) == replace(config, resume=True)
    assert configured([*folder, "--method", "qlora"]) == replace(config, resume=True, method="qlora")
    with pytest.raises(ValueError, match=r"another config: rank is 4 there, 8 asked$"):
        configured([*folder, "--rank", "8"])
    with pytest.raises(ValueError, match="another config: .*batch is 3 there, 4 asked"):
        configured([*folder, "--preset", "smoke"])
    with pytest.raises(ValueError, match=r"config.json: no such file; expected the folder of a run"):
        configured(["--folder", str(tmp_path), "--resume"])
    for other in ({"config": {"folder": "x", "resume": False, "steps": 3}}, {"config": 3}, {}):  # minigpt.train's, say
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=r"config.json: expected the config of a run that this lora.finetune"):
            configured(["--folder", str(tmp_path), "--resume"])
    assert configured([]) == PRESETS["laptop"]


def test_a_run_is_not_overwritten(finished):
    config, _ = finished
    with pytest.raises(ValueError, match=r"already holds a run \(config.json\): continue with --resume"):
        finetune(config, alone())


def test_without_a_base_it_says_where_one_comes_from(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no model there: make one with `make speedrun`"):
        finetune(FinetuneConfig(folder=tmp_path / "run", folder_of_base=tmp_path / "nowhere"), alone())
    assert not (tmp_path / "run").exists()


def test_what_a_later_method_refuses_is_said_before_the_first(tmp_path):
    config = tiny_config(tmp_path, blocks=7)
    with pytest.raises(ValueError, match=r"blocks 7: .*expected a multiple of the number of blocks"):
        finetune(config, alone())
    assert not config.folder.exists()


def test_another_base_or_other_data_are_not_resumed(finished, tmp_path):
    config, _ = finished
    mine = replace(config, folder=tmp_path / "run", resume=True)
    shutil.copytree(config.folder, mine.folder)
    (mine.folder / "lora" / "summary.json").unlink()
    data = write_lines(tmp_path / "data.jsonl", lines(41))
    with pytest.raises(ValueError, match="belongs to another run: data digest is .* there"):
        finetune(replace(mine, data=data), alone())


@pytest.mark.parametrize("changed", ["data", "base", "tokenizer"])
def test_done_methods_are_not_compared_with_those_of_another_base_or_other_data(tmp_path, changed):
    """The names stay, so the config is the same; and the next method has no checkpoint that could tell."""
    config = tiny_config(tmp_path, method="lora", steps=2)
    finetune(config, alone())
    before = (config.folder / "config.json").read_bytes()
    if changed == "data":
        write_lines(config.data, [row | {"answer": row["answer"] + "?"} for row in lines()])
    elif changed == "base":
        model, tokenizer = load_run(config.folder_of_base)
        with torch.no_grad():
            model.head.weight[3, 4] += 1e-3
        shutil.rmtree(config.folder_of_base)
        save_checkpoint(
            config.folder_of_base, 1, {"model_config": asdict(model.config)}, {"model": model.state_dict()}, 1
        )
        tokenizer.save(config.folder_of_base / TOKENIZER)
    else:
        other = Tokenizer({bytes([255 - b]): b for b in range(256)}, GPT4, BYTES.special)
        other.save(config.folder_of_base / TOKENIZER)
    what = {"data": "data digest", "base": "base digest", "tokenizer": "base tokenizer"}[changed]
    with pytest.raises(ValueError, match=f"config.json belongs to another run: {what} is [^;]* asked$"):
        finetune(replace(config, method="full", resume=True), alone())
    assert (config.folder / "config.json").read_bytes() == before and not (config.folder / "full").exists()


def test_a_report_compares_answers_to_the_same_examples_only():
    judged = [Judged(f"p{i}", "a", "b", 1.0, 2, False, 0.0, None) for i in range(4)]
    assert report.compared("a", judged, "b", judged)[0].test.p_value == 1
    for other in (judged[::-1], [replace(judged[0], wanted="c"), *judged[1:]], judged[1:]):
        with pytest.raises(ValueError, match="a and b were judged on other examples"):
            report.compared("a", judged, "b", other)


def test_the_interval_of_the_loss_draws_tokens_with_nats():
    """Every answer is 1 nat a token worse, long or short: then so is any draw of them."""
    one = [Judged(f"p{i}", "a", "b", 2.0 * i, i, False, 0.0, None) for i in range(1, 30)]
    other = [replace(each, nats=each.nats - each.tokens) for each in one]
    _, loss, _ = report.compared("a", one, "b", other)
    assert (loss.difference, loss.low, loss.high) == pytest.approx((1, 1, 1), rel=1e-12)


def test_a_report_has_no_control_characters():
    text = report.shown("a\x1b[31m\x00é\n```\x9b")
    assert text == "a\\x1b[31m\\x00é ⏎ '''\\x9b" and text.isprintable()


def test_a_report_needs_a_method(tmp_path):
    with pytest.raises(ValueError, match="no method: expected at least one"):
        report.write(tmp_path, (), True)


def test_a_hugging_face_model_is_a_base_too(tmp_path):
    """Its own opening, adapters in PEFT's files."""
    save_pretrained(random_gpt(**TINY | LLAMA).float(), tmp_path / "llama", tokenizer=BYTES)
    write_base(tmp_path / "base_run")
    write_lines(tmp_path / "data.jsonl", lines())
    config = tiny_config(tmp_path, hf=tmp_path / "llama", steps=2)
    assert "| bd-lora |" in finetune(config, alone())
    source = load_source(SourceConfig(hf=tmp_path / "llama"))
    for method in METHODS[1:]:
        model = load_pretrained(tmp_path / "llama")
        if method == "qlora":
            quantise_base(model, config.base_format)
        load_adapter(model, config.folder / method / "adapter")
        judged = judge(model, load_task(config, source), source.tokenizer, comm_of(), autocast)
        assert judged == read_judged(config.folder / method / FILES[1]), method
    full = load_source(SourceConfig(hf=config.folder / "full" / "model"))
    assert full.opening == source.opening == ()
    judged = judge(full.model, load_task(config, full), full.tokenizer, comm_of(), autocast)
    assert judged == read_judged(config.folder / "full" / FILES[1])
