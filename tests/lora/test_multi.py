"""Batches of rows with different adapters: each row against itself alone, against PEFT's own mixed batches, with every
kind of kernels; generating, where rows leave and are read afresh; everything refused."""

import copy
import sys
import warnings
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from common import cli
from cuda import modules
from lora import multi, multi_layers
from lora.config import LoraConfig
from lora.lora import activate, add_adapter, merge, unmerge
from lora.multi import MultiLora, generate_mixed, logits_by_loop
from lora.peft_files import save_adapter
from minigpt.generate import generate
from minigpt.hf import save_pretrained
from minigpt.model import GPT
from minigpt.sampling import Sampling
from minigpt.tokenizer import Tokenizer
from tests.cuda.products import DEVICES
from tests.lora.families import ATTENTION, FAMILIES, TOKENS, Pair, randomised, save_theirs, worst
from tests.minigpt.models import random_gpt

SMALL = {"vocab_size": 31, "context": 16, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 20}
CONFIGS = {  # ranks of one page and of several, of four ranks each; some layers, all, and the head
    "few": LoraConfig(3, 12.0, ("query", "value")),
    "many": LoraConfig(9, 20.0, rslora=True, rank_pattern={"up": 2}),
    "head": LoraConfig(4, 10.0, ("head", "down", r"blocks.1.attention.key"), alpha_pattern={"head": 3.0}),
    "blocks": LoraConfig(6, 12.0, blocks=2),
}
NAMES = ["few", None, "many", "few", "head", "blocks", None, "many"]  # some neighbours, most apart


def base(**changes) -> GPT:
    return random_gpt(**SMALL | changes).eval()


def trained(model: GPT, configs: dict[str, LoraConfig] = CONFIGS) -> GPT:
    """A copy that has the adapters, with random factors."""
    model = copy.deepcopy(model)
    for name, config in configs.items():
        add_adapter(model, config, name)
    return randomised(model)


def serve(model: GPT, source: GPT, names=CONFIGS, **options) -> MultiLora:
    server = MultiLora(copy.deepcopy(model), **{"pages": 16, "page_rank": 4, **options})
    for name in names:
        server.add(name, source)
    return server


def tokens(rows: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], (rows, T), generator=torch.Generator().manual_seed(seed))


def alone(source: GPT, name: str | None) -> GPT:
    activate(source, [] if name is None else name)
    return source


@pytest.fixture(scope="module")
def models() -> tuple[GPT, GPT]:
    model = base()
    return model, trained(model)


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("names", [NAMES, sorted(NAMES, key=str), ["many"] * 3, ["head"], [None, None]], ids=str)
@torch.no_grad()
def test_each_row_is_what_it_is_alone_and_rows_without_an_adapter_keep_their_bits(models, names, T):
    model, source = models
    server, x_BT = serve(model, source), tokens(len(names), T)
    with server.batch(names) as mixed:
        logits_BTV = mixed(x_BT)
    plain_BTV = model(x_BT)
    for row, name in enumerate(names):
        expected_BTV = alone(source, name)(x_BT[row : row + 1])
        assert worst(logits_BTV[row : row + 1], expected_BTV) <= 1e-12
        assert torch.equal(logits_BTV[row], plain_BTV[row]) == (name is None)
    assert torch.equal(server.model(x_BT), plain_BTV), "afterwards it is the model itself"
    assert worst(logits_by_loop(server, x_BT, names), logits_BTV) <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_mixed_batches_equal_those_of_peft(tmp_path, family):
    """Adapters in PEFT's files, of two ranks; GPT-2's c_attn is three layers of ours that share A."""
    pair = Pair(family)
    more = {"gpt2": ["c_fc", "c_proj"], "gpt2 untied": ["c_attn", "c_fc", "lm_head"]}.get(
        family, ["up_proj", "down_proj"]
    )
    small = {"r": 3, "lora_alpha": 12, "target_modules": ATTENTION.get(family, ["c_attn"])}
    large = {"r": 9, "use_rslora": True, "target_modules": more}
    folders = {
        "a": save_theirs(pair.adapted(**small), tmp_path / "a"),
        "b": save_theirs(pair.adapted(**large), tmp_path / "b"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pair.loaded(folders["a"])
        theirs.load_adapter(str(folders["b"]), "b")
    server = MultiLora(pair.ours(), pages=4, page_rank=4)
    for name, folder in folders.items():
        server.add(name, folder)
    x_BT = TOKENS[:1].repeat(5, 1).roll(3, dims=1)
    x_BT[1:] = x_BT[1:].flip(1)
    with server.batch(["a", None, "b", "a", "b"]) as model:
        ours = model(x_BT)
    expected = theirs.eval()(x_BT, adapter_names=["default", "__base__", "b", "default", "b"]).logits
    assert worst(ours, expected) <= 1e-10
    assert len({round(row.sum().item(), 9) for row in ours[1:]}) == 3, "the adapters differ"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", ["triton", "cuda"])
@pytest.mark.parametrize("T", [1, 3])
@torch.no_grad()
def test_kernels_compute_what_torch_computes(kernels, T, device):
    """In float32; adapters of one page and of three, rows without one. Then another takes all pages, and has nothing
    in a layer where their last owners had something."""
    needs(kernels)
    model, x_BT = base(layers=1).to(device), tokens(4, T).to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    ranks = {"few": (3, "value"), "many": (9, "value", "down"), "next": (13, "value")}
    source = trained(model, {name: LoraConfig(rank, targets=tuple(layers)) for name, (rank, *layers) in ranks.items()})
    servers, plain = [serve(model, source, ranks, kernels=kind, pages=4) for kind in ("torch", kernels)], model(x_BT)
    for names in (["many", "few", None, "many"], ["next", None, None, "next"]):
        results = []
        for server in servers:
            with server.batch(names) as mixed:
                results.append(mixed(x_BT))
        assert worst(results[1], results[0]) <= 1e-5
        assert [torch.equal(*rows) for rows in zip(results[1], plain, strict=True)] == [not name for name in names]


def needs(kernels: str) -> None:
    if kernels == "triton":
        pytest.importorskip("triton", reason="pip install triton")
    elif kernels == "cuda":
        pytest.importorskip("cuda._simt", reason="make native builds the kernels")


@torch.no_grad()
def test_more_rows_than_a_kernel_takes_at_once_go_in_several_calls(models, monkeypatch):
    """The kernel itself is a loop here, so that the cut alone is tested, in float64."""
    model, source = models
    server, calls = serve(model, source), []

    def sgmv(x, a_pool, b_pool, segments, indices, scales, ranks, *, y, kernels):
        calls.append(len(indices))
        assert len(segments) == len(indices) + 1 and segments[-1] == len(x) == len(y)
        for s, page in enumerate(indices.tolist()):
            if page >= 0:
                rows, rank = slice(segments[s], segments[s + 1]), ranks[page]
                y[rows] += scales[page] * x[rows] @ a_pool[page, :rank].T @ b_pool[page, :, :rank].T

    with server.batch(NAMES) as mixed:
        expected = mixed(tokens(8, 5))
    monkeypatch.setattr(multi_layers, "MOST_SEGMENTS", 3)
    monkeypatch.setattr(multi_layers.ops, "lora_sgmv", sgmv)
    server.rows.kernels = "triton"  # which refuses float64 where a user asks for it
    with server.batch(NAMES) as mixed:
        assert worst(mixed(tokens(8, 5)), expected) <= 1e-12
    assert set(calls) == {2, 3} and calls[:3] == [3, 3, 2]


@torch.no_grad()
def test_the_base_may_be_quantised():
    qlora, model = pytest.importorskip("lora.qlora"), base().float()
    plain = copy.deepcopy(model)
    qlora.quantise_base(model, "nf4-double")
    source, x_BT = trained(model), tokens(len(NAMES), 5)
    with serve(model, source).batch(NAMES) as mixed:
        logits_BTV = mixed(x_BT)
    for row, name in enumerate(NAMES):
        assert worst(logits_BTV[row : row + 1], alone(source, name)(x_BT[row : row + 1])) <= 1e-5
    with pytest.raises(ValueError, match="other weights than the model's"):
        serve(plain, source, ["few"])


@torch.no_grad()
def test_an_adapter_that_comes_back_to_other_pages_is_read_there(models):
    """The names of the batch are those of the batch before, its pages are not."""
    model, source = models
    server, x_BT = serve(model, source, ["few", "many"], pages=3), tokens(2, 4)
    for names in (["few", None], ["many", None], ["few", None], [None, "many"], ["few", "few"]):
        with server.batch(names) as mixed:
            logits_BTV = mixed(x_BT)
        for row, name in enumerate(names):
            assert worst(logits_BTV[row : row + 1], alone(source, name)(x_BT[row : row + 1])) <= 1e-12
    assert server.cache.counts.evictions == 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", ["torch", "cuda"])
@torch.no_grad()
def test_pages_change_hands_between_passes_that_nobody_waits_for(kernels, device):
    """On a GPU the next adapter's copies, and the next rows' tables, wait behind what still reads those before."""
    needs(kernels)
    model, x_BT = base(layers=1).float().to(device), tokens(3, 5).to(device)
    source = trained(model, {name: LoraConfig(4, targets=("value", "down")) for name in "ab"})
    batches = {name: [name, None, name] for name in "ab"}
    expected = {}
    for name in "ab":
        with serve(model, source, "ab", pages=1).batch(batches[name]) as mixed:
            expected[name] = mixed(x_BT)
    server, found = serve(model, source, "ab", pages=1, kernels=kernels), []
    for name in "abbabababaab":
        with server.batch(batches[name]) as mixed:
            found.append((name, mixed(x_BT)))
    assert worst(expected["a"], expected["b"]) > 1e-2
    for name, logits_BTV in found:
        assert worst(logits_BTV, expected[name]) <= 1e-5


@torch.no_grad()
def test_other_kernels_come_with_the_next_batch(models):
    """Asked for inside of one, they change nothing in it: its rows are laid out for those before."""
    needs("triton")
    model, source = models
    server, x_BT = serve(copy.deepcopy(model).float(), copy.deepcopy(source).float()), tokens(len(NAMES), 3)
    with server.batch(NAMES) as mixed:
        expected_BTV = mixed(x_BT)
        server.compute_with("triton")
        assert torch.equal(mixed(x_BT), expected_BTV)
    assert server.rows.kernels == "triton"


@torch.no_grad()
def test_a_batch_inside_another_is_refused_and_a_step_inside_one_leaves_its_rows(models):
    model, source = models
    server, x_BT = serve(model, source), tokens(2, 4)
    steps = generate_mixed(server, PROMPTS[:2], ["many", None], max_new_tokens=4, sampling=SAMPLED)
    first = next(steps)
    with server.batch(name for name in ["few", "head"]) as mixed:
        expected_BTV = mixed(x_BT)
        with pytest.raises(ValueError, match="a batch of 2 rows is running"), server.batch(["few", "few"]):
            pass
        found = [first, next(steps)]
        assert torch.equal(mixed(x_BT), expected_BTV)
    assert torch.equal(server.model(x_BT), model(x_BT)) and server.cache.held.total() == 1
    alone_ = generate_mixed(server, PROMPTS[:2], ["many", None], max_new_tokens=4, sampling=SAMPLED)
    assert columns([*found, *steps]) == columns(alone_)


@torch.no_grad()
def test_rows_that_could_not_be_sent_are_sent_the_next_time(models, monkeypatch):
    """As where pinned memory runs out."""
    model, source = models
    server, x_BT, names = serve(model, source), tokens(3, 4), ["few", None, "few"]
    with server.batch(names) as mixed:
        expected_BTV = mixed(x_BT)
    with server.batch([None]):
        pass
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr(server.rows, "_sent", Mock(side_effect=RuntimeError("no memory")))
        with server.batch(names):
            pass
    with server.batch(names) as mixed:
        assert torch.equal(mixed(x_BT), expected_BTV)
    assert not server.cache.held.total()


# ---- generating ------------------------------------------------------------------------------------------------------

PROMPTS = [[5, 3], [1] * 12, [7, 8, 9, 10, 2], [22], [4] * 16, [11, 2], [30, 29, 28], [17]]
GREEDY, SAMPLED = Sampling(temperature=0), Sampling(temperature=1.0, seed=7)


def columns(steps) -> list[list[int]]:
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_of_many_adapters_writes_what_each_prompt_gets_alone(models, sampling, use_cache):
    """Adapters active and merged. Rows end early at stop tokens, others slide over the context's end, where they are
    read alone: each goes on with its own adapter."""
    model, source = models
    server, read = serve(model, source, pages=9), []
    server.model.embedding.register_forward_hook(lambda layer, args, out: read.append(len(args[0])))
    options = {"max_new_tokens": 24, "stop_tokens": {0}, "use_cache": use_cache}
    together = columns(generate_mixed(server, PROMPTS, NAMES, sampling=sampling, **options))
    lengths = [len(row) for row in together]
    assert len(set(lengths)) > 2 and max(lengths) == 24 and len(set(read)) > 3, "rows leave"
    assert (1 in read[: read.index(min(n for n in read if n > 1))]) == use_cache, "some are read alone between"
    assert len({token for row in together for token in row}) > 10, "not a degenerate model"
    for row, (prompt, name) in enumerate(zip(PROMPTS, NAMES, strict=True)):
        own = {"sampling": replace(sampling, seed=sampling.seed + row), **options}
        assert columns(generate(alone(source, name), [prompt], **own)) == [together[row]]
        if name is not None:
            merge(source)
            assert columns(generate(source, [prompt], **own)) == [together[row]]
            unmerge(source)
    assert not server.cache.held.total()


def test_batches_take_turns_and_a_closed_one_lets_go(models):
    """Two batches, step by step in turn, between which the model is itself; a third that needs the first's pages."""
    model, source = models
    server, options = serve(model, source, pages=5), {"max_new_tokens": 6, "sampling": SAMPLED}
    expected = [
        columns(generate_mixed(server, PROMPTS[:2], names, **options)) for names in (["few", "many"], ["many", None])
    ]
    x_BT = tokens(2, 4)
    plain = model(x_BT)
    one = generate_mixed(server, PROMPTS[:2], ["few", "many"], **options)
    other = generate_mixed(server, PROMPTS[:2], ["many", None], **options)
    found = []
    for steps in zip(one, other, strict=True):
        found.append(steps)
        assert torch.equal(server.model(x_BT), plain), "between two steps the model is itself"
    assert [columns(steps) for steps in zip(*found, strict=True)] == expected

    one = generate_mixed(server, PROMPTS[:2], ["few", "many"], **options)
    next(one)
    blocks = generate_mixed(server, PROMPTS[:1], ["blocks"], **options)
    with pytest.raises(ValueError, match=r"\['blocks'\] need 2 pages, and running batches hold 4 of 5"):
        next(blocks)
    one.close()
    assert len(list(generate_mixed(server, PROMPTS[:1], ["blocks"], **options))) == 6
    assert not server.cache.held.total()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_adapters_of_other_models_are_refused_with_everything_that_does_not_fit(models):
    model, source = models
    server = serve(model, source, [])
    other = trained(base(mlp_width=24, layers=3), {"few": LoraConfig(80, targets=("up", "query", "embedding"))})
    with pytest.raises(ValueError) as caught:
        server.add("few", other)
    for part in (
        "layers is 3, expected 2",
        "mlp_width is 24, expected 20",
        "other weights than the model's in blocks.0.attention.query, blocks.0.mlp.up, blocks.1.attention.query",
        "embedding is an embedding: expected linear layers only",
        "B of blocks.0.mlp.up has shape [24, 80], expected [20, 80]",
        "blocks.1.attention.query is of rank 80, 20 pages of 4: expected rank 1 to 64",
        "blocks.2.mlp.up is no linear layer",
    ):
        assert part in str(caught.value), part
    merged = copy.deepcopy(source)
    merge(alone(merged, "few"))
    server.add("few", merged)  # what the base was before
    merged.blocks[0].attention.query.base.weight.data[0, 0] += 1e-9
    unmerge(merged)
    merged.blocks[0].attention.query.base.weight.data[0, 0] += 1e-9
    with pytest.raises(
        ValueError, match="adapter 'many': other weights than the model's in blocks.0.attention.query, expected"
    ):
        server.add("many", merged)
    assert list(server.cache.stored) == ["few"]


def test_a_folder_that_does_not_fit_leaves_the_server_as_it_was(tmp_path):
    pair = Pair("llama")
    server = MultiLora(pair.ours(), pages=2, page_rank=4)
    before = {name: value.clone() for name, value in server.model.state_dict().items()}
    folders = {
        "wide": save_theirs(pair.adapted(r=12, target_modules=["q_proj"]), tmp_path / "wide"),
        "embedding": save_theirs(pair.adapted(r=2, target_modules=["q_proj", "embed_tokens"]), tmp_path / "embedding"),
        "other": save_theirs(Pair("qwen3").adapted(r=2, target_modules=["q_proj"]), tmp_path / "other"),
        "good": save_theirs(pair.adapted(r=2, target_modules=["q_proj"]), tmp_path / "good"),
    }
    for name, message in {
        "wide": "is of rank 12, 3 pages of 4: expected rank 1 to 8, of 2 pages",
        "embedding": "embedding is an embedding",
        "other": "has shape",
        "nowhere": "nowhere",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            server.add(name, folders.get(name, tmp_path / "nowhere"))
    server.add("good", folders["good"])
    with pytest.raises(ValueError, match="adapter 'good' exists"):
        server.add("good", folders["good"])
    after = server.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in server.model.parameters())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s: generate_mixed(s, [[1]], ["x"], max_new_tokens=1, sampling=GREEDY), r"\['x'\] are unknown"),
        (lambda s: generate_mixed(s, [[1]], [], max_new_tokens=1, sampling=GREEDY), "1 prompts and 0 adapters"),
        (lambda s: generate_mixed(s, [[]], [None], max_new_tokens=1, sampling=GREEDY), "prompt 0 has 0 tokens"),
        (lambda s: s.select(["few"]), "'few' is not on the device"),
        (lambda s: s.batch(["x"]).__enter__(), r"\['x'\] are unknown: expected some of \['few', 'many'"),
        (lambda s: s.add("few", s.model), "adapter 'few' exists"),
        (lambda s: s.add("new", base()), r"adapters \['new'\] are unknown"),
        (lambda s: MultiLora(s.model, pages=1), "have adapters already"),
        (lambda s: MultiLora(trained(base()), pages=1), "blocks.0.attention.query.* have adapters already"),
        (lambda s: MultiLora(base(), pages=1, kernels="best"), "kernels 'best': expected one of torch, triton, cuda"),
        (lambda s: MultiLora(base(), pages=1, kernels="triton"), "'triton' of a torch.float64 model"),
        (lambda s: MultiLora(base().float(), pages=1, page_rank=257, kernels="cuda"), "pages of 257 ranks"),
    ],
)
def test_bad_input_is_refused(models, act, message):
    with pytest.raises(ValueError, match=message):
        act(serve(*models))


def test_a_batch_of_other_rows_than_were_said_is_refused(models):
    with serve(*models).batch(["few", None]) as model, pytest.raises(ValueError, match="shape .3, 4.*expected 2 rows"):
        model(tokens(3, 4))


def test_a_head_that_a_loss_would_read_past_its_adapter_cannot_have_one(models):
    model, source = models
    reading = copy.deepcopy(model)
    reading.loss_fn = lambda x, weight, targets, softcap, z_loss: x.sum()
    server = serve(reading, source, ["few"])
    with pytest.raises(ValueError, match="head is no linear layer that can have an adapter here"):
        server.add("head", source)


def test_kernels_that_are_not_built_are_said_before_an_adapter_is_read(monkeypatch):
    monkeypatch.setattr(modules, "load", Mock(side_effect=RuntimeError("cuda._simt is not built")))
    with pytest.raises(RuntimeError, match="is not built"):
        MultiLora(base().float(), pages=1, kernels="cuda")
    server = MultiLora(base().float(), pages=1)
    with pytest.raises(RuntimeError, match="is not built"):
        server.compute_with("cuda")
    assert server.rows.kernels == "torch"


# ---- the program -----------------------------------------------------------------------------------------------------


LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": False, "softcap": 0.0, "vocab_size": 257}


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs the program in this process; (exit code, stdout, stderr)."""

    def call(*flags: object) -> tuple[int | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            cli.run(multi.main)
        return stop.value.code, *capsys.readouterr()

    return call


def test_the_program_shows_one_prompt_under_each_adapter(program, tmp_path, monkeypatch):
    source = trained(random_gpt(**SMALL | LLAMA).float(), {"x": LoraConfig(3), "y": LoraConfig(6, targets=("query",))})
    save_pretrained(random_gpt(**SMALL | LLAMA).float(), tmp_path, tokenizer=Tokenizer.bytes_only())
    for name in ("x", "y"):
        save_adapter(source, tmp_path / name, name)
    both = f"x={tmp_path / 'x'},y={tmp_path / 'y'}"
    options = ("--hf", tmp_path, "--prompt", "ab", "--length", 12, "--temperature", 0)
    code, out, err = program(*options, "--adapters", both)
    expected = ""
    for title, name in (("no adapter", None), ("adapter x", "x"), ("adapter y", "y")):
        steps = generate(
            alone(source, name), [[97, 98]], max_new_tokens=12, sampling=GREEDY, vocab_size=257, stop_tokens=[256]
        )
        text = bytes(token for (token,) in steps if token < 256).decode(errors="replace")
        expected += f"--- {title}\nab{text}\n"
    assert not code and out == expected, err
    for flags, message in (
        (("--adapters", "x"), "adapters 'x': expected name=FOLDER"),
        (("--adapters", f"x={tmp_path},x={tmp_path}"), "with each name once"),
        ((), "adapters '': expected name=FOLDER"),
        (("--adapters", f"x={tmp_path / 'nowhere'}"), "nowhere"),
        (("--adapters", both, "--pages", 1), "['x', 'y'] need 2 pages: expected at most 1"),
    ):
        code, out, err = program(*options, *flags)
        assert code == 2 and not out and message in err and err.count("\n") == 1, err
    monkeypatch.setattr(modules, "load", Mock(side_effect=RuntimeError("cuda._simt is not built")))
    code, out, err = program(*options, "--adapters", both, "--kernels", "cuda")
    assert code == 2 and not out and err.endswith("error: cuda._simt is not built\n"), err
