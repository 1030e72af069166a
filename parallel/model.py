"""A part of stage 2's GPT: the blocks that one rank holds, the embedding before the first, the loss after the last.

Parameters have the GPT's own names, so weights, gradients and checkpoints of any layout are those of one process. A
StageGPT begins without storage (on the meta device); tensor parallelism replaces its layers by smaller ones there, then
`materialise` and `fill` give it the very weights that one process would draw - or FSDP does so shard by shard.

Shapes as in minigpt/model.py: B batch, T time, C width, V vocabulary. Refused: layers that are not neighbours.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from minigpt.config import GPTConfig, refuse_extras
from minigpt.model import GPT, Sight, initial_values, mean_cross_entropy, rotary_tables
from parallel.pieces import Piece, piece_of


def whole_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of each parameter of the whole GPT, in its order."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(config, seed=None).named_parameters()}


def run_block(block: nn.Module, x_BTC: Tensor, sight: Sight) -> Tensor:
    return block(x_BTC, sight)


class StageGPT(nn.Module):
    """The blocks `layers` (default: all) of a GPT, on the meta device.

    `first` and `last` say whether it begins with the embedding and ends with norm, head and loss. With tied embeddings
    a last stage that is not the first has the embedding matrix too, and both gradients belong together: its
    `embedding.weight.piece.copies` is 2. Later parts of this stage put their own into `run_block` (activation
    checkpointing), `loss_fn(logits_BTV, targets_BT, z_loss)` (vocabulary in parts) and the layers themselves.
    """

    def __init__(self, config: GPTConfig, layers: Sequence[int] | None = None, **layers_of_gpt: Callable):
        super().__init__()
        refuse_extras(config, "a GPT cut over ranks")
        layers = list(range(config.layers)) if layers is None else list(layers)
        if (
            not layers
            or layers != list(range(layers[0], layers[-1] + 1))
            or not 0 <= layers[0] <= layers[-1] < config.layers
        ):
            raise ValueError(f"layers {layers}: expected neighbours out of 0 to {config.layers - 1}")
        with torch.device("meta"):
            whole = GPT(config, seed=None, **layers_of_gpt)
        self.config, self.layers = config, layers
        self.first, self.last = layers[0] == 0, layers[-1] == config.layers - 1
        self.run_block, self.loss_fn = run_block, mean_cross_entropy
        if self.first or (self.last and config.tied):
            self.embedding = whole.embedding
            if config.tied and not (self.first and self.last) and (self.first or self.last):
                self.embedding.weight.piece = Piece.whole(tuple(self.embedding.weight.shape), copies=2)
        if self.first and config.positions == "learned":
            self.position_embedding = whole.position_embedding
        self.blocks = nn.ModuleDict({str(layer): whole.blocks[layer] for layer in layers})
        if self.last:
            self.norm = whole.norm
            if not config.tied:
                self.head = whole.head
        self.tables: dict[tuple, tuple[Tensor, Tensor]] = {}  # rotary, by device and dtype

    def forward(
        self,
        x_BTC: Tensor | None,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        separator: int | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        """x_BTC for the next stage, where this is not the last; else logits_BTV, or with targets their mean loss.

        x_BTC comes from the stage before; None for the first. All stages get the tokens: some layers look at them.
        """
        T = tokens_BT.shape[1]
        if not 1 <= T <= self.config.context:
            raise ValueError(f"sequence of {T} tokens: expected 1 to the context, {self.config.context}")
        positions_BT = torch.arange(T, device=tokens_BT.device)[None]
        sight = Sight(self.config, tokens_BT, positions_BT, None, separator)
        if self.first:
            x_BTC = self.embedding(tokens_BT)
            if self.config.positions == "learned":
                x_BTC = x_BTC + self.position_embedding(positions_BT)
        if self.config.positions == "rotary":
            sight.cos_sin = tuple(table_TK[None, None, :T] for table_TK in self._tables(x_BTC))
        for block in self.blocks.values():
            x_BTC = self.run_block(block, x_BTC, sight)
        if not self.last:
            return x_BTC
        logits_BTV = self.logits(self.norm(x_BTC))
        return logits_BTV if targets_BT is None else self.loss_fn(logits_BTV, targets_BT, z_loss)

    logits = GPT.logits

    def _tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key = (x.device, x.dtype)
        if key not in self.tables:
            cos_TK, sin_TK = rotary_tables(self.config)
            self.tables[key] = cos_TK.to(*key), sin_TK.to(*key)
        return self.tables[key]


def materialise(stage: nn.Module, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> None:
    """Gives the parameters that are on the meta device storage, unfilled. What was noted on them (`piece`) stays."""
    made: dict[int, nn.Parameter] = {}
    for module in stage.modules():
        for name, p in module._parameters.items():
            if p is None or not p.is_meta:
                continue
            if id(p) not in made:
                new = nn.Parameter(torch.empty(p.shape, device=device, dtype=dtype or p.dtype), p.requires_grad)
                new.__dict__.update(p.__dict__)
                made[id(p)] = new
            module._parameters[name] = made[id(p)]


@torch.no_grad()
def fill(tensors: Mapping[str, tuple[Tensor, Piece]], config: GPTConfig, seed: int) -> None:
    """Writes the initial weights that one process would draw into these pieces of them, one whole tensor at a time."""
    for name, value in initial_values(whole_shapes(config), config.tied, seed):
        if name in tensors:
            tensor, piece = tensors[name]
            tensor.copy_(piece.of(value).view(tensor.shape))


def initialise(stages: Sequence[StageGPT], config: GPTConfig, seed: int) -> None:
    """`fill` for all parameters of materialised stages."""
    for stage in stages:
        fill({name: (p, piece_of(p)) for name, p in stage.named_parameters()}, config, seed)


def split_layers(layers: int, stages: int) -> list[range]:
    """Which blocks each of `stages` pipeline stages has: as even as can be, the later ones fewer, since the last has
    the head besides. Raises ValueError when there are more stages than layers."""
    if not 1 <= stages <= layers:
        raise ValueError(f"{stages} pipeline stages for {layers} layers: expected 1 to {layers}")
    sizes = [layers // stages + (stage < layers % stages) for stage in range(stages)]
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
