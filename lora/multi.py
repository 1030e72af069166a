"""One GPT serves a batch whose rows have different adapters, or none: `python -m lora.multi` shows a prompt under each.

    server = MultiLora(model, pages=64, kernels="triton")
    server.add("a", Path("adapters/a"))                 # a folder of PEFT's, or a GPT that has the adapter
    with server.batch(["a", None, "b", "a"]) as model:  # row by row; None is the model itself
        logits_BTV = model(tokens_BT)
    steps = generate_mixed(server, prompts, ["a", None, "b"], max_new_tokens=50, sampling=Sampling())

The model's linear layers stay as they are, frozen, and what each row's adapter adds is added to what they compute
(multi_layers.py; punica, Chen et al. 2023, and S-LoRA, Sheng et al. 2023). Adapters lie in pages (adapter_cache.py), in
the dtype of the model. For inference: nothing has a gradient.

Refused with a ValueError: adapters of embeddings, of another architecture, shape or base (everything that does not fit
is listed), models with adapters of their own, unknown adapters, a batch inside another; with a RuntimeError: kernels
that are not built or not installed.

Shapes: B rows, T time, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from common import cli
from cuda import device as device_of
from cuda.device import DTYPES
from lora.adapter_cache import AdapterCache, Factors
from lora.layers import Adapter, LoraLayer, sizes
from lora.lora import adapter_of, lora_layers, remove
from lora.multi_layers import Kernels, MultiLoraLinear, RowPages, split
from lora.peft_files import load_adapter
from lora.targets import LINEAR, Place, adaptable_layers, kind_of
from minigpt.generate import generate, stream_text
from minigpt.model import GPT
from minigpt.sample import SourceConfig, document_tokens, load_source

MOST_RANKS = 256  # of a page that kernels read


class MultiLora:
    """A model, and its adapters in `cache`: `pages` pages of `page_rank` ranks each. The model is changed: it serves
    from now on, and stays on its device and in its dtype."""

    def __init__(self, model: GPT, *, pages: int, page_rank: int = 16, kernels: Kernels = "torch"):
        weight = model.embedding.weight
        _check_kernels(kernels, weight, page_rank)
        if own := [name for name, layer in model.named_modules() if isinstance(layer, LoraLayer | MultiLoraLinear)]:
            raise ValueError(f"{', '.join(own)} have adapters already: expected a model without, see lora.remove")
        layers = {name: layer for name, layer in adaptable_layers(model).items() if kind_of(name) in LINEAR}
        if model.loss_fn is not None:  # which would read the head's weight past its adapters
            layers.pop("head", None)
        self.cache = AdapterCache(
            {name: sizes(layer, embedding=False) for name, layer in layers.items()},
            pages=pages, page_rank=page_rank, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        self.model, self.rows = model.requires_grad_(False), RowPages(kernels, weight.device)
        for name, layer in layers.items():
            model.set_submodule(name, MultiLoraLinear(layer, name, self.cache.pools, self.rows))

    def add(self, name: str, source: Path | str | GPT) -> None:
        """From a folder of PEFT's, or from a GPT that has the adapter `name` (`lora.add_adapter`) on the same base."""
        self.cache.check_new(name)
        if isinstance(source, GPT):
            parts, faults = adapter_of(source, name), _differences(self.model, source, name)
        else:
            parts, faults = self._read(Path(source), name), []
        linear = {place: adapters for place, adapters in parts.items() if not place.embedding}
        faults += [
            f"{place.layers[0]} is an embedding: expected linear layers only" for place in parts if place.embedding
        ]
        factors = factors_of(linear)
        faults += self.cache.faults(factors) if factors else []
        if faults:
            raise ValueError(f"adapter {name!r}: {'; '.join(faults)}")
        self.cache.add(name, factors)

    def _read(self, path: Path, name: str) -> dict[Place, list[Adapter]]:
        """The model has the adapter for as long as it is read: so everything is checked that is checked there."""
        load_adapter(self.model, path, name)
        parts = adapter_of(self.model, name)
        remove(self.model, name)
        return parts

    def compute_with(self, kernels: Kernels) -> None:
        """From the next selection of rows on."""
        _check_kernels(kernels, self.model.embedding.weight, self.cache.page_rank)
        self.rows.kernels = kernels

    def select(self, names: Sequence[str | None] | None) -> None:
        """Of the next passes row b has the adapter names[b], which has been acquired; None: no row has one."""
        self.rows.set(None if names is None else [self.cache.pages_of(name) for name in names])

    @contextmanager
    def batch(self, names: Sequence[str | None]) -> Iterator[GPT]:
        """The model, in which row b has the adapter names[b]. Afterwards all rows are the model's own again.

        Raises ValueError inside another batch: the model knows one selection of rows.
        """
        if self.rows.rows is not None:
            raise ValueError(f"a batch of {len(self.rows.rows)} rows is running: expected it to end first")
        self.cache.acquire(names := list(names))
        try:
            self.select(names)
            yield self.model
        finally:
            self.select(None)
            self.cache.release(names)


def _check_kernels(kernels: str, weight: Tensor, page_rank: int) -> None:
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels {kernels!r}: expected one of {', '.join(get_args(Kernels))}")
    if kernels == "torch":
        return
    if weight.dtype not in DTYPES or page_rank > MOST_RANKS:
        raise ValueError(
            f"kernels {kernels!r} of a {weight.dtype} model with pages of {page_rank} ranks: expected one of {DTYPES} "
            f"and at most {MOST_RANKS} ranks, or kernels 'torch'"
        )
    device_of.place(weight.device, kernels=kernels)  # says now what is not built or not installed


def factors_of(parts: dict[Place, list[Adapter]]) -> dict[str, Factors]:
    """By layer, block-diagonal factors written out."""
    return {
        layer: Factors(*(factor.detach() for factor in adapter.dense()), adapter.scale)
        for place, adapters in parts.items()
        for layer, adapter in zip(place.layers, adapters, strict=True)
    }


def _differences(model: GPT, source: GPT, name: str) -> list[str]:
    """What the source's base is that the model is not: fields of the config, frozen tensors beside the adapter."""
    ours, theirs = asdict(model.config), asdict(source.config)
    found = [f"{key} is {theirs[key]!r}, expected {ours[key]!r}" for key in ours if ours[key] != theirs[key]]
    layers, other = dict(model.named_modules()), []
    for path, layer in lora_layers(source).items():
        if name in layer.adapters and isinstance(layers.get(path), MultiLoraLinear):
            state = layer.base.state_dict() | ({} if layer.kept is None else {"weight": layer.kept})
            other += [] if _same(state, layers[path].base.state_dict()) else [path]
    if other:
        found.append(f"other weights than the model's in {', '.join(other)}, expected the base that it was trained on")
    return found


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        x.dtype == other[key].dtype and torch.equal(x.to(other[key].device), other[key]) for key, x in one.items()
    )


def generate_mixed(
    server: MultiLora, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], **options
) -> Iterator[list[int | None]]:
    """`minigpt.generate.generate` with an adapter for each prompt: a row goes on with its own, whoever leaves the batch
    before it. The adapters are held in their pages from the first step to the last, or until the iterator is closed.

    Raises ValueError at the call for what `generate` refuses, for unknown adapters and more than all pages.
    """
    prompts, names = list(prompts), list(adapters)
    if len(prompts) != len(names):
        raise ValueError(f"{len(prompts)} prompts and {len(names)} adapters: expected one for each, None for none")
    server.cache.check(names)
    steps = generate(server.model, prompts, on_rows=lambda rows: server.select([names[row] for row in rows]), **options)
    return _holding(server, names, steps)


def _holding(server: MultiLora, names: list[str | None], steps: Iterator) -> Iterator:
    """Between steps other batches may use the model: each says its rows before a pass, and a step leaves those that
    were selected when it came, of a batch around it."""
    server.cache.acquire(names)
    try:
        while True:
            before = server.rows.rows
            try:
                step = next(steps, None)
            finally:
                server.rows.set(before)
            if step is None:
                return
            yield step
    finally:
        server.cache.release(names)


@torch.no_grad()
def logits_by_loop(server: MultiLora, tokens_BT: Tensor, names: Sequence[str | None]) -> Tensor:
    """logits_BTV as they come from one pass for each adapter over its own rows: what a batch of all costs without mixed
    passes."""
    found = {}
    for name, rows in split(names).items():
        with server.batch([name] * len(rows)) as model:
            found |= zip(rows, model(tokens_BT[rows]), strict=True)
    return torch.stack([found[row] for row in range(len(names))])


# ---- the program -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MultiConfig(SourceConfig):
    adapters: str = field(default="", metadata={"help": "name=FOLDER of PEFT's, separated by commas"})
    prompt: str = field(default="", metadata={"help": "how the document begins, without an adapter and with each"})
    pages: int = field(default=64, metadata={"help": "room on the device, in pages of 16 ranks"})
    kernels: Kernels = field(default="torch", metadata={"help": "what computes the adapters"})

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        self.folders()

    def folders(self) -> dict[str, Path]:
        pairs = [pair.partition("=") for pair in self.adapters.split(",")]
        folders = {name: Path(folder) for name, _, folder in pairs if name and folder}
        if len(folders) < len(pairs):
            raise ValueError(f"adapters {self.adapters!r}: expected name=FOLDER,name=FOLDER with each name once")
        return folders


def main() -> None:
    config = cli.parse(MultiConfig, prog=cli.program(), description="one prompt under several adapters, in one batch")
    source = load_source(config)
    try:
        server = MultiLora(source.model, pages=config.pages, kernels=config.kernels)
    except RuntimeError as error:
        raise cli.UserError(str(error)) from error
    for name, folder in config.folders().items():
        server.add(name, folder)
    names = [None, *config.folders()]
    steps = generate_mixed(
        server, [source.document(config.prompt)] * len(names), names, max_new_tokens=config.length,
        sampling=config.sampling(), stop_tokens=source.ends, vocab_size=source.tokenizer.vocab_size,
    )  # fmt: skip
    for name, row in zip(names, zip(*steps, strict=True), strict=True):
        text = "".join(stream_text(document_tokens(row, source.ends), source.tokenizer))
        print(f"--- {'no adapter' if name is None else f'adapter {name}'}\n{config.prompt}{text}")


if __name__ == "__main__":
    cli.run(main)
