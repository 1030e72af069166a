"""The divergence finder: two layouts that agree agree, and a change in one of them is found where it begins."""

from dataclasses import replace

import pytest
import torch

from common.dist import spawn
from parallel.comm import make_comm
from parallel.divergence import Recording, assemble, first_difference, record
from parallel.mesh import Layout, Mesh
from parallel.model import StageGPT, materialise, split_layers
from parallel.pieces import Piece, even_range, piece_of
from tests.parallel.gpts import GPT2_LIKE, SMALL, batch, stir

ROWS, TOLERANCE = 4, 1e-12
SINGLE = Layout()
DATA = Layout(dp=2, fsdp=2)
PIPELINE = Layout(pp=2, dp=2)


def filled(config, layers=None, change=""):
    """A stage in float64 with the same stirred weights whatever its layers; one number of `change` is another."""
    whole = StageGPT(config)
    values = stir(dict(whole.named_parameters()))
    stage = StageGPT(config, layers)
    materialise(stage, dtype=torch.float64)
    with torch.no_grad():
        for name, p in stage.named_parameters():
            p.copy_(values[name])
            if name == change:
                p.view(-1)[3] += 1e-3
    return stage


def step(stage, config, rows, parts=1):
    """The recording of one step on these rows, in `parts` micro-batches."""
    tokens_BT, targets_BT = batch(config, ROWS)
    with record([stage]) as recording:
        for part, wanted in zip(tokens_BT[rows].chunk(parts), targets_BT[rows].chunk(parts), strict=True):
            (stage(None, part, wanted) / parts).backward()
    return recording


def pieces(stage):
    return {name: piece_of(p) for name, p in stage.named_parameters()}


def single(config, change="", parts=1):
    stage = filled(config, change=change)
    recording = step(stage, config, slice(None), parts)
    recording.keep(dict(stage.named_parameters()), pieces(stage))
    return assemble([recording], SINGLE)


def data_rank(rank, world_size, config, change, faulty):
    """Rows by rank, gradients averaged, and each rank says only its quarter of every parameter, as FSDP would."""
    stage = filled(config, change=change)
    world = make_comm(Mesh(DATA, rank, world_size).group("dp", "fsdp"))
    recording = step(stage, config, slice(rank, rank + 1))
    for name, p in stage.named_parameters():
        world.all_reduce(p.grad, "mean")
        if name == faulty and rank == 2:
            p.grad.view(-1)[even_range(p.numel(), rank, world_size)[1] - 1] += 1e-3
        piece = Piece.whole(tuple(p.shape)).cut(*even_range(p.numel(), rank, world_size))
        recording.parameters[name] = piece, piece.of(p.detach()).clone()
        recording.parameter_gradients[name] = piece, piece.of(p.grad).clone()
    return recording


def data_runs(rank, world_size, config, faults):
    return [data_rank(rank, world_size, config, *fault) for fault in faults]


FAULTS = [("", ""), ("blocks.1.mlp.up.weight", ""), ("", "blocks.1.attention.key.weight"), ("embedding.weight", "")]


@pytest.fixture(scope="module")
def data():
    """For each of FAULTS, the run of four ranks."""
    by_rank = spawn(data_runs, 4, SMALL, FAULTS)
    return [assemble([recordings[index] for recordings in by_rank], DATA) for index in range(len(FAULTS))]


def test_equal_layouts_have_no_difference_and_everything_is_compared(data):
    for a, b in ((single(SMALL), data[0]), (single(SMALL), single(SMALL, parts=2)), (data[0], single(SMALL, parts=4))):
        assert first_difference(a, b, TOLERANCE) is None
    whole = single(SMALL)
    names = [name for name, _ in StageGPT(SMALL).named_modules() if name]
    assert {name for kind, name in whole.values if kind == "output"} >= {"blocks.0", "blocks.2.mlp.down", "norm"}
    assert {name for kind, name in whole.values if kind == "output"} <= {*names, "model"}
    assert sum(kind == "gradient of" for kind, _ in whole.values) == len(list(StageGPT(SMALL).parameters()))
    assert {key for key in whole.values if key[0] != "output" or key[1] != "model"} == {
        key for key in data[0].values if key[0] != "output" or key[1] != "model"
    }


def test_the_module_of_a_perturbed_weight_is_named(data):
    up = first_difference(single(SMALL), data[1], TOLERANCE)
    assert (up.kind, up.name) == ("output", "blocks.1.mlp.up")
    assert up.agreed[-1] == "output blocks.1.mlp_norm" and "output blocks.0" in up.agreed
    assert str(up).startswith("output blocks.1.mlp.up differs first, by ") and "the last that agrees" in str(up)
    assert first_difference(single(SMALL, change="blocks.1.mlp.up.weight"), data[1], TOLERANCE) is None
    assert first_difference(single(SMALL), data[1], 1.0) is None


def test_a_gradient_that_is_wrong_on_one_rank_is_named(data):
    found = first_difference(single(SMALL), data[2], TOLERANCE)
    assert (found.kind, found.name) == ("gradient of", "blocks.1.attention.key.weight")
    shape = (SMALL.kv_heads * SMALL.key_width, SMALL.width)
    third = even_range(shape[0] * shape[1], 2, 4)[1] - 1  # the last element of rank 2's part
    assert found.place == (third // shape[1], third % shape[1])


def pipeline_run(config, change=""):
    """What the ranks of two stages and two data ranks see, computed here one after the other."""
    recordings = [Recording() for _ in range(4)]
    for data_rank in range(2):
        stages = [filled(config, layers, change) for layers in split_layers(config.layers, 2)]
        tokens_BT, targets_BT = (x[2 * data_rank : 2 * data_rank + 2] for x in batch(config, ROWS))
        with record(stages[:1]) as first, record(stages[1:]) as last:
            x_BTC = stages[0](None, tokens_BT)
            received = x_BTC.detach().requires_grad_()
            stages[1](received, tokens_BT, targets_BT).backward()
            x_BTC.backward(received.grad)
        recordings[data_rank], recordings[2 + data_rank] = first, last
    return assemble(recordings, PIPELINE)


def test_the_modules_of_pipeline_stages_are_found_on_their_ranks():
    for config in (SMALL, replace(GPT2_LIKE, tied=False)):
        whole = single(config)
        assert first_difference(whole, pipeline_run(config), TOLERANCE) is None
        found = first_difference(whole, pipeline_run(config, "blocks.2.attention.output.weight"), TOLERANCE)
        assert (found.kind, found.name) == ("output", "blocks.2.attention.output")
        assert not any("blocks" in text for text in found.skipped)


def test_parts_of_tensor_parallel_ranks_are_put_together():
    """Copies, positions and channels in parts, and copies that are not the same."""
    x_BTC = torch.randn(2, 6, 8, dtype=torch.float64)
    layout = Layout(tp=2)

    def run(parts):
        return assemble([Recording(outputs={"blocks.0": [part]}) for part in parts], layout)

    whole = assemble([Recording(outputs={"blocks.0": [x_BTC]})], SINGLE)
    for parts in ([x_BTC, x_BTC.clone()], x_BTC.chunk(2, 1), x_BTC.chunk(2, 2)):
        assert first_difference(whole, run(parts), 0.0) is None
    other = x_BTC.clone()
    other[1, 5, 7] += 1
    for parts in ([x_BTC, other], [other, x_BTC], other.chunk(2, 1), other.chunk(2, 2)):
        assert first_difference(whole, run(parts), 1e-9).place == (1, 5, 7)
    other[1, 5, 7] = float("nan")
    assert first_difference(whole, run([x_BTC, other]), 1e-9).place == (1, 5, 7)
    with pytest.raises(ValueError, match="nothing that can be compared"):
        first_difference(whole, run(x_BTC[..., :6].chunk(2, 2)), 0.0)
    with pytest.raises(ValueError, match="1 recordings for 2 ranks"):
        assemble([Recording()], layout)


def test_copies_of_a_parameter_that_differ_are_a_difference():
    p = torch.arange(6.0).view(2, 3)
    piece = Piece.whole((2, 3))
    run = assemble([Recording(parameters={"w": (piece, p)}), Recording(parameters={"w": (piece, p + 1)})], Layout(dp=2))
    found = first_difference(assemble([Recording(parameters={"w": (piece, p + 1)})], SINGLE), run, 1e-6)
    assert (found.kind, found.name) == ("parameter", "w")


def checkpointed(block, x_BTC, sight):
    return torch.utils.checkpoint.checkpoint(block, x_BTC, sight, use_reentrant=False)


def test_what_checkpointing_computes_again_is_not_recorded():
    stage = filled(SMALL)
    stage.run_block = checkpointed
    recording = step(stage, SMALL, slice(None))
    assert {len(calls) for calls in recording.outputs.values()} == {1}
    plain = step(filled(SMALL), SMALL, slice(None))
    assert list(plain.outputs) == list(recording.outputs)
