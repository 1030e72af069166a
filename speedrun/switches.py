"""The tricks of the race as an ablation takes them: a name, the fields that change, what both sides need.

`switches(base)` is the list for one recipe: numbers such as windows or parts of a batch are made from the base's own.
`Switch.sides` gives the two configs, which differ in the named fields only. Refused, with the reason: what this
machine does not have, and what the base contradicts.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from speedrun.config import RaceConfig
from speedrun.schedule import whole

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Switch:
    """`on` and `off` have the same fields; `needs` is set on both sides. `place` is where alone it works: "cuda",
    "ranks" (two processes or more), "compiler". `same_numbers`: it is there for speed, and the loss is not compared."""

    name: str
    about: str
    on: Fields
    off: Fields
    needs: Fields = field(default_factory=dict)
    place: str = ""
    same_numbers: bool = False

    def __post_init__(self) -> None:
        if self.on.keys() != self.off.keys() or not self.on:
            raise ValueError(f"switch {self.name}: fields {sorted(self.on)} on, {sorted(self.off)} off: expected equal")

    def sides(self, base: RaceConfig) -> tuple[RaceConfig, RaceConfig]:
        """(on, off). Raises ValueError for what RaceConfig refuses."""
        return tuple(replace(base, **{**self.needs, **side}) for side in (self.on, self.off))


def changed(name: str, on: Any, off: Any) -> dict[str, Fields]:
    """Arguments of a Switch that changes one field."""
    return {"on": {name: on}, "off": {name: off}}


def parts(whole: int, *shares: float) -> str:
    """ "64,128" of 128 and the shares 0.5 and 1; whole numbers of at least 1."""
    return ",".join(str(max(1, int(whole * share))) for share in shares)


def switches(base: RaceConfig) -> list[Switch]:
    """All of them, in the order of the chapter: model, run, optimizer, machine."""
    return [*of_the_model(base), *of_the_run(base), *of_the_optimizer(base), *of_the_machine(base)]


def of_the_model(base: RaceConfig) -> list[Switch]:
    gated = base.mlp_width if base.mlp == "swiglu" else base.mlp_width * 2 // 3
    plain = base.mlp_width * 3 // 2 if base.mlp == "swiglu" else base.mlp_width
    relu2, swiglu, gelu = ({"mlp": "relu2", "mlp_width": plain}, {"mlp": "swiglu", "mlp_width": gated},
                           {"mlp": "gelu", "mlp_width": plain})  # fmt: skip
    return [
        Switch("zero-init", "projections into the stream and the head begin at zero",
               **changed("zero_init", True, False)),
        Switch("qk-norm", "queries and keys are normalised", **changed("qk_norm", True, False)),
        Switch("relu2", "ReLU squared, against SwiGLU of as many parameters", relu2, swiglu),
        Switch("relu2-gelu", "ReLU squared, against GELU", relu2, gelu),
        Switch("untied", "the head has weights of its own", **changed("tied", False, True),
               needs={"untie_at": 0.0}),
        Switch("untie-late", "a tied head gets its own weights at two thirds", **changed("untie_at", 2 / 3, 0.0),
               needs={"tied": True}),
        Switch("softcap", "logits are capped by a tanh", **changed("softcap", base.softcap or 15.0, 0.0)),
        Switch("value-embeddings", "every second layer adds an embedding of the token to its values",
               {"value_embeddings": True, "value_gate": base.value_gate, "value_tables": base.value_tables},
               {"value_embeddings": False, "value_gate": False, "value_tables": 0}),
        Switch("value-tables", "shared tables in the first and last layers, against one in every second",
               **changed("value_tables", base.value_tables or max(1, base.layers // 4), 0),
               needs={"value_embeddings": True, "without_attention": ""}),
        Switch("value-gate", "value embeddings are scaled by the token", **changed("value_gate", True, False),
               needs={"value_embeddings": True}),
        Switch("attention-gate", "what a head returns is scaled by the token",
               **changed("attention_gate", True, False)),
        Switch("without-attention", "a layer past the middle is an MLP alone",
               **changed("without_attention", base.without_attention or str(base.layers * 7 // 12), "")),
        Switch("x0-skip", "each block sees the embedding again", **changed("x0_skip", True, False)),
        Switch("unet-skips", "the second half of the blocks sees what left the first",
               **changed("unet_skips", True, False)),
        Switch("backout", "the head sees less of the middle", **changed("backout", True, False)),
        Switch("smear", "each token carries some of the one before", **changed("smear", True, False)),
        Switch("bigrams", "embeddings of pairs of tokens", **changed("bigrams", base.bigrams or 16_384, 0)),
    ]  # fmt: skip


def of_the_run(base: RaceConfig) -> list[Switch]:
    grown = base.windows or parts(base.context, 1 / 4, 1 / 2, 1)
    batches = base.batches or parts(base.batch, 1 / 2, 1, 3 / 2)
    first, *_ = sizes = whole(batches)
    batch = sum(sizes) // len(sizes) if base.batches else base.batch
    # Rates are the base's where the batch is the base's: they grow from the first batch with a power of its size.
    grown_by = (batch / first) ** base.batch_lr
    rates = {name: getattr(base, name) for name in ("muon_lr", "learning_rate", "embedding_lr", "head_lr", "gain_lr")}
    at_first = {name: rate / (1 if base.batches else grown_by) for name, rate in rates.items()}
    return [
        Switch("windows", "a sliding layer sees more and more of the context, against all of it",
               {"windows": grown, "yarn": base.yarn}, {"windows": "", "yarn": False}),
        Switch("yarn", "rotary speeds are stretched when the window grows", **changed("yarn", True, False),
               needs={"windows": grown}),
        Switch("document-mask", "no attention across documents", **changed("document_mask", True, False),
               needs={"documents": False}),
        Switch("documents", "rows are packed from documents", {"documents": True, "document_mask": False},
               {"documents": False, "document_mask": base.document_mask}),
        Switch("batches", "a batch that grows, against their mean throughout; as many tokens in all",
               {"batches": batches, "batch": base.batch, **at_first},
               {"batches": "", "batch": batch, **{name: rate * grown_by for name, rate in at_first.items()}}),
        Switch("contexts", "the first half of the run in windows half as long",
               **changed("contexts", base.contexts or parts(base.context, 1 / 2, 1), "")),
        Switch("mtp", "the two tokens after the next count too, until half of the run",
               **changed("mtp", base.mtp or "1,0.5,0.25", "")),
    ]  # fmt: skip


def of_the_optimizer(base: RaceConfig) -> list[Switch]:
    muon, decay = {"optimizer": "muon"}, base.muon_decay or 0.1
    warmup = base.momentum_warmup if base.momentum_start else max(1, base.steps // 6)
    return [
        Switch("muon", "matrices by Muon, against AdamW at its usual rate", **changed("optimizer", "muon", "adamw")),
        Switch("momentum-warmup", "Muon's momentum rises over the first sixth",
               {"momentum_start": base.momentum_start or 0.85, "momentum_warmup": warmup},
               {"momentum_start": 0.0, "momentum_warmup": base.momentum_warmup}, needs=muon),
        Switch("normuon", "Muon's rows are evened out", **changed("normuon", base.normuon or 0.9, 0.0), needs=muon),
        Switch("cautious-decay", "matrices decay where the update shrinks them too, against no decay",
               **changed("muon_decay", decay, 0.0), needs={**muon, "cautious": True}),
        Switch("cautious", "that, against decay of all weights", **changed("cautious", True, False),
               needs={**muon, "muon_decay": decay}),
        Switch("bf16-weights", "matrices in bfloat16 with their lower halves beside them",
               **changed("bf16_weights", True, False), needs=muon),
    ]  # fmt: skip


def of_the_machine(base: RaceConfig) -> list[Switch]:
    return [
        Switch("fp8-head", "the head multiplies in 8 bits", **changed("fp8_head", True, False), place="cuda",
               needs={"tied": False, "untie_at": 0.0, "fused_loss": False}),
        Switch("fp8-mlp", "the MLPs multiply in 8 bits", **changed("fp8_mlp", True, False), place="cuda"),
        Switch("fused-loss", "head and loss in one operation", **changed("fused_loss", True, False), place="cuda",
               needs={"mtp": "", "fp8_head": False}),
        Switch("compile", "torch.compile", {"compile": True, "cuda_graphs": base.cuda_graphs},
               {"compile": False, "cuda_graphs": False}, place="compiler", same_numbers=True),
        Switch("cuda-graphs", "a recorded graph of launches is replayed", **changed("cuda_graphs", True, False),
               needs={"compile": True}, place="cuda", same_numbers=True),
        Switch("prefetch", "a thread makes the batches ahead", **changed("prefetch", True, False), same_numbers=True),
        Switch("overlap", "gradients travel while others are worked on", **changed("overlap", True, False),
               place="ranks", same_numbers=True),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pieces:
    """What there is to run: `arms` {name: recipe}, each recipe once; `sides` {switch: (arm on, arm off)}."""

    arms: dict[str, RaceConfig]
    sides: dict[str, tuple[str, str]]


def pieces(base: RaceConfig, chosen: list[Switch]) -> Pieces:
    """Sides that are the same recipe are one arm: what is on in the base is its own "on"."""
    arms, sides = {"base": base}, {}

    def arm(name: str, side: RaceConfig) -> str:
        same = [known for known, recipe in arms.items() if recipe == side]
        return same[0] if same else arms.setdefault(name, side) and name

    for switch in chosen:
        on, off = switch.sides(base)
        if not switch.same_numbers:
            sides[switch.name] = arm(switch.name, on), arm(f"{switch.name}-off", off)
    # A second length of the base, with a schedule of its own: what steps are worth.
    arms["base-half"] = replace(base, steps=base.steps // 2, eval_every=max(1, base.eval_every // 2))
    return Pieces(arms, sides)


def choose(names: str, known: Sequence[Switch]) -> list[Switch]:
    """Those of "a,b", in the list's order; all for "". Raises ValueError with the nearest names for an unknown one."""
    wanted, all_names = [name.strip() for name in names.split(",") if name.strip()], [each.name for each in known]
    for name in wanted:
        if name not in all_names:
            near = difflib.get_close_matches(name.replace("_", "-"), all_names, n=3, cutoff=0.4)
            expected = f"nearest: {', '.join(near)}" if near else f"expected some of {', '.join(all_names)}"
            raise ValueError(f"switch {name!r} is unknown: {expected}")
    return [each for each in known if not wanted or each.name in wanted]


def unfit(switch: Switch, base: RaceConfig, *, cuda: bool, compiler: bool) -> str:
    """Why the switch cannot be measured here; empty where it can."""
    if switch.place == "cuda" and not cuda:
        return "needs a GPU"
    if switch.place == "compiler" and not compiler:
        return "needs a C++ compiler"
    if switch.place == "ranks":
        return "needs two ranks or more, an ablation has one"
    try:
        on, off = switch.sides(base)
    except ValueError as error:
        return str(error)
    return "" if on != off else "both sides are the same recipe"
