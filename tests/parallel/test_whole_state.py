"""From one process's state dict into parts and back, bitwise; states that are not this model's."""

from dataclasses import replace

import pytest
import torch

from common.dist import spawn
from minigpt.model import GPT
from parallel.model import StageGPT, materialise
from parallel.pieces import Piece
from parallel.whole_state import boxes_of, gather_whole, load_whole
from tests.parallel.cut_gpts import cut, meet
from tests.parallel.gpts import GPT2_LIKE, SMALL, stirred_gpt


def there_and_back(rank, world_size, config, kind):
    mesh, comm = meet(rank, world_size, kind)
    stage, _ = cut(config, mesh, comm)
    return gather_whole(stage, comm)


@pytest.mark.parametrize(
    ("ranks", "config", "kind"),
    [(4, SMALL, "torch"), (2, GPT2_LIKE, "ours"), (3, replace(GPT2_LIKE, heads=6, kv_heads=1, vocab_size=87,
                                                              mlp_width=39), "torch")],
)  # fmt: skip
def test_gathered_is_what_was_loaded(ranks, config, kind):
    first, *others = spawn(there_and_back, ranks, config, kind)
    assert others == [{}] * (ranks - 1)
    state = stirred_gpt(config).state_dict()
    assert list(first) == list(state)
    assert all(torch.equal(first[name], state[name]) for name in state)
    GPT(config, seed=None).load_state_dict(first)  # nothing is missing, nothing is too much


def test_other_states_are_refused_before_anything_is_written():
    stage = StageGPT(SMALL, [0, 1])
    materialise(stage)
    with torch.no_grad():
        for p in stage.parameters():
            p.fill_(7)
    state = GPT(SMALL).state_dict()
    last = "blocks.1.mlp.down.weight"
    with pytest.raises(ValueError, match=f"{last}: missing among the {len(state) - 1} names"):
        load_whole(stage, {name: value for name, value in state.items() if name != last})
    with pytest.raises(ValueError, match=r"blocks.1.mlp.down.weight of shape \(24, 41\): expected \(24, 40\)"):
        load_whole(stage, state | {last: torch.zeros(24, 41)})
    assert all((p == 7).all() for p in stage.parameters())


def test_ranges_of_boxes_are_refused():
    _, comm = meet(0, 1)
    with pytest.raises(ValueError, match=r"elements \(0, 3\) of the box"):
        boxes_of(Piece.whole((2, 3)).cut(0, 3), comm, torch.device("cpu"))
