"""The race: one program from text to a trained GPT, to be read from top to bottom. `make speedrun`,
`python -m speedrun.train`, and on N ranks `torchrun --standalone --nproc-per-node N -m speedrun.train`.

What a step does is decided by the config and the step's number (speedrun/schedule.py), so a killed run resumes to the
same numbers. The clock runs in the steps alone: neither compiling, nor looking at held-out text, nor saving is on it.
N ranks share each batch and compute what one would. Refused: a folder that is taken, batches that ranks cannot share,
an average of the weights, going on after a NaN.

Shapes: B rows of this rank, T tokens in each, V vocabulary.
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from common import cli
from common.cli import UserError
from common.dist import World, finish, init_from_env
from common.log import RunLog
from minigpt.batches import Prefetcher, batch, check_length, held_out_windows, rank_rows
from minigpt.checkpoint import TOKENIZER, load_checkpoint
from minigpt.download import endpoint_from_env
from minigpt.evaluate import score, spread, to_bits_per_byte
from minigpt.train import interruptible, measured_peak, memory, refuse_existing
from minigpt.trainer import choose_dtype
from parallel.mesh import Layout, Mesh
from speedrun import dashboard, report, tracks
from speedrun.config import RaceConfig
from speedrun.documents import DocumentRows, documents_of
from speedrun.fits import EVALUATION_ROWS, check_machine, check_memory, free_memory
from speedrun.logbook import begin_sitting, finish_log
from speedrun.loss import compiling, loss_of
from speedrun.model import build, refuse, stretch, untie
from speedrun.optim import clip
from speedrun.presets import from_command_line
from speedrun.schedule import Plan, plan
from speedrun.spent import Spent, TimedComm
from speedrun.state import Run, check_same, load, make_optimizers, optimizers, save
from speedrun.summary import as_lines, sample, summarise
from speedrun.winners import choose

READ_EVERY = 25  # steps on a GPU: to read a loss is to wait for it
REHEARSED = 8  # steps of each kind, to fit a run to its minutes


# ---- before the first step -------------------------------------------------------------------------------------------


def prepare(config: RaceConfig, world: World) -> tuple[Run, list[str]]:
    """A run at its first step, or at the one that its newest checkpoint holds; and what there is to say about it."""
    check(config, world)
    check_machine(config.track, world)
    if not config.resume:
        refuse_existing(config.folder)
    dtype = choose_dtype(config.dtype, world.device)
    choice, whose = choose(config, world.device, dtype)
    refuse(config, choice, world.device, dtype)
    data = tracks.load(config.corpus, config.tokenizer, config.track, endpoint_from_env())
    check_length(data.train, config.context)
    documents = DocumentRows(data.train, data.tokenizer.separator) if config.documents else None
    free, half = free_memory(world.device), dtype == torch.bfloat16
    check_memory(config, data.tokenizer.vocab_size, world.world_size, free, half)
    spent = Spent(world.device)
    comm = TimedComm(Mesh(Layout(dp=world.world_size), world.rank, world.world_size).group("dp"), spent)
    model = build(config, data.tokenizer.vocab_size, choice).to(world.device)
    lengths_V = torch.from_numpy(data.byte_lengths).to(world.device)
    run = Run(config, world, comm, data, model, dtype, choice, lengths_V, spent, documents)
    notes = [
        data.describe(),
        f"model: {model.num_parameters():,} parameters, {str(dtype)[6:]} on {world.device.type}",
        whose,
    ]
    if documents is not None:
        left_out = documents.dropped(config.context)
        notes.append(f"documents: {documents.rows(config.context):,} rows in an epoch, {left_out:,} tokens left over")
    make_optimizers(run)
    if config.resume:
        checkpoint, warnings = load_checkpoint(config.folder)
        check_same(run, checkpoint)
        run.step = checkpoint.state["step"]
        if run.step:
            change(run, plan(run.step - 1, config))  # the model as it was when it was saved
        notes += warnings + load(run, checkpoint)
    run.forward = loss_of(run.model, config, run.dtype, world.device)
    comm.barrier()  # every rank has looked at the folder before rank 0 writes into it
    if not config.resume:
        if world.rank == 0:
            data.tokenizer.save(config.folder / TOKENIZER)
        save(run)
    return run, notes


def fitted(config: RaceConfig, world: World) -> RaceConfig:
    """With as many steps as take config.minutes here, by the time of a few steps of each kind; all ranks alike."""
    kinds: dict[tuple, list[int]] = {}
    for step in range(config.steps):
        kinds.setdefault(plan(step, config).kind, []).append(step)
    with TemporaryDirectory() as folder, compiling(config, world.device):
        run, _ = prepare(replace(config, folder=Path(folder) / "rehearsal", minutes=0.0), world)
        make, total = batches(run), 0.0
        for steps in kinds.values():
            now = plan(steps[0], config)
            change(run, now)
            mine = [torch.from_numpy(part).to(world.device) for part in make(steps[0])]
            warm_up(run, now, *mine)
            began = time.perf_counter()
            for _ in range(REHEARSED):
                gradients(run, now, *mine)
                update(run, now)
            wait_for(world.device)
            total += (time.perf_counter() - began) / REHEARSED * len(steps)
    slowest = torch.tensor([total], device=world.device)
    run.comm.all_reduce(slowest, "max", tag="time of a step")
    return replace(config, steps=max(1, int(config.steps * 60 * config.minutes / slowest.item())))


def check(config: RaceConfig, world: World) -> None:
    """Raises ValueError for what ranks or this program cannot do."""
    for step in range(config.steps):
        now, ranks = plan(step, config), world.world_size
        if now.rows % (ranks * config.accumulate):
            raise ValueError(f"{now.rows} rows at step {step} over {ranks} ranks x accumulate {config.accumulate}: "
                             f"expected a multiple of {ranks * config.accumulate}")  # fmt: skip
        if long_rows(now, config) % ranks:
            raise ValueError(f"{long_rows(now, config)} rows of {config.context} at step {step} over {ranks} ranks: "
                             f"expected a multiple of {ranks}, shorter windows are parts of them")  # fmt: skip
    if config.ema:
        raise ValueError(f"ema {config.ema}: expected 0, the race has no average of the weights")


# ---- a step ----------------------------------------------------------------------------------------------------------


def batches(run: Run) -> Callable[[int], tuple]:
    """step -> numpy (inputs_BT, targets_BT) of this rank, with documents what tells where they are. Shorter windows are
    parts of the rows of config.context that would stand in their place, so that an epoch has every token once."""
    config, world = run.config, run.world
    taken = list(accumulate((long_rows(plan(step, config), config) for step in range(config.steps)), initial=0))

    def make(step: int) -> tuple:
        now = plan(step, config)
        first, rows = rank_rows(taken[step], long_rows(now, config), world.rank, world.world_size)
        where = {"seed": config.seed, "row": first, "rows": rows, "context": config.context}
        if run.documents is not None:
            return run.documents.batch(**where, window=now.context, parts=config.accumulate)
        return tuple(array.reshape(-1, now.context) for array in batch(run.data.train, **where))

    return make


def long_rows(now: Plan, config: RaceConfig) -> int:
    return now.rows * now.context // config.context


def change(run: Run, now: Plan) -> None:
    """What this step asks of the model and its optimizers that the one before did not."""
    if now.stretched:
        seen = now.stretched.split(",")
        for windows in accumulate(seen, lambda before, window: f"{before},{window}"):
            if len(windows) > len(run.model.config.rope_windows):
                stretch(run.model, windows)
    if now.untied and run.model.config.tied:
        weight = untie(run.model)
        if run.rest is not None:
            run.rest.add_copy(run.model.embedding.weight, weight, run.config.head_lr or run.config.learning_rate)


def gradients(run: Run, now: Plan, inputs_BT: Tensor, targets_BT: Tensor, *where: Tensor) -> Tensor:
    """Leaves the gradient of the mean loss of this rank's rows; returns mean nats and bytes of their next tokens."""
    config, device = run.config, run.world.device
    options = {"window": now.window} if config.windows else {}
    if config.document_mask:
        options["separator"] = run.data.tokenizer.separator
    nats = torch.zeros((), device=device)
    if config.cuda_graphs and config.accumulate > 1:
        # .grad would be memory of the graph, which the next replay writes anew instead of adding to it.
        for p in run.model.parameters():
            p.grad = torch.zeros_like(p)
    parts = (x.chunk(config.accumulate) for x in (inputs_BT, targets_BT, *where))
    for part_BT, wanted_BT, *its in zip(*parts, strict=True):
        options |= {"documents": documents_of(*its, run.choice.attention)} if its else {}
        if config.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # nothing of the part before is read again
        half = torch.autocast(device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16)
        with run.spent("forward"), half:
            loss, next_token = run.forward(part_BT, wanted_BT, now.mtp, **options)
        with run.spent("backward"):
            (loss / config.accumulate).backward()
        nats += next_token / config.accumulate
    return torch.stack([nats, run.byte_lengths_V[targets_BT].to(nats.dtype).mean()])


def update(run: Run, now: Plan) -> None:
    """One step of all optimizers. With overlap all collectives are on their way before the first update."""
    if run.config.clip:
        clip(list(run.model.parameters()), run.config.clip, run.comm)
    for optimizer in optimizers(run) if run.config.overlap else ():
        optimizer.start()
    for optimizer in optimizers(run):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * now.lr_share
            if optimizer is run.muon:
                group["momentum"] = now.momentum
        optimizer.step()
    run.model.zero_grad(set_to_none=True)


def warm_up(run: Run, now: Plan, *batch_of_rank: Tensor) -> float:
    """Seconds of a first pass of its kind, which compiles; off the clock, and without a trace in the run's numbers.
    All ranks are done with it before one goes on, or the clock of the first would count its wait for the last."""
    wait_for(run.world.device)
    began = time.perf_counter()
    for _ in range(2 if run.config.cuda_graphs else 1):  # the second pass records the launches
        gradients(run, now, *batch_of_rank)
        run.model.zero_grad(set_to_none=True)
    wait_for(run.world.device)
    run.comm.barrier()
    seconds = time.perf_counter() - began
    run.warm_seconds += seconds
    return seconds


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loop(run: Run, notes: list[str]) -> None:
    """The steps that are left."""
    config, world = run.config, run.world
    watch = {"enabled": world.rank == 0, "view": dashboard.view(run, config.track) if world.rank == 0 else None}
    log = RunLog(config.folder, config, total_steps=config.steps, start_step=run.step, **watch)
    peak = 1e12 * config.peak_tflops or measured_peak(str(run.dtype).removeprefix("torch."), world.device)
    read_every = 1 if world.device.type == "cpu" else READ_EVERY
    ahead = Prefetcher(batches(run), world.device, depth=2 if config.prefetch else 0)
    with log, interruptible() as interrupted, ahead, compiling(config, world.device):
        for note in notes:
            log.message(note)
        unread, seen, began = [], set(), time.perf_counter()
        run.spent.begin()
        while run.step < config.steps:
            now = plan(run.step, config)
            change(run, now)
            with run.spent("data"):
                batch_of_rank = ahead.next(run.step)
            if now.kind not in seen:
                seen.add(now.kind)
                with run.spent(None):
                    began += warm_up(run, now, *batch_of_rank)
            unread.append((now, gradients(run, now, *batch_of_rank)))
            with run.spent("optimizer"):
                update(run, now)
            run.step += 1
            last, look = run.step == config.steps, run.step % config.eval_every == 0
            due = last or run.step % config.checkpoint_every == 0
            if not (last or look or due or len(unread) == read_every):
                continue
            wait_for(world.device)
            seconds, parts = time.perf_counter() - began, run.spent.take()
            found, shown, stop = read(run, log, unread, seconds, parts, peak, interrupted())
            found |= evaluate(run) if last or look else {}
            log.metrics(run.step, **found)
            log.progress(run.step, **shown)
            if due or stop:
                save(run)
            if stop and not last:
                again = f"python -m {cli.program()} --folder {config.folder} --resume"
                log.message(f"stopped: {config.folder} holds step {run.step}; continue with: {again}")
                raise KeyboardInterrupt
            unread, began = [], time.perf_counter()
            run.spent.begin()


def read(
    run: Run,
    log: RunLog,
    unread: list[tuple[Plan, Tensor]],
    seconds: float,
    parts: dict[str, float],
    peak: float,
    stop: bool,
) -> tuple[dict[str, float], dict[str, Any], bool]:
    """Reads the losses of the last steps, which waits for a GPU, and files them, but for the metrics of the last one;
    those, what to show of it, whether any rank wants to stop."""
    values = torch.stack([*(pair for _, pair in unread), torch.full_like(unread[0][1], float(stop))]).double()
    run.comm.all_reduce(values, "mean", tag="losses")
    *pairs, (stops, _) = values.tolist()
    run.seconds += seconds
    each = seconds / len(unread)
    spent = {f"{part}_ms": 1e3 * value / len(unread) for part, value in parts.items()}
    for number, ((now, _), (loss, size)) in enumerate(zip(unread, pairs, strict=True), run.step - len(unread) + 1):
        if not math.isfinite(loss):
            raise UserError(f"loss {loss:g} at step {number}: stopped; a lower learning rate may help")
        speed = now.rows * now.context / each
        mfu = run.model.num_flops_per_token(now.context, now.window) * speed / (peak * run.world.world_size)
        bits = loss / math.log(2) / size if size else math.nan
        metrics = {"loss": loss, "train_bits_per_byte": bits, "lr_share": now.lr_share}
        if number < run.step:
            log.metrics(number, **metrics)
        about = {"step_ms": 1e3 * each, "tokens_per_s": speed, "mfu": mfu, "memory_bytes": memory(run.world.device)}
        log.timing(number, **about, **spent)
    return metrics, {"loss": loss, "tokens_per_s": round(speed), "mfu": f"{mfu:.0%}"}, stops > 0


# ---- looking ---------------------------------------------------------------------------------------------------------


def evaluate(run: Run) -> dict[str, float]:
    """After the last step bits per byte of all held-out text, before it a look at some windows. Ranks share. A model
    that was trained on single documents sees single documents here."""
    config, final = run.config, run.step == run.config.steps
    windows = held_out_windows(run.data.held_out.size, config.context, config.eval_stride)
    windows = windows if final else spread(windows, config.eval_windows)
    mine, device = windows[run.world.rank :: run.world.world_size], run.world.device
    separator = run.data.tokenizer.separator if config.document_mask or config.documents else None
    options = {"window": plan(run.step - 1, config).window} if config.windows else {}
    model = partial(run.model, separator=separator, **options)  # not compiled: the last windows are fewer
    given = run.data.held_out, run.data.byte_lengths, mine
    totals = score(model, *given, rows=EVALUATION_ROWS, device=device, dtype=run.dtype)
    run.comm.all_reduce(totals, tag="held-out text")
    value = to_bits_per_byte(totals)
    if not final:
        return {"held_out_look": value}
    run.bits_per_byte = value
    return {"held_out_bits_per_byte": value}


# ---- the program -----------------------------------------------------------------------------------------------------


def race(config: RaceConfig, world: World) -> Run:
    """Runs the steps that are left, as rank `world.rank` of all that call it alike; the finished run.

    Raises ValueError or UserError for what the user can mend, before anything is written; KeyboardInterrupt after
    Ctrl-C, once the checkpoint is saved.
    """
    if config.minutes and not config.resume:
        refuse_existing(config.folder)
        config = fitted(config, world)
        gc.collect()  # the rehearsal's model, before the next one asks how much memory is free
        torch.cuda.empty_cache()
    run, notes = prepare(config, world)
    if config.minutes:
        notes.append(f"{config.steps:,} steps, as many as were found to take {config.minutes:g} minutes")
    if run.step < config.steps:
        begin_sitting(run)
        loop(run, notes)
    finish_log(run)
    return run


def main() -> None:
    began = time.perf_counter()
    config = from_command_line()
    world = init_from_env(None if config.device == "auto" else config.device)
    try:
        run = race(config, world)
    finally:
        finish()
    if world.rank == 0:
        print(as_lines(summarise(run, time.perf_counter() - began), run.config))
        print(sample(run))
        report.write([run.config.folder], run.config.folder / report.FILE)


if __name__ == "__main__":
    cli.run(main)
