"""The loss of a vocabulary in parts against torch's on whole logits; what the embedding does with ids nobody has."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.dist import spawn
from minigpt.model import mean_cross_entropy
from parallel.tensor_region import Region
from parallel.vocab_parallel import VocabCrossEntropy, VocabEmbedding, gather_logits
from tests.parallel.cut_gpts import meet
from tests.parallel.gpts import error


def words_of(rank, world_size, vocabulary):
    return rank * vocabulary // world_size, (rank + 1) * vocabulary // world_size


def logits_of(rows, vocabulary, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*rows, vocabulary, generator=generator, dtype=torch.float64)
    return logits, torch.randint(vocabulary, rows, generator=generator)


def check_losses(rank, world_size):
    _, comm = meet(rank, world_size)
    found = {}
    for rows in ((2, 7), (1, 1)):
        for vocabulary in (world_size, 5 * world_size):
            start, stop = words_of(rank, world_size, vocabulary)
            for scale in (1.0, 1e3):
                for z_loss in (0.0, 0.3):
                    logits, targets = logits_of(rows, vocabulary, scale)
                    if rows == (2, 7):
                        targets[0, 2:4] = -100
                    logits.requires_grad_()
                    want = mean_cross_entropy(logits, targets, z_loss)
                    (3 * want).backward()
                    part = logits.detach()[..., start:stop].clone().requires_grad_()
                    got = VocabCrossEntropy(comm, (start, stop), vocabulary)(part, targets, z_loss)
                    (3 * got).backward()
                    case = f"{rows} {vocabulary} {scale} {z_loss}"
                    found[case] = max(error(got, want), error(part.grad, logits.grad[..., start:stop]))
                    same = got.detach().clone()
                    comm.all_reduce(same, "max")
                    assert torch.equal(same, got.detach())
                    assert torch.equal(gather_logits(part, comm), logits.detach())
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_loss_and_gradient_are_those_of_whole_logits(ranks):
    for found in spawn(check_losses, ranks):
        for case, value in found.items():
            assert value <= 1e-12, case


def check_odd_values(rank, world_size):
    _, comm = meet(rank, world_size)
    words = words_of(rank, world_size, 6)
    loss_fn = VocabCrossEntropy(comm, words, 6)

    def loss(logits, targets, **options):
        return loss_fn(logits[:, words[0] : words[1]].contiguous(), targets, **options).item()

    logits, targets = logits_of((4,), 6, 1.0)
    spoilt, masked = logits.clone(), logits.clone()
    spoilt[1, 0] = math.nan  # of rank 0 alone
    masked[:, 3:] = -math.inf  # all words of rank 1: padding that must not be predicted
    refused = []
    for wrong in (6, -1, 10**6):
        try:
            loss(logits, torch.tensor([0, wrong, 2, 3]))
        except (RuntimeError, IndexError):
            refused.append(wrong)
    few = targets % 3
    return loss(spoilt, targets), loss(masked, few) - F.cross_entropy(masked, few).item(), \
        loss(logits, torch.full((4,), -100)), refused  # fmt: skip


def test_nan_masked_words_no_targets_and_targets_out_of_range():
    for spoilt, masked, none, refused in spawn(check_odd_values, 2):
        assert math.isnan(spoilt)
        assert abs(masked) <= 1e-12
        assert math.isnan(none)  # as torch: a mean over nothing
        assert refused == [6, -1, 10**6]


def check_embedding(rank, world_size):
    _, comm = meet(rank, world_size)
    words = words_of(rank, world_size, 9)
    generator = torch.Generator().manual_seed(3)
    whole = nn.Embedding.from_pretrained(torch.randn(9, 4, generator=generator, dtype=torch.float64), freeze=False)
    tokens = torch.tensor([[0, 8, 4], [4, 4, 1]])
    weight = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    (whole(tokens) * weight).sum().backward()
    part = VocabEmbedding(whole, words, Region(comm))
    x_BTC = part(tokens)
    assert torch.equal(x_BTC, whole(tokens))
    (x_BTC * weight).sum().backward()
    refused = []
    for wrong in (9, -1):
        try:
            part(torch.tensor([[wrong]]))
        except IndexError:
            refused.append(wrong)
    return error(part.weight.grad, whole.weight.grad[words[0] : words[1]]), refused


def test_embedding_is_bitwise_the_whole_ones_and_refuses_ids_that_nobody_has():
    for value, refused in spawn(check_embedding, 3):
        assert value <= 1e-12
        assert refused == [9, -1]
