"""The recipes, the choice among them, and what does not fit a machine: memory against what torch really holds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.cli import UserError
from common.dist import World, spawn
from parallel.memory import LiveBytes
from parallel.model import whole_shapes
from speedrun import fits, presets
from speedrun.config import RaceConfig
from speedrun.fits import check_machine, check_memory, check_same, fitting_parts, need, vocabulary
from speedrun.model import build, race_loss
from speedrun.presets import ON_TRACK, PRESETS, choose_preset, from_command_line, over
from speedrun.schedule import plan
from speedrun.tracks import TRACKS

GIB = 2**30
EVERY = [(track, name) for track, of_track in ON_TRACK.items() for name in of_track] + [("", "smoke")]
ALONE = World(0, 1, 0, torch.device("cpu"), None)


def preset(track: str, name: str) -> RaceConfig:
    return ON_TRACK[track][name] if track else PRESETS[name]


def parameters(config: RaceConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in whole_shapes(config.model_config(vocabulary(config))).values())


@pytest.mark.parametrize(("track", "name"), EVERY)
def test_every_preset_makes_a_model_and_a_plan(track, name):
    config = preset(track, name)
    assert config.track == track
    model = replace(config, attention="torch", kernels="torch").model_config(512)
    assert whole_shapes(model)
    for step in {0, config.steps // 2, config.steps - 1}:
        now = plan(step, config)
        assert now.rows % config.accumulate == 0 and now.rows * now.context > 0 and now.lr_share >= 0


def test_the_sizes_of_the_presets():
    """Of the laptop's baselines as many numbers are multiplied; what they lack are tables that are only looked up."""
    sizes = {(track, name): parameters(preset(track, name)) for track, name in EVERY}
    assert sizes == {
        ("laptop", "laptop"): 11_209_152, ("laptop", "laptop-15"): 15_797_504, ("laptop", "laptop-short"): 2_737_408,
        ("laptop", "laptop-eager"): 11_209_152, ("laptop", "nanogpt"): 2_583_936, ("laptop", "record21"): 4_131_274,
        ("one-gpu", "one-gpu"): 132_136_574, ("one-gpu", "nanogpt"): 70_018_560, ("one-gpu", "record21"): 104_609_556,
        ("fineweb", "fineweb"): 548_559_926, ("fineweb", "nanogpt"): 124_392_960,
        ("fineweb", "record21"): 275_763_998, ("", "smoke"): parameters(PRESETS["smoke"]),
    }  # fmt: skip


def test_nanogpt_on_fineweb_is_gpt_2():
    """Token and position tables, 12 blocks of 12 C², norms with a gain and a bias."""
    C, T, V, layers = 768, 1024, 50_304, 12
    expected = V * C + T * C + layers * (12 * C * C + 4 * C) + 2 * C
    config = ON_TRACK["fineweb"]["nanogpt"]
    assert parameters(config) == expected
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adamw", 6e-4, 0.1)
    assert config.batch * config.context == 524_288 and config.steps == 19_560  # llm.c's, the ladder's first record


@pytest.mark.parametrize("name", ["laptop-short", "smoke"])
def test_two_ranks_can_share_what_says_so(name):
    config = PRESETS[name]
    assert config.clip == 0 and all(plan(step, config).rows % 2 == 0 for step in range(config.steps))


@pytest.mark.parametrize("name", ["fineweb", "nanogpt", "record21"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_one_to_eight_gpus_have_the_same_batch(name, ranks):
    """With as many parts in all, so that a rank works on as many rows at once."""
    alone, shared = ON_TRACK["fineweb"][name], presets.presets("fineweb", ranks)[name]
    assert shared.accumulate * ranks == alone.accumulate
    assert replace(shared, accumulate=alone.accumulate) == alone
    for step in range(0, alone.steps, 100):
        assert plan(step, shared).rows % (ranks * shared.accumulate) == 0
    assert over(alone, 3).accumulate == alone.accumulate, "three ranks do not divide it"


@pytest.mark.parametrize("steps", [1500, 1499, 751, 20])
def test_what_changes_in_fineweb_changes_at_two_steps(steps):
    """Each kind of step is compiled: one that lasts for a few steps would cost minutes for nothing."""
    config = replace(PRESETS["fineweb"], steps=steps)
    assert len({plan(step, config).kind for step in range(steps)}) == 3


# ---- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("track", "cuda", "compiler", "name"),
    [
        ("", False, True, "laptop"), ("", False, False, "laptop-eager"), ("", True, True, "one-gpu"),
        ("laptop", True, True, "laptop"), ("laptop", False, False, "laptop-eager"), ("one-gpu", False, True, "one-gpu"),
        ("fineweb", True, False, "fineweb"), ("laptp", False, True, "laptop"),
    ],
)  # fmt: skip
def test_the_preset_fits_track_and_hardware(track, cuda, compiler, name):
    assert choose_preset(track, cuda, compiler) == name


def asked(*argv: str, monkeypatch, ranks: str = "1", cuda: bool = False) -> RaceConfig:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(presets, "has_compiler", lambda: True)
    return from_command_line(argv)


def test_flags_choose_track_preset_and_parts(monkeypatch):
    assert asked(monkeypatch=monkeypatch) == PRESETS["laptop"]
    assert asked(monkeypatch=monkeypatch, cuda=True) == PRESETS["one-gpu"]
    assert asked("--device", "cpu", monkeypatch=monkeypatch, cuda=True) == PRESETS["laptop"]
    assert asked("--track", "fineweb", monkeypatch=monkeypatch, ranks="8") == over(PRESETS["fineweb"], 8)
    for track in TRACKS:
        for name in ("nanogpt", "record21"):
            found = asked("--preset", name, "--track", track, monkeypatch=monkeypatch)
            assert found == ON_TRACK[track][name] and found.track == track
    assert asked("--preset", "nanogpt", monkeypatch=monkeypatch) == ON_TRACK["laptop"]["nanogpt"]
    for name in ("nanogpt", "record21"):  # beside what the machine races by default
        assert asked("--preset", name, monkeypatch=monkeypatch, cuda=True) == ON_TRACK["one-gpu"][name]
        on_cpu = asked("--preset", name, "--device", "cpu", monkeypatch=monkeypatch, cuda=True)
        assert on_cpu == ON_TRACK["laptop"][name]


def test_own_text_is_on_no_track(monkeypatch, tmp_path):
    assert asked("--corpus", str(tmp_path), monkeypatch=monkeypatch).track == ""
    assert asked("--corpus", "stdlib", monkeypatch=monkeypatch).track == "laptop"
    found = asked("--corpus", "fineweb10B:9", "--preset", "fineweb", monkeypatch=monkeypatch)
    assert (found.track, found.corpus) == ("fineweb", "fineweb10B:9")
    assert asked("--track", "", "--device", "cuda", monkeypatch=monkeypatch).track == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--track", "laptop", "--corpus", "other"), "corpus 'other' on track laptop: expected stdlib"),
        (("--track", "fineweb", "--corpus", "stdlib"), "corpus 'stdlib' on track fineweb: expected fineweb10B:N"),
        (("--track", "fineweb", "--tokenizer", "bpe:512"), "tokenizer 'bpe:512' on track fineweb: expected auto"),
        (("--track", "one-gpu", "--device", "cpu"), "device 'cpu' on track one-gpu: expected cuda"),
        (("--track", "laptp"), "track 'laptp': expected one of laptop, one-gpu, fineweb; the nearest is laptop"),
        (("--track",), "--track: expected one argument"),
        (("--track", "laptop", "--preset", "one-gpu"), "got 'one-gpu'"),
        (("--preset", "lapto"), "did you mean laptop?"),
        (("--unet-skip",), "unrecognized arguments: --unet-skip; did you mean --unet-skips"),
        (("--unet=1",), "unrecognized arguments: --unet=1; did you mean --unet-skips?"),
    ],
)
def test_flags_that_contradict_or_do_not_exist(argv, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        asked(*argv, monkeypatch=monkeypatch)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1 and message in said, said


# ---- what does not fit -----------------------------------------------------------------------------------------------

SMALL = replace(
    PRESETS["one-gpu"], track="", layers=3, width=64, heads=2, kv_heads=2, mlp_width=192, context=640, eval_stride=640,
    batch=3, norm="layernorm", attention="torch", kernels="torch", compile=False,
)  # fmt: skip


def bare(config: RaceConfig) -> RaceConfig:
    off = dict.fromkeys(("value_embeddings", "value_gate", "attention_gate", "x0_skip", "backout", "smear"), False)
    return replace(config, **off)


WEIGHTS = replace(  # of which most of the memory is, and their gradients are there when the second part begins
    bare(SMALL), width=512, heads=4, kv_heads=4, mlp_width=2048, context=64, eval_stride=64, batch=2, accumulate=2
)


def living(config: RaceConfig, vocab_size: int, half: bool) -> int:
    """Bytes at the worst moment of the forward and backward passes of a batch; torch's LayerNorm on a CPU keeps what
    GPUs keep."""
    model, live = build(config, vocab_size), LiveBytes()
    tokens_BT = torch.randint(0, vocab_size, (config.batch, config.context))
    with live:
        for p in model.parameters():
            live.add(p)
        for part_BT in tokens_BT.chunk(config.accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss, _ = race_loss(model(part_BT), part_BT, plan(0, config).mtp)
            loss.backward()
    return live.peak


@pytest.mark.parametrize(
    ("config", "vocab_size", "half"),
    [
        (SMALL, 1024, True), (SMALL, 1024, False), (bare(SMALL), 256, True), (replace(SMALL, layers=1), 4096, True),
        (replace(SMALL, softcap=0.0, mlp="gelu"), 2048, True), (replace(SMALL, mtp="1,0.5,0.25"), 2048, True),
        (replace(SMALL, mlp="swiglu", qk_norm=False), 512, True), (WEIGHTS, 256, True), (WEIGHTS, 256, False),
    ],
)  # fmt: skip
def test_the_prediction_is_what_torch_holds(config, vocab_size, half):
    found, wanted = living(config, vocab_size, half), need(config, vocab_size, half=half)
    predicted = wanted.parameters + wanted.gradients + wanted.activations + wanted.logits
    assert abs(predicted / found - 1) <= 0.07, (predicted / 2**20, found / 2**20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_prediction_bounds_what_a_gpu_holds():
    config = replace(SMALL, width=512, mlp_width=2048, heads=4, kv_heads=4, batch=8, context=1024, eval_stride=1024)
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = build(config, 16_384).to(device)
    tokens_BT = torch.randint(0, 16_384, (8, 1024), device=device)
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = race_loss(model(tokens_BT), tokens_BT, (1.0,))
    loss.backward()
    found, wanted = torch.cuda.max_memory_allocated() - before, need(config, 16_384)
    predicted = wanted.parameters + wanted.gradients + wanted.activations + wanted.logits
    assert 0.8 <= predicted / found <= 1.25, (predicted, found)


def test_states_are_shared_and_parts_save_memory():
    alone, shared = need(PRESETS["fineweb"], 50_257), need(over(PRESETS["fineweb"], 8), 50_257, ranks=8)
    assert shared.optimizer == pytest.approx(alone.optimizer / 8, rel=0.01)
    assert shared.logits == alone.logits, "as many rows at once"
    halved = need(replace(PRESETS["fineweb"], accumulate=32), 50_257)
    assert 2 * halved.logits == alone.logits and halved.total < alone.total


def test_too_little_memory_names_what_fits():
    config = PRESETS["one-gpu"]
    check_memory(config, 16_384, 1, None)
    check_memory(config, 16_384, 1, need(config, 16_384).total)
    parts, wanted = fitting_parts(config, 16_384, 1, 16 * GIB)
    assert config.batch % parts == 0 and wanted <= 16 * GIB
    assert need(replace(config, accumulate=parts // 2), 16_384).total > 16 * GIB, "the fewest"
    with pytest.raises(UserError, match=rf"needs about .* GiB .*, 16.0 GiB are free: --accumulate {parts} needs"):
        check_memory(config, 16_384, 1, 16 * GIB)
    fitting = "laptop-15, laptop(-eager)?, laptop(-eager)?, laptop-short, smoke"
    with pytest.raises(UserError, match=f"and no --accumulate makes it fit: presets that do: {fitting}$"):
        check_memory(config, 16_384, 1, GIB)
    with pytest.raises(UserError, match="presets that do: none$"):
        check_memory(config, 16_384, 1, 2**20)
    with pytest.raises(UserError, match="--accumulate 24 needs"):  # 64, 128, 192 rows: parts have to divide them all
        fits.check_memory(replace(PRESETS["fineweb"], batch=48, batches="48,96,144"), 50_257, 1, 32 * GIB)


def test_a_run_that_does_not_fit_writes_nothing(tmp_path, monkeypatch):
    from speedrun import train

    text = tmp_path / "text.py"
    text.write_bytes(Path(json.__file__).read_bytes())
    monkeypatch.setattr(train, "free_memory", lambda device: 2**20)
    config = replace(PRESETS["smoke"], corpus=str(text), folder=tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match="this run needs about 0.0 GiB"):
        train.race(config, ALONE)
    assert not config.folder.exists()


def test_mixed_gpus_are_named():
    check_same(["NVIDIA H100"] * 8)
    text = "GPUs of several kinds: NVIDIA H100 on rank 0, 2; NVIDIA A100 on rank 1: expected one kind"
    with pytest.raises(UserError, match=text):
        check_same(["NVIDIA H100", "NVIDIA A100", "NVIDIA H100"])


def names_by_rank(rank: int, world_size: int, *cases: tuple[str, ...]) -> list[str]:
    found = []
    for names in cases:
        try:
            check_machine("", World(rank, world_size, rank, torch.device("cpu"), "gloo"), names[rank])
            found.append("")
        except UserError as error:
            found.append(str(error))
    return found


def test_every_rank_refuses_mixed_gpus():
    for same, other in spawn(names_by_rank, 2, ("H100", "H100"), ("H100", "H200")):
        assert same == "" and "H100 on rank 0; H200 on rank 1" in other


def test_a_track_for_another_device():
    check_machine("laptop", ALONE)
    with pytest.raises(ValueError, match="track one-gpu on cpu: expected cuda; on cpu there is --track laptop, and"):
        check_machine("one-gpu", ALONE)


def test_more_gpus_than_a_track_allows():
    for track, gpus in (("one-gpu", 1), ("fineweb", 8)):
        world = World(0, gpus + 1, 0, torch.device("cuda"), "nccl")
        with pytest.raises(ValueError, match=f"track {track} on {gpus + 1} GPUs: expected at most {gpus}; --track ''"):
            check_machine(track, world, "NVIDIA H100")
