"""The vocabulary in parts: each rank has some rows of the embedding and of the head, and so some of the logits.

The loss needs of all logits only a maximum, a sum and the target's own: three numbers a token go over the wire, never
V (Shoeybi et al. 2019, section 3). Ids that no rank has are refused as torch refuses them.

Shapes: B batch, T time, N = B T, C width, v the V / W words of one rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.comm import Comm
from parallel.tensor_linear import part
from parallel.tensor_region import Region

IGNORED = -100  # targets that do not count, as in torch's cross-entropy


class VocabEmbedding(nn.Embedding):
    """The words [start, stop) of an embedding: each rank looks up its own, the sum over the ranks has all."""

    def __init__(self, whole: nn.Embedding, words: tuple[int, int], region: Region):
        super().__init__(words[1] - words[0], whole.embedding_dim, device="meta")
        self.region, self.words, self.vocabulary = region, words, whole.num_embeddings
        self.weight = part(whole.weight, (words, (0, whole.embedding_dim)))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        index_BT, mine_BT = _index(tokens_BT, self.words, self.vocabulary)
        return self.region.leave(F.embedding(index_BT, self.weight) * mine_BT[..., None])


class OwnPositions(nn.Embedding):
    """Learned positions under sequence parallelism: those of this rank's tokens."""

    def __init__(self, whole: nn.Embedding, region: Region):
        super().__init__(whole.num_embeddings, whole.embedding_dim, device="meta")
        self.region, self.weight = region, whole.weight

    def forward(self, positions_BT: Tensor) -> Tensor:
        comm = self.region.comm
        return super().forward(positions_BT.chunk(comm.size, dim=1)[comm.rank])


class VocabCrossEntropy:
    """`minigpt.model.mean_cross_entropy` of logits of which this rank has the words [start, stop): the same number on
    every rank, gradients for the own logits. A `loss_fn` for StageGPT."""

    def __init__(self, comm: Comm, words: tuple[int, int], vocabulary: int):
        self.comm, self.words, self.vocabulary = comm, words, vocabulary

    def __call__(self, logits_BTv: Tensor, targets_BT: Tensor, z_loss: float = 0.0) -> Tensor:
        return _CrossEntropy.apply(logits_BTv.flatten(0, -2), targets_BT.reshape(-1), z_loss, self)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_Nv, targets_N, z_loss, of: VocabCrossEntropy):
        ignored_N = targets_N == IGNORED
        index_N, mine_N = _index(targets_N.masked_fill(ignored_N, 0), of.words, of.vocabulary)
        most_N = logits_Nv.amax(dim=-1)
        own_N = logits_Nv.gather(1, index_N[:, None])[:, 0]
        of.comm.all_reduce(most_N, "max", tag="largest logits")
        p_Nv = (logits_Nv - most_N[:, None]).exp_()
        sums_2N = torch.stack([p_Nv.sum(dim=-1), torch.where(mine_N, own_N - most_N, 0)])
        of.comm.all_reduce(sums_2N, tag="sums of the softmax")
        p_Nv /= sums_2N[0, :, None]
        losses_N = sums_2N[0].log() - sums_2N[1]
        # Each row counts 1 / (number that count), as cross-entropy; the square of log Z is a mean over all rows.
        share_N = (~ignored_N).to(p_Nv.dtype) / (~ignored_N).sum()
        pull_N = 2 * z_loss / len(share_N) * (sums_2N[0].log() + most_N)
        ctx.save_for_backward(p_Nv, index_N, share_N * mine_N, share_N + pull_N)
        return torch.where(ignored_N, 0, losses_N).sum() / (~ignored_N).sum()

    @staticmethod
    def backward(ctx, gradient):
        p_Nv, index_N, of_target_N, of_p_N = ctx.saved_tensors
        of_logits_Nv = p_Nv * (of_p_N * gradient)[:, None]
        of_logits_Nv.scatter_add_(1, index_N[:, None], -(of_target_N * gradient)[:, None])
        return of_logits_Nv, None, None, None


@torch.no_grad()
def gather_logits(logits_BTv: Tensor, comm: Comm) -> Tensor:
    """logits_BTV on every rank, without gradient: to sample from, not to train with."""
    logits_WBTv = logits_BTv.new_empty(comm.size, *logits_BTv.shape)
    comm.all_gather(logits_BTv.contiguous(), logits_WBTv, tag="logits")
    return logits_WBTv.movedim(0, -2).flatten(-2)


def _index(ids: Tensor, words: tuple[int, int], vocabulary: int) -> tuple[Tensor, Tensor]:
    """Rows of this rank's part, 0 where another rank has the word, and whether it is this one's. A word that nobody
    has gets a row that does not exist, so that the lookup fails without a look at the values here."""
    start, stop = words
    mine = (ids >= start) & (ids < stop)
    elsewhere = (ids >= 0) & (ids < vocabulary)
    return torch.where(mine, ids - start, torch.where(elsewhere, 0, stop - start)), mine
