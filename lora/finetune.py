"""Fine-tunes a GPT on questions and answers, in up to four ways, and compares them: `python -m lora.finetune --help`.

Starts from the model of `make speedrun` (or --hf), by default on the standard library: from the name and docstring of a
function, write its signature. One folder a run:

    config.json  left_out.jsonl  report.md  curves.png
    base.jsonl                       what the untrained model answers to the held-out prompts
    lora/metrics.jsonl  lora/held_out.jsonl  lora/adapter/  lora/summary.json        and so on for each method
    full/tokenizer.json, beside which minigpt.sample finds the model; full/model/ for its --hf where the base is one

A run that was killed or stopped goes on with --resume, to the same numbers bit by bit on a CPU; methods that are done
stay. On N ranks: `torchrun --standalone --nproc-per-node N -m lora.finetune`. Refused: overwriting a run, resuming
another one or one whose base or data have changed since, and what config, data and adapters refuse, all of it before
the first step.
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from common import cli
from common.dist import World, finish, init_from_env
from common.log import RunLog, atomic_write, versions
from lora import report
from lora.adapter_file import save_anywhere
from lora.config import LoraConfig
from lora.finetune_config import METHODS, PRESETS, FinetuneConfig, Method, deciding, from_plain, plain
from lora.finetuner import Finetuner
from lora.judge import judge, write_judged
from lora.methods import adapter_config, frozen, model_digest, num_bytes, prepare, trained
from lora.report import ANSWERS, CONFIG, SUMMARY
from lora.task import Task, load_task
from minigpt.checkpoint import TOKENIZER, checkpoint_folders, differing
from minigpt.hf import read_json, save_pretrained
from minigpt.sample import Source, SourceConfig, load_source
from minigpt.train import interruptible, memory
from parallel.comm import Comm, Listener, make_comm
from parallel.debug import Watchdog
from parallel.errors import run_ranks
from parallel.mesh import Layout, Mesh

LEFT_OUT = "left_out.jsonl"


@dataclass(frozen=True, slots=True)
class Job:
    """What all methods of a run share."""

    config: FinetuneConfig
    source: Source
    task: Task
    comm: Comm
    device: torch.device
    identity: dict[str, Any]

    @property
    def writes(self) -> bool:
        return self.comm.rank == 0

    def folder(self, method: Method) -> Path:
        return self.config.folder / method

    def start(self, method: Method) -> Path:
        """Where the answers before training are: of methods that start from the same weights in one file."""
        return self.config.folder / (f"base-{self.config.base_format}.jsonl" if method == "qlora" else "base.jsonl")


def finetune(config: FinetuneConfig, world: World, listeners: Sequence[Listener] = ()) -> str:
    """Runs the methods that are left, all ranks alike, and returns the report. Raises ValueError or UserError for what
    the user can mend; KeyboardInterrupt after Ctrl-C, once a checkpoint is saved."""
    if not config.resume:
        refuse_existing(config.folder)
    source = load_base(config)
    task = load_task(config, source)
    for method in config.methods:
        adapter_config(source.model, method, config)  # says now what would only come up after other methods
    comm = make_comm(Mesh(Layout(dp=world.world_size), world.rank, world.world_size).group("dp"), listeners=listeners)
    job = Job(config, source, task, comm, world.device, identity(source, task))
    if config.resume:
        refuse_another(config.folder / CONFIG, job.identity)
    left = [method for method in config.methods if not (job.folder(method) / SUMMARY).exists()]
    comm.barrier()  # every rank has looked before rank 0 writes
    if job.writes:
        write_config(job)
        print(describe_base(job), task.describe(), sep="\n", flush=True)
    try:
        for method in left:
            run_method(job, method)
    except KeyboardInterrupt:
        if job.writes:
            print(f"\nstopped; continue with: python -m {cli.program()} --folder {config.folder} --resume", flush=True)
        raise
    comm.barrier()
    done = [method for method in METHODS if (job.folder(method) / SUMMARY).exists()]  # also of earlier sittings
    return report.write(config.folder, done, task.signatures) if job.writes else ""


def load_base(config: FinetuneConfig) -> Source:
    if config.hf is None and not checkpoint_folders(config.folder_of_base):
        raise ValueError(
            f"{config.folder_of_base}: no model there: make one with `make speedrun`, or give --folder-of-base RUN or "
            f"--hf FOLDER"
        )
    return load_source(SourceConfig(folder=config.folder_of_base, hf=config.hf))


def refuse_existing(folder: Path) -> None:
    if (folder / CONFIG).exists():
        raise ValueError(f"{folder} already holds a run ({CONFIG}): continue with --resume, or choose another --folder")


def identity(source: Source, task: Task) -> dict[str, Any]:
    """What decides a run's numbers besides its config: a file may change while its name stays."""
    return {
        "data": {"name": task.examples.name, "digest": task.digest},
        "base": {"digest": model_digest(source.model), "tokenizer": source.tokenizer.digest},
    }


def refuse_another(path: Path, identity: dict[str, Any]) -> None:
    """Methods that are done would be compared with methods of another base, or judged on other examples."""
    stored = read_json(path, "the folder of a run that lora.finetune began")
    there, here = (
        {f"{name} {key}": value for name in identity for key, value in (found.get(name) or {}).items()}
        for found in (stored, identity)
    )
    if differences := differing(there, here):
        raise ValueError(f"{path} belongs to another run: {differences}")


def write_config(job: Job) -> None:
    config = job.config
    about = {"config": plain(config), **job.identity, "versions": versions()}
    atomic_write(config.folder / CONFIG, json.dumps(about, indent=2) + "\n")
    job.task.list_left_out(config.folder / LEFT_OUT)


def describe_base(job: Job) -> str:
    config, ranks = job.config, f", {job.comm.size} ranks" if job.comm.size > 1 else ""
    return f"base {config.hf or config.folder_of_base}: {job.source.model.num_parameters():,} parameters{ranks}"


def run_method(job: Job, method: Method) -> None:
    """Trains by one method, or goes on where its newest checkpoint stands, and judges it."""
    config, folder = job.config, job.folder(method)
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)  # the method's own peak, not that of one before it
    model = copy.deepcopy(job.source.model)
    adapter = prepare(model, method, config)
    tuner = Finetuner(config, method, model.to(job.device), job.task, job.comm, folder)
    notes = [f"{method}: {describe(adapter)}{sum(p.numel() for p in tuner.parameters.values()):,} trained parameters"]
    if checkpoint_folders(folder):
        notes += [*tuner.load(), f"goes on after step {tuner.step}"]
    else:
        judge_start(job, method, tuner)
        tuner.save()  # a kill at any later moment finds a checkpoint
    log = RunLog(folder, config, total_steps=config.steps, start_step=tuner.step, enabled=job.writes)
    with log, interruptible() as interrupted:
        for note in notes:
            log.message(note)
        if tuner.step == 0:
            log.metrics(0, **tuner.evaluate())
        run_steps(tuner, log, interrupted)
    tuner.verify_frozen()
    judged = judge(model, job.task, job.source.tokenizer, job.comm, tuner.autocast)
    if job.writes:
        write_judged(folder / ANSWERS, judged)
        save_model(job, method, tuner)
        summary = summarise(job, method, adapter, tuner)
        atomic_write(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")  # the last file: the method is done


def describe(adapter: LoraConfig | None) -> str:
    if adapter is None:
        return ""
    return f"rank {adapter.rank}{f' in {adapter.blocks} blocks' if adapter.blocks > 1 else ''}, "


def judge_start(job: Job, method: Method, tuner: Finetuner) -> None:
    """The answers of the model as it is before training, once for all methods that start from the same weights."""
    seen = torch.tensor([float(job.start(method).exists())], device=job.device)
    job.comm.all_reduce(seen, "max", tag="base judged")  # one answer for all ranks: the next call needs them all
    if not seen.item():
        judged = judge(tuner.model, job.task, job.source.tokenizer, job.comm, tuner.autocast)
        if job.writes:
            write_judged(job.start(method), judged)


def run_steps(tuner: Finetuner, log: RunLog, interrupted: Callable[[], bool]) -> None:
    """The steps that are left, with logs, looks at the held-out loss, checkpoints."""
    config = tuner.config
    while tuner.step < config.steps:
        began = time.perf_counter()
        metrics, stop = tuner.update(stop=interrupted())
        seconds = time.perf_counter() - began
        tuner.seconds += seconds
        step, last = tuner.step, tuner.step == config.steps
        if last or step % config.eval_every == 0:
            metrics |= tuner.evaluate()
        log.metrics(step, **metrics)
        log.timing(step, step_ms=1e3 * seconds, memory_bytes=memory(tuner.device))
        log.progress(step, loss=metrics["loss"])
        if last or stop or step % config.checkpoint_every == 0:
            tuner.save()
        if stop:  # after the last step too: there may be other methods
            log.message(f"{tuner.folder} holds step {step}")
            raise KeyboardInterrupt


def save_model(job: Job, method: Method, tuner: Finetuner) -> None:
    """What minigpt.sample and PEFT read. The adapter; of full fine-tuning a folder for --hf where the base is one, as
    its documents open as those of the base do; else the last checkpoint is the model and lacks the tokenizer only."""
    if method != "full":
        save_anywhere(tuner.model, tuner.folder / "adapter")
    elif job.config.hf is not None:
        save_pretrained(tuner.model, tuner.folder / "model", tokenizer=job.source.tokenizer)
    else:
        job.source.tokenizer.save(tuner.folder / TOKENIZER)


def summarise(job: Job, method: Method, adapter: LoraConfig | None, tuner: Finetuner) -> dict[str, Any]:
    return {
        "method": method,
        "start": job.start(method).name,
        "rank": None if adapter is None else adapter.rank,
        "blocks": None if adapter is None else adapter.blocks,
        "parameters": job.source.model.num_parameters(),
        "trained": sum(p.numel() for p in tuner.parameters.values()),
        "trained_bytes": num_bytes(trained(tuner.model)),
        "frozen_bytes": num_bytes(frozen(tuner.model)),
        "optimizer_bytes": tuner.optimizer_bytes(),
        "frozen_sha256": tuner.frozen,
        "steps": tuner.step,
        "seconds": tuner.seconds,
        "machine": tuner.machine(),
    }


def configured(argv: list[str] | None = None) -> FinetuneConfig:
    """The config of a command line. With --resume it is the stored one; flags beside it are kept, and then compared."""
    config, explicit = cli.parse_explicit(
        FinetuneConfig, argv, presets=PRESETS, default_preset="laptop", prog=cli.program(),
        description="fine-tune a GPT, and compare the ways to do it",
    )  # fmt: skip
    if not config.resume:
        return config
    path = config.folder / CONFIG
    stored = read_json(path, "the folder of a run that lora.finetune began").get("config")
    if not isinstance(stored, dict) or set(stored) != {field.name for field in fields(FinetuneConfig)}:
        raise ValueError(f"{path}: expected the config of a run that this lora.finetune began")
    if "preset" not in explicit:
        given = {name: getattr(config, name) for name in explicit}
        config = from_plain(stored, **given | {"folder": config.folder, "resume": True})
    if differences := differing(deciding(stored), deciding(plain(config))):
        raise ValueError(f"{path} is of a run with another config: {differences}")
    return config


def main(config: FinetuneConfig, watchdog: Watchdog) -> None:
    watchdog.folder = config.folder / "hang"
    world = init_from_env(None if config.device == "auto" else config.device)
    text = finetune(config, world, [watchdog])
    finish()
    if world.rank == 0:
        print(text)


if __name__ == "__main__":
    run_ranks(main, configured)
