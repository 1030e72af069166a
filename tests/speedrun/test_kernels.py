"""The switches that bring in stage 3: by our kernels a race computes what it does by torch's, gradient by gradient.

On the CPU the kernels run on the model ("cuda") and in Triton's interpreter, at tiny sizes; the same tests run on a GPU
at larger ones, and there a short race with each switch. Float8 is held to torch with the same rounding.
"""

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("cuda._simt", reason="make native builds the kernels")

from common.cli import UserError
from common.dist import World, spawn
from cuda import optim as our_optim
from minigpt.checkpoint import load_checkpoint, load_run
from parallel.comm import make_comm
from parallel.mesh import Layout, Mesh
from speedrun import model as racing
from speedrun.config import RaceConfig
from speedrun.model import Fp8Linear, build, exported, race_loss, refuse
from speedrun.optim import Muon, Rows, halves, joined
from speedrun.presets import PRESETS
from speedrun.schedule import plan
from speedrun.summary import sample
from speedrun.train import gradients, prepare, race, update
from speedrun.winners import Choice, choose, named
from tests.cuda.products import DEVICES

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="pip install triton")
CPU = torch.device("cpu")
HERE = World(rank=0, world_size=1, local_rank=0, device=CPU, backend=None)

TINY = {
    "layers": 2, "width": 48, "heads": 2, "kv_heads": 1, "head_width": 64, "mlp_width": 72, "context": 20,
    "eval_stride": 8, "window_pattern": "SL", "windows": "4,7", "zero_init": False, "softcap": 9.0, "z_loss": 1e-2,
}  # fmt: skip
LARGE = TINY | {"layers": 4, "width": 512, "heads": 4, "kv_heads": 2, "head_width": 128, "mlp_width": 1408,
                "context": 512, "windows": "128,256"}  # fmt: skip
SIZES = {"cpu": (TINY, 2, 96), "cuda": (LARGE, 4, 4096)}


def switch(*marks, **changes):
    triton = [needs_triton] if "triton" in changes.values() or "fp8_mlp" in changes or "fp8_head" in changes else []
    return pytest.param(changes, marks=[*marks, *triton], id="-".join(f"{k}-{v}" for k, v in changes.items()))


SWITCHES = [
    switch(attention="cuda"),
    switch(attention="triton"),
    switch(kernels="cuda", mlp="relu2"),
    switch(kernels="triton"),
    switch(fused_loss=True),
    switch(fused_loss=True, kernels="triton", tied=True),
    switch(attention="triton", kernels="cuda", fused_loss=True, value_gate=True),
]


def stirred(config: RaceConfig, vocabulary: int, device: str) -> nn.Module:
    """What starts at zero would hide what flows through it."""
    model = build(config, vocabulary).to(device)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    return model


def found(config: RaceConfig, device: str, half: bool, forward=lambda model: model) -> dict[str, Tensor]:
    """The loss of one pass as the race computes it, and the gradient of every parameter."""
    _, rows, vocabulary = SIZES[device]
    model = stirred(config, vocabulary, device)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(vocabulary, (rows, config.context + 1), generator=generator).to(device)
    tokens, targets = text[:, :-1], text[:, 1:].clone()
    targets[0, :3] = -100
    run, window = forward(model), plan(config.steps - 1, config).window
    with torch.autocast(device, torch.bfloat16, enabled=half):
        if config.fused_loss:
            loss = value = run(tokens, targets, z_loss=config.z_loss, window=window)
        else:
            loss, value = race_loss(run(tokens, window=window), targets, (1.0,), config.z_loss)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()} | {"loss": value.detach()}


def distance(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", SWITCHES)
def test_every_gradient(changes, device):
    """In bfloat16, whose rounding both sides have: ours is no further from float32 than torch's."""
    sizes = SIZES[device][0]
    plain = {"attention": "torch", "kernels": "torch", "fused_loss": False}
    exact = found(RaceConfig(**sizes | changes | plain), device, half=False)
    torchs = found(RaceConfig(**sizes | changes | plain), device, half=True)
    ours = found(RaceConfig(**sizes | {"attention": "torch", "kernels": "torch"} | changes), device, half=True)
    assert ours.keys() == exact.keys()
    for name, wanted in exact.items():
        near, far = distance(ours[name], wanted), distance(torchs[name], wanted)
        assert near <= 1.4 * far + 2e-3, f"{name}: {near:.3g}, torch {far:.3g}"


@needs_triton
def test_in_float32_by_triton():
    """Without rounding to hide behind, the window of the plan among what is asked."""
    changes = {"attention": "triton", "kernels": "triton", "fused_loss": True}
    exact = found(RaceConfig(**TINY), "cpu", half=False)
    ours = found(RaceConfig(**TINY | changes), "cpu", half=False)
    for name, wanted in exact.items():
        assert distance(ours[name], wanted) <= 2e-5, name
    wider = found(RaceConfig(**TINY | changes | {"windows": "7,4"}), "cpu", half=False)
    name = "blocks.0.attention.query.weight"
    assert distance(wider[name], exact[name]) >= 1e-2, "the window counts"


@pytest.mark.parametrize(
    "changes",
    [
        switch(attention="cuda", kernels="triton", mlp="relu2"),
        switch(attention="triton", kernels="cuda", fused_loss=True, value_gate=True),
        switch(fp8_mlp=True, fp8_head=True),
    ],
)
def test_a_compiled_model_is_one_graph_with_the_same_gradients(changes):
    """By dynamo and the autograd of torch.compile, which ask our operations for shapes; without a code generator."""
    config = RaceConfig(**TINY | {"attention": "torch", "kernels": "torch", "layers": 1} | changes)
    torch._dynamo.reset()  # or it counts the models of other tests as one that changes too often
    whole = partial(torch.compile, fullgraph=True, backend="aot_eager")
    plain, compiled = found(config, "cpu", half=True), found(config, "cpu", half=True, forward=whole)
    for name, wanted in plain.items():
        assert distance(compiled[name], wanted) <= 3e-2, name


# ---- float8 ----------------------------------------------------------------------------------------------------------


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To float8, scaled as a whole so that the largest number is the type's largest."""
    scale = x.abs().max() / torch.finfo(dtype).max
    return (x / scale).to(dtype).to(x.dtype) * scale


class Product(torch.autograd.Function):
    """x W' whose operands are e4m3, its gradients' products with e5m2; in float32."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return rounded(x, torch.float8_e4m3fn) @ rounded(weight, torch.float8_e4m3fn).mT

    @staticmethod
    def backward(ctx, grad):
        x, weight = (rounded(t, torch.float8_e4m3fn) for t in ctx.saved_tensors)
        grad = rounded(grad, torch.float8_e5m2)
        return grad @ weight, grad.flatten(0, -2).mT @ x.flatten(0, -2)


@needs_triton
@pytest.mark.parametrize("changes", [{"fp8_mlp": True}, {"fp8_head": True}, {"fp8_mlp": True, "fp8_head": True}])
def test_float8_is_torchs_with_the_same_rounding(changes, monkeypatch):
    """Sizes that no tile and no 16 divides are among the sizes."""
    sizes = TINY | {"mlp_width": 70, "width": 44, "vocab_multiple": 1}
    whole = found(RaceConfig(**sizes), "cpu", half=False)
    ours = found(RaceConfig(**sizes | changes), "cpu", half=False)
    monkeypatch.setattr(Fp8Linear, "forward", lambda self, x: Product.apply(x, self.weight))
    theirs = found(RaceConfig(**sizes | changes), "cpu", half=False)
    for name, wanted in theirs.items():
        assert distance(ours[name], wanted) <= 5e-3, name
    touched = ["head.weight"] if "fp8_head" in changes else ["blocks.1.mlp.down.weight", "blocks.0.mlp.up.weight"]
    for name in touched:
        assert distance(ours[name], whole[name]) >= 1e-2, f"{name}: 8 bits show"


def test_what_cannot_be_in_float8_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="fp8_head with a tied head: expected --no-tied"):
        RaceConfig(**TINY, fp8_head=True, tied=True)
    with pytest.raises(ValueError, match="fp8_mlp with bias: expected --no-bias"):
        RaceConfig(**TINY, fp8_mlp=True, bias=True)
    config = RaceConfig(**TINY, fp8_mlp=True)
    monkeypatch.setattr(racing, "missing", lambda whose, device: "pip install triton")
    with pytest.raises(UserError, match="fp8: pip install triton"):
        refuse(config, Choice(), CPU, torch.bfloat16)


@needs_triton
def test_float8_on_an_older_gpu_is_refused_in_a_line(monkeypatch):
    from cuda import device

    monkeypatch.setattr(device, "gpu", lambda _: (8, 0, "NVIDIA A100", 108))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(UserError, match="fp8 on NVIDIA A100: expected a Hopper GPU, capability 9.0"):
        refuse(RaceConfig(**TINY, fp8_mlp=True), Choice(), torch.device("cuda"), torch.bfloat16)


# ---- weights in two halves -------------------------------------------------------------------------------------------


def test_halves_round_and_lose_nothing():
    torch.manual_seed(0)
    x = torch.randn(1, 300, 41) * torch.logspace(-30, 30, 41)
    x[0, 0, :6] = torch.tensor([0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])  # three ties
    high, low = halves(x)
    assert torch.equal(joined(list(high), low).view(torch.int32), x.view(torch.int32))
    tie = low == -(2**15)
    assert torch.equal(high[~tie], x.bfloat16()[~tie]) and 3 <= tie.sum() <= 10
    assert high[0, 0, :6].tolist() == [0, 0, 1, 1 + 2**-7, 1 + 2**-6, -1 - 2**-7]


@pytest.mark.parametrize("normuon", [0.0, 0.9])
def test_training_with_halves_is_training_in_float32_bit_by_bit(normuon):
    """Of which the model is given the rounded weights, and takes the step that these have the gradients for."""
    torch.manual_seed(0)
    shapes = [(24, 40), (40, 24), (24, 40)]
    whole = [nn.Parameter(torch.randn(shape) / 5) for shape in shapes]
    split = [nn.Parameter(p.detach().clone()) for p in whole]
    options = {"lr": 0.02, "beta2": normuon, "weight_decay": 0.1, "dtype": torch.bfloat16}
    in_float32, in_halves = Muon(whole, **options), Muon(split, **options)
    in_halves.halve()
    for step in range(8):
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(step)).bfloat16()
        seen = [halves(p.detach())[0].requires_grad_() for p in whole]
        for weights in (seen, split):
            (x @ weights[0].mT @ weights[1].mT @ weights[2].mT).float().square().mean().backward()
        assert all(torch.equal(p, q) for p, q in zip(seen, split, strict=True)), step
        for p, q in zip(whole, seen, strict=True):
            p.grad = q.grad.float()
        in_float32.step(), in_halves.step()
        for optimizer in (in_float32, in_halves):
            optimizer.zero_grad()
    for _, same in in_halves.stacks:
        low = in_halves.state[same[0]]["low"]
        exact = [whole[next(i for i, p in enumerate(split) if p is one)] for one in same]
        assert torch.equal(joined(same, low), torch.stack([p.detach() for p in exact]))
    assert all(p.dtype == torch.bfloat16 for p in split)


# ---- races -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> RaceConfig:
    """A race of a second."""
    text = tmp_path_factory.mktemp("corpus") / "text.py"
    text.write_bytes(Path(json.__file__).read_bytes()[:6000])
    return replace(
        PRESETS["smoke"], corpus=str(text), tokenizer="bytes", folder=text.parent / "run", device="cpu", steps=4,
        warmup=2, eval_every=2, checkpoint_every=2, keep=9, batch=2, context=32, eval_stride=32, eval_windows=2,
        dtype="bfloat16", peak_tflops=1.0,
    )  # fmt: skip


def cut(folder: Path, to: Path, step: int) -> Path:
    """The run as if it had been killed at a step."""
    shutil.copytree(folder, to)
    for path in (to / "checkpoints").iterdir():
        if path.name.startswith("step_") and int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return to


def same_run(one: Path, other: Path, exactly: bool = True) -> None:
    """Not exactly: but for the last bit of AdamW in Triton's interpreter."""
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for group in ("model", "optimizer0"):
        ours, theirs = (load_checkpoint(folder)[0].tensors(group) for folder in (one, other))
        assert theirs and ours.keys() == theirs.keys()
        for name, value in theirs.items():
            error = (ours[name].double() - value.double()).abs().max()
            assert error <= (0 if exactly else 1e-6 * value.double().abs().max()), name


def test_a_race_with_halves_resumes_and_is_read_by_stage_2(short, tmp_path):
    config = replace(short, bf16_weights=True, folder=tmp_path / "halves")
    run = race(config, HERE)
    matrices = [p for p in run.muon.param_groups[0]["params"]]
    assert all(p.dtype == torch.bfloat16 for p in matrices)
    lows = [value for name, value in load_checkpoint(config.folder)[0].tensors("optimizer0").items() if "low" in name]
    assert lows and all(low.dtype == torch.int16 and low.any() for low in lows)
    again = replace(config, folder=cut(config.folder, tmp_path / "again", 2), resume=True)
    race(again, HERE)
    same_run(again.folder, config.folder)
    model, _ = load_run(config.folder)
    weights = dict(model.named_parameters())
    for name, p in run.model.named_parameters():
        assert weights[name].dtype == torch.float32 and torch.equal(weights[name], p.float()), name
    tokens = torch.arange(10)[None]
    assert torch.equal(model(tokens), exported(run.model)(tokens))
    assert sample(run).count("\n"), "a run samples from its weights in float32"


def test_halves_stay_near_float32(short, tmp_path):
    losses = [
        race(replace(short, bf16_weights=half, folder=tmp_path / str(half)), HERE).bits_per_byte for half in (0, 1)
    ]
    assert abs(losses[0] - losses[1]) <= 0.01 * losses[0]


def test_halves_are_refused_where_products_are_in_float32(short):
    with pytest.raises(ValueError, match="bf16_weights with dtype float32: expected bfloat16"):
        replace(short, bf16_weights=True, dtype="float32")
    with pytest.raises(ValueError, match="bf16_weights with optimizer adamw: expected muon"):
        replace(short, bf16_weights=True, optimizer="adamw")
    with pytest.raises(ValueError, match="bf16_weights where dtype auto is float32: expected --dtype bfloat16"):
        refuse(replace(short, bf16_weights=True, dtype="auto"), Choice(), CPU, torch.float32)


OURS = [
    switch(kernels="cuda", attention="cuda", head_width=64, tied=True, untie_at=0.5),
    switch(kernels="triton", attention="triton"),
    switch(fused_loss=True, accumulate=2),
    switch(fp8_mlp=True, fp8_head=True),
]
TORCHS = {"attention": "torch", "kernels": "torch", "fused_loss": False, "fp8_mlp": False, "fp8_head": False}
LITTLE = {"layers": 1, "width": 16, "heads": 1, "kv_heads": 1, "mlp_width": 16, "steps": 2, "eval_every": 1,
          "checkpoint_every": 1, "eval_windows": 1, "context": 16, "eval_stride": 16}  # fmt: skip


@pytest.mark.parametrize("changes", OURS)
def test_a_race_by_our_kernels_ends_where_torchs_does(short, tmp_path, changes):
    """Resumed after its first half; read, sampled and evaluated by stage 2."""
    text = tmp_path / "text.py"
    text.write_bytes(Path(json.__file__).read_bytes()[:2000])
    short = replace(short, corpus=str(text))
    theirs = race(replace(short, **LITTLE | changes | TORCHS, folder=tmp_path / "theirs"), HERE)
    config = replace(short, **LITTLE | changes, folder=tmp_path / "ours")
    ours = race(config, HERE)
    assert abs(ours.bits_per_byte - theirs.bits_per_byte) <= 0.01 * theirs.bits_per_byte
    again = replace(config, folder=cut(config.folder, tmp_path / "again", 1), resume=True)
    race(again, HERE)
    same_run(again.folder, config.folder, exactly=config.kernels != "triton")
    assert load_run(config.folder) and sample(ours).count("\n")


# ---- what a config names and is not there ----------------------------------------------------------------------------


def test_kernels_that_are_not_built_are_refused_before_any_work(short, tmp_path, monkeypatch):
    from cuda import modules

    def not_built(name):
        raise RuntimeError(f"cuda.{name} is not built: run `make native`")

    monkeypatch.setattr(modules, "load", not_built)
    for changes in ({"attention": "cuda"}, {"kernels": "cuda"}):
        config = replace(short, **changes, head_width=64, folder=tmp_path / "never")
        with pytest.raises(UserError, match="kernels cuda: cuda._simt is not built: run `make native`"):
            prepare(config, HERE)
    assert not (tmp_path / "never").exists()
    choice, _ = choose(replace(short, fused_loss=True), CPU, torch.bfloat16)
    assert choice.loss == "triton", "the other one does"


def test_without_triton_it_is_said(short, monkeypatch):
    import cuda

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "cuda.triton_compat", raising=False)
    monkeypatch.delattr(cuda, "triton_compat", raising=False)
    for changes in ({"attention": "triton"}, {"kernels": "triton"}):
        with pytest.raises(UserError, match="kernels triton: .*pip install triton"):
            choose(replace(short, **changes), CPU, torch.bfloat16)
    with pytest.raises(UserError, match="fp8: .*pip install triton"):
        refuse(replace(short, fp8_mlp=True), Choice(), CPU, torch.bfloat16)


def test_cuda_graphs_want_a_cuda_device(short):
    with pytest.raises(ValueError, match="cuda_graphs on cpu: expected a CUDA device"):
        refuse(replace(short, compile=True, cuda_graphs=True), Choice(), CPU, torch.bfloat16)


def test_attention_in_float32_is_refused(short):
    config = replace(short, attention="cuda", head_width=64, dtype="float32")
    with pytest.raises(ValueError, match="dtype float32 with attention cuda: expected bfloat16"):
        refuse(config, named(config), CPU, torch.float32)


# ---- AdamW over ranks ------------------------------------------------------------------------------------------------

SHAPES = [(6, 5), (8, 3), (7, 4), (4,), ()]  # two tables that two ranks share, three parameters that both step


def gradient(shape: tuple, step: int, rank: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + 10 * rank + len(shape)))


def stepped(rank: int, world_size: int, kernels: str) -> list[Tensor]:
    """Six steps: a copy of the first table joins after the second, after the fourth all goes on from a state dict."""
    comm = make_comm(Mesh(Layout(dp=world_size), rank, world_size).group("dp"))
    make = partial(torch.optim.AdamW if kernels == "torch" else partial(our_optim.AdamW, kernels=kernels), lr=0.01)
    parameters = [nn.Parameter(gradient(shape, 0, 0)) for shape in SHAPES]

    def rows(members: list[nn.Parameter]) -> Rows:
        groups = [
            {"params": some, "lr": 0.01, "peak_lr": 0.01, "weight_decay": 0.1} for some in (members[:2], members[2:5])
        ]
        return Rows(groups, make, comm)

    optimizer = rows(parameters)
    for step in range(1, 7):
        if step == 3:
            parameters.append(nn.Parameter(parameters[0].detach().clone()))
            optimizer.add_copy(parameters[0], parameters[-1], 0.02)
        if step == 5:
            state, fresh = optimizer.state_dict(), rows(parameters)
            fresh.add_copy(parameters[0], parameters[-1], 0.02)
            optimizer = fresh
            optimizer.load_state_dict(state)
        for p in parameters:
            each = [gradient(tuple(p.shape), step, other) for other in range(2)]
            p.grad = each[rank] if world_size == 2 else sum(each) / 2
        optimizer.start()
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("kernels", ["cuda", pytest.param("triton", marks=needs_triton)])
def test_our_adamw_on_two_ranks_is_torchs_on_one(kernels):
    wanted = stepped(0, 1, "torch")
    alone = stepped(0, 1, kernels)
    ranks = spawn(stepped, 2, kernels)
    for found_there in (alone, *ranks):
        for p, q in zip(found_there, wanted, strict=True):
            assert (p - q).abs().max() <= 1e-6


# ---- on a GPU --------------------------------------------------------------------------------------------------------

BIG = {
    "device": "cuda", "tokenizer": "bpe:1024", "layers": 4, "width": 512, "heads": 4, "kv_heads": 2, "mlp_width": 1408,
    "context": 512, "batch": 8, "steps": 60, "eval_every": 30, "checkpoint_every": 30, "eval_windows": 4,
    "eval_stride": 512, "compile": True, "peak_tflops": 989.0,
}  # fmt: skip
RACES = [
    switch(attention="cuda"),
    switch(attention="triton", windows="128,256", window_pattern="SSL", yarn=True),
    switch(kernels="cuda"),
    switch(kernels="triton"),
    switch(kernels="cuda", attention="cuda", fused_loss=True, tied=True, untie_at=0.5),
    switch(fp8_mlp=True, fp8_head=True),
    switch(bf16_weights=True),
    switch(cuda_graphs=True, bf16_weights=True, batches="4,8"),
    switch(cuda_graphs=True, accumulate=2, windows="128,256", yarn=True, tied=True, untie_at=0.5),
    switch(cuda_graphs=True, attention="cuda", kernels="cuda", fused_loss=True, bf16_weights=True),
]


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> RaceConfig:
    text = tmp_path_factory.mktemp("corpus") / "text.py"
    text.write_bytes(b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:60]))
    return replace(PRESETS["smoke"], **BIG, corpus=str(text), folder=text.parent / "run")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", RACES)
def test_a_compiled_race_on_a_gpu(big, tmp_path, changes):
    """60 steps, step by step beside torch's kernels without CUDA graphs."""
    world = replace(HERE, device=torch.device("cuda", 0))
    off = TORCHS | {"cuda_graphs": False, "bf16_weights": False}
    race(replace(big, **changes | off, folder=tmp_path / "theirs"), world)
    run = race(replace(big, **changes, folder=tmp_path / "ours"), world)
    ours, theirs = losses(tmp_path / "ours"), losses(tmp_path / "theirs")
    assert len(ours) == len(theirs) == 60
    tolerance = 0.05 if "fp8_mlp" in changes else 0.02
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        assert abs(one - other) <= tolerance * other, (step, one, other)
    assert load_run(run.config.folder) and sample(run).count("\n")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_gradients_by_cuda_graphs_are_those_without(big, tmp_path, accumulate):
    """Each of several passes over other batches: a replay writes where the one before left its gradients."""
    world = replace(HERE, device=torch.device("cuda", 0))
    made = {}
    for graphs in (False, True):
        torch._dynamo.reset()
        config = replace(big, accumulate=accumulate, cuda_graphs=graphs, folder=tmp_path / str(graphs))
        run, _ = prepare(config, world)
        now, made[graphs] = plan(0, config), []
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            rows = torch.randint(run.model.config.vocab_size, (8, config.context + 1), generator=generator).cuda()
            value = gradients(run, now, rows[:, :-1], rows[:, 1:].contiguous())
            made[graphs].append([value, *(p.grad.clone() for p in run.model.parameters())])
            run.model.zero_grad(set_to_none=True)
    for step, (ours, theirs) in enumerate(zip(made[True], made[False], strict=True)):
        for one, other in zip(ours, theirs, strict=True):
            if other.any():
                assert distance(one, other) <= 1e-2, step
            else:
                assert not one.any(), step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [False, True])
def test_memory_is_flat_over_50_steps(big, tmp_path, graphs):
    world = replace(HERE, device=torch.device("cuda", 0))
    changes = {"attention": "cuda", "kernels": "cuda", "fused_loss": True, "bf16_weights": True}
    config = replace(big, **changes, cuda_graphs=graphs, folder=tmp_path / "run")
    run, _ = prepare(config, world)
    rows = torch.randint(run.model.config.vocab_size, (8, config.context + 1), device="cuda")
    held = []
    for step in range(58):
        now = plan(step, config)
        gradients(run, now, rows[:, :-1], rows[:, 1:].contiguous())
        update(run, now)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_reserved())
    assert held[8] == held[-1], held
