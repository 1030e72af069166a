"""Which layers of a GPT an adapter goes into, under our names and under those of transformers.

GPT-2 of transformers has one matrix, c_attn, where ours has query, key and value. A target that names c_attn is one
place with three layers: they share A, and the rows of B are split among them. Targets with our names (`query`) are
places of one layer each, and of GPT-2 these have no name in transformers. ROW and COLUMN say which factor of a layer is
block-diagonal in BD-LoRA. Refused: targets that fit no layer.
"""

from dataclasses import dataclass

from torch import nn

from lora.config import ALL_LINEAR, LoraConfig, fits
from minigpt.hf_config import family_of
from minigpt.hf_layout import Layout
from minigpt.model import GPT

# How tensor parallelism cuts the frozen weight: over its inputs, or over its outputs. The factor on that side of the
# layer is the block-diagonal one, so that a rank needs no more than the block it keeps: A of ROW, B of COLUMN.
ROW = ("output", "down")
COLUMN = ("query", "key", "value", "up", "gate", "head")
LINEAR = (*ROW, *COLUMN)
EMBEDDING = ("embedding", "position_embedding", "value_embedding")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one A goes: `layers` are our names, `theirs` the module of transformers, None where that has none."""

    layers: tuple[str, ...]
    theirs: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """What patterns are compared with."""
        ours = self.layers if len(self.layers) == 1 else ()
        return ours if self.theirs is None else (*ours, self.theirs)

    @property
    def embedding(self) -> bool:
        return kind_of(self.layers[0]) in EMBEDDING

    @property
    def head(self) -> bool:
        return self.layers == ("head",)

    @property
    def row(self) -> bool:
        """Whether tensor parallelism cuts the inputs of the layer; else it cuts the outputs, or it is an embedding."""
        return kind_of(self.layers[0]) in ROW


def kind_of(layer: str) -> str:
    """`query` of `blocks.0.attention.query`."""
    return layer.rpartition(".")[2]


def adaptable_layers(model: GPT) -> dict[str, nn.Module]:
    """The layers that can have an adapter, or have one, by our names and in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if kind_of(name) in (*LINEAR, *EMBEDDING) and hasattr(module, "weight")
    }


def all_places(model: GPT) -> list[tuple[Place, list[Place]]]:
    """Each place by the name of transformers, with the places of one layer each that it is made of.

    A GPT that no family of transformers has gets our names only.
    """
    layers = adaptable_layers(model)
    try:
        family_of(model.config)
    except ValueError:
        return [(Place((ours,), None), [Place((ours,), None)]) for ours in layers]
    layout, groups = Layout(model.config, {}), {}
    for ours in layers:
        groups.setdefault(layout.theirs(f"{ours}.weight").removesuffix(".weight"), []).append(ours)
    return [
        (Place(tuple(group), theirs), [Place((ours,), theirs if len(group) == 1 else None) for ours in group])
        for theirs, group in groups.items()
    ]


def places_of(model: GPT, config: LoraConfig) -> list[Place]:
    """Where the adapter goes. Raises ValueError for each target that fits nothing, with the names that there are."""
    everything, found = all_places(model), []
    for whole, single in everything:
        if config.targets == ALL_LINEAR:
            found += [] if whole.embedding or whole.head else [whole]
        elif config.wants(*whole.names):
            found.append(whole)
        else:
            found += [place for place in single if config.wants(*place.names)]
    if not isinstance(config.targets, str):
        names = [name for whole, single in everything for place in (whole, *single) for name in place.names]
        unknown = [target for target in config.targets if not any(fits(target, name) for name in names)]
    else:
        unknown = [] if found else [config.targets]
    if unknown:
        raise ValueError(f"targets {unknown} fit no layer: expected some of {', '.join(_kinds(everything))}")
    return found


def _kinds(everything: list[tuple[Place, list[Place]]]) -> list[str]:
    """The last parts of all names, each once, theirs first."""
    places = [place for whole, single in everything for place in (whole, *single)]
    theirs = [place.theirs for place in places if place.theirs]
    return list(dict.fromkeys(map(kind_of, [*theirs, *(ours for place in places for ours in place.layers)])))
