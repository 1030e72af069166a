"""Tensor parallelism of the GPT: every matrix of a block is cut among W ranks, which meet twice a block each way.

Query, key, value, up and gate are cut by outputs - whole heads, whole MLP channels -, output and down by inputs, the
embedding and the head by words (Shoeybi et al. 2019). With fewer key/value heads than ranks, neighbours share a head.
Refused: heads, MLP width or vocabulary that W does not divide, sequences likewise under sequence parallelism, and
linear layers of another kind than torch's.

Shapes: B batch, T time, C width, W ranks.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from minigpt.config import GPTConfig
from minigpt.model import MLP, Attention
from parallel.comm import Comm, make_comm
from parallel.deferred import DeferrableLinear
from parallel.mesh import Mesh
from parallel.model import StageGPT
from parallel.pieces import Piece, piece_of
from parallel.tensor_linear import ColumnLinear, RowLinear, part, project
from parallel.tensor_region import Region
from parallel.vocab_parallel import OwnPositions, VocabCrossEntropy, VocabEmbedding


def check(config: GPTConfig, ranks: int) -> None:
    """Raises ValueError for a GPT that cannot be cut among so many ranks."""
    for name in ("heads", "mlp_width", "vocab_size"):
        if getattr(config, name) % ranks:
            raise ValueError(f"{name} {getattr(config, name)} over tp {ranks}: expected a multiple of {ranks}")
    if config.kv_heads % ranks and ranks % config.kv_heads:
        raise ValueError(f"kv_heads {config.kv_heads} over tp {ranks}: expected a multiple or a divisor of {ranks}")


def parallelise(
    stage: StageGPT,
    mesh: Mesh,
    comm: Comm,
    *,
    sequence_parallel: bool = False,
    overlap: bool = False,
    keep_products: bool = False,
) -> dict[str, Comm]:
    """Replaces the stage's layers by this rank's parts of them; before `materialise`, to save the memory.

    `comm` is of the mesh's tp group. All parameters have a piece afterwards. The logits without targets are those of
    this rank's words, see `gather_logits`. Returns for `sum_partial` the parameters whose gradient on this rank is only
    a term of theirs, each with the ranks that have the other terms. With one rank nothing changes. Where ranks share
    key/value heads it makes process groups: all ranks of the world call it, for equally many stages of one config.
    Selective activation checkpointing needs `keep_products`, see Region.
    Raises ValueError for what cannot be cut, and in each forward pass for tokens that the ranks cannot share.
    """
    check(stage.config, comm.size)
    for name, layer in stage.named_modules():
        if name.rpartition(".")[2] in LINEAR and type(layer) not in (nn.Linear, DeferrableLinear):
            raise ValueError(f"{name} is a {type(layer).__name__}: expected torch's Linear")
    if comm.size == 1:
        return {}
    shared_heads = _shared_heads(stage, mesh, comm)
    region = Region(comm, sequence_parallel, overlap, keep_products)
    before = set(stage.parameters())
    for block in stage.blocks.values():
        block.attention = ParallelAttention(block.attention, region)
        block.mlp = ParallelMLP(block.mlp, region)
        for norm in (block.attention_norm, block.mlp_norm):
            norm.register_forward_hook(_enter_after(region))
    _replace_ends(stage, region)
    for p in before.intersection(stage.parameters()):
        p.piece = Piece.whole(tuple(p.shape), piece_of(p).copies * comm.size)
    if sequence_parallel:
        stage.register_forward_pre_hook(_check_tokens(comm.size), with_kwargs=True)
    return _partial(stage, region, shared_heads)


LINEAR = ("query", "key", "value", "output", "up", "gate", "down", "head")


class ParallelAttention(Attention):
    """This rank's heads. It takes what `Region.enter` returns, all tokens, and leaves by the rows of `output`."""

    def __init__(self, whole: Attention, region: Region):
        nn.Module.__init__(self)
        config, comm = whole.config, region.comm
        heads, kv_heads = config.heads // comm.size, max(1, config.kv_heads // comm.size)
        K, sharing = config.key_width, max(1, comm.size // config.kv_heads)
        self.config = replace(config, heads=heads, kv_heads=kv_heads, head_width=K)
        self.layer, self.attention_fn, self.rotary_fn = whole.layer, whole.attention_fn, whole.rotary_fn
        first, kv_first = comm.rank * heads * K, comm.rank // sharing * kv_heads * K
        inner, kv = (first, first + heads * K), (kv_first, kv_first + kv_heads * K)
        self.query = ColumnLinear(whole.query, inner)
        self.key = ColumnLinear(whole.key, kv, sharing)
        self.value = ColumnLinear(whole.value, kv, sharing)
        self.output = RowLinear(whole.output, inner, region)
        if config.qk_norm:
            self.query_norm, self.key_norm = whole.query_norm, whole.key_norm
        if config.has_value_embedding(self.layer):
            self.value_embedding = whole.value_embedding
            self.value_embedding.embedding_dim = kv[1] - kv[0]
            self.value_embedding.weight = part(whole.value_embedding.weight, ((0, config.vocab_size), kv), sharing)

    def project(self, x_BTC: Tensor) -> tuple[Tensor, ...]:
        return project(x_BTC, self.query, self.key, self.value)


class ParallelMLP(MLP):
    """This rank's channels, between `Region.enter` and the rows of `down`."""

    def __init__(self, whole: MLP, region: Region):
        nn.Module.__init__(self)
        F = whole.config.mlp_width // region.comm.size
        channels = (region.comm.rank * F, (region.comm.rank + 1) * F)
        self.config, self.activation_fn = replace(whole.config, mlp_width=F), whole.activation_fn
        self.up = ColumnLinear(whole.up, channels)
        if whole.config.mlp == "swiglu":
            self.gate = ColumnLinear(whole.gate, channels)
        self.down = RowLinear(whole.down, channels, region)

    def expand(self, x_BTC: Tensor) -> tuple[Tensor, ...]:
        return project(x_BTC, *([self.up, self.gate] if self.config.mlp == "swiglu" else [self.up]))


def _shared_heads(stage: StageGPT, mesh: Mesh, comm: Comm) -> Comm | None:
    """The tp ranks that have the same key/value head as this one, where there are fewer heads than ranks; else None."""
    sharing = comm.size // stage.config.kv_heads
    if sharing <= 1:
        return None
    lines = [line[start : start + sharing] for line in mesh.lines("tp") for start in range(0, len(line), sharing)]
    return make_comm(mesh.make(lines, ("tp",), f"kv-heads-{stage.layers[0]}"), comm.kind, comm.listeners)


def _replace_ends(stage: StageGPT, region: Region) -> None:
    """What comes before the blocks and after them, as far as the stage has it."""
    comm, vocabulary = region.comm, stage.config.vocab_size
    words = (comm.rank * vocabulary // comm.size, (comm.rank + 1) * vocabulary // comm.size)
    if hasattr(stage, "embedding"):
        stage.embedding = VocabEmbedding(stage.embedding, words, region)
    if hasattr(stage, "position_embedding") and region.sequence_parallel:
        stage.position_embedding = OwnPositions(stage.position_embedding, region)
    if stage.last:
        stage.norm.register_forward_hook(_enter_after(region))
        if not stage.config.tied:
            stage.head = ColumnLinear(stage.head, words)
        stage.loss_fn = VocabCrossEntropy(comm, words, vocabulary)


def _enter_after(region: Region) -> Callable:
    """A forward hook for norms: their result goes into a branch. Parameters keep their names this way."""
    return lambda norm, inputs, x: region.enter(x)


def _check_tokens(ranks: int) -> Callable:
    def check_tokens(stage: StageGPT, args: tuple, kwargs: dict) -> None:
        T = (kwargs["tokens_BT"] if "tokens_BT" in kwargs else args[1]).shape[1]
        if T % ranks:
            raise ValueError(f"sequence of {T} tokens over tp {ranks}: expected a multiple of {ranks}")

    return check_tokens


def _partial(stage: StageGPT, region: Region, shared_heads: Comm | None) -> dict[str, Comm]:
    """Under sequence parallelism a rank sees only its own tokens between the branches, and always its own heads."""
    groups = {}
    for name, p in stage.named_parameters():
        layer = name.split(".")[-2]
        if layer in ("query_norm", "key_norm"):
            groups[name] = region.comm
        elif shared_heads is not None and layer in ("key", "value", "value_embedding"):
            groups[name] = shared_heads
        elif region.sequence_parallel and p.piece.box_shape == p.piece.shape:
            groups[name] = region.comm
    return groups
