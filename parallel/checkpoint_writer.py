"""Saving a sharded checkpoint: every rank writes its share of the pieces, rank 0 makes them a checkpoint or nothing.

    RUN/sharded/step_00000200/rank_0000.safetensors     tensors by name, each a piece
                              rank_0001.safetensors
                              manifest.json             which piece of which tensor is in which file, checksums, state

All is written into a hidden folder first. The ranks agree on who writes what while all of them are in `save`; from then
on they speak through that folder only, so that a thread may do it: each rank leaves a note with its file's checksum,
and rank 0, when it has all notes, writes the manifest and gives the folder its name. A kill at any moment leaves the
old checkpoints or one more. Refused: pieces that do not cover their tensor. The folder must be one that all ranks see.
"""

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from common.cli import UserError
from common.log import atomic_write
from minigpt.checkpoint import _sha256, _signed, _to_disk
from parallel.comm import Comm
from parallel.pieces import Piece
from parallel.reshard import uncovered

FORMAT = "sharded 1"
FOLDER = "sharded"
MANIFEST = "manifest.json"
FAILED = "failed"
POLL_S = (0.002, 0.25)  # the first and the longest pause between two looks into the folder

Entries = Mapping[str, tuple[Tensor, Piece]]


class Pending:
    """A save under way in a thread, or done."""

    def __init__(self, job: "_Job", asynchronous: bool):
        self._job = job
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        if asynchronous:
            self._thread = threading.Thread(target=self._run, name=f"checkpoint of step {job.step}", daemon=True)
            self._thread.start()
        else:
            job.run()

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> int:
        """Returns the step when its checkpoint stands; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._job.step

    def _run(self) -> None:
        try:
            self._job.run()
        except Exception as error:
            self._error = error


def save(
    run: Path,
    step: int,
    entries: Entries,
    state: Mapping[str, Any],
    comm: Comm,
    keep: int,
    *,
    asynchronous: bool = False,
    timeout_s: float = 600.0,
) -> Pending:
    """Writes step's checkpoint and deletes all but the newest `keep`. All ranks of the run call it together.

    `entries` are this rank's tensors; what several ranks have alike is written once, by the one with the least to
    write. `state` holds plain values, those of rank 0 count. asynchronous: tensors are copied to the host now and
    written by a thread; wait for one save before the next, and before the program ends, which does not wait by itself.
    Raises ValueError, on all ranks alike, for entries that do not fit their pieces or do not cover a tensor. Raises
    UserError (when asynchronous, from `Pending.wait`) when another rank could not write or left no note for
    `timeout_s`; the rank that could not write raises its own error.
    """
    everyone = gather(comm, _description(entries, state, keep))
    if errors := [f"rank {rank}: {one['error']}" for rank, one in enumerate(everyone) if one["error"]]:
        raise ValueError(f"checkpoint of step {step}: {'; '.join(errors)}")
    tensors = _assign([one["entries"] for one in everyone])
    mine = shard_name(comm.rank)
    staged = {}
    for name, (tensor, piece) in entries.items():
        if any(file == mine for file, *_ in tensors[name]["pieces"]):
            value = tensor.detach().reshape(piece.box_shape if piece.flat is None else (piece.numel,))
            staged[name] = value.to("cpu", copy=True) if asynchronous else value.contiguous()
    path = run / FOLDER / f"step_{step:08d}"
    partial = path.with_name(f".{path.name}.{everyone[0]['token']}.partial")
    manifest = {"format": FORMAT, "step": step, "ranks": comm.size, "tensors": tensors, "state": dict(state)}
    return Pending(_Job(step, comm.rank, comm.size, path, partial, staged, manifest, keep, timeout_s), asynchronous)


def shard_name(rank: int) -> str:
    return f"rank_{rank:04d}.safetensors"


def gather(comm: Comm, value: Any) -> list[Any]:
    """Every rank's value, through JSON."""
    process_group = comm.group.process_group
    on_gpu = process_group is not None and "nccl" in dist.get_backend(process_group)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = torch.empty(comm.size, dtype=torch.int64, device=device)
    comm.all_gather(torch.tensor([data.numel()], device=device), lengths, tag="checkpoint")
    lengths = lengths.tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    together = torch.empty(comm.size * padded.numel(), dtype=torch.uint8, device=device)
    comm.all_gather(padded, together, tag="checkpoint")
    rows = together.view(comm.size, -1).to("cpu")
    return [json.loads(row[:length].numpy().tobytes()) for row, length in zip(rows, lengths, strict=True)]


def checkpoint_folders(run: Path) -> list[Path]:
    """Newest first. `.old` is one that is being replaced by another of the same step."""
    folders = (run / FOLDER).glob("step_*")
    return sorted(folders, key=lambda path: (path.name.removesuffix(".old"), path.suffix != ".old"), reverse=True)


def _description(entries: Entries, state: Mapping[str, Any], keep: int) -> dict[str, Any]:
    """What the others need to know of this rank: its pieces, or what is wrong with them."""
    about: dict[str, Any] = {"token": secrets.token_hex(4), "error": "", "entries": []}
    try:
        json.dumps(state)
        if keep < 1:
            raise ValueError(f"keep {keep}: expected at least 1")
        for name, (tensor, piece) in entries.items():
            _check(name, tensor, piece)
            dtype = str(tensor.dtype).removeprefix("torch.")
            about["entries"].append([name, dtype, piece.shape, piece.box, piece.flat, tensor.element_size()])
    except (ValueError, TypeError) as error:
        about["error"] = str(error)
    return about


def _check(name: str, tensor: Tensor, piece: Piece) -> None:
    if tensor.numel() != piece.numel:
        raise ValueError(f"{name}: a tensor of {tensor.numel()} elements for a piece of {piece.numel}: {piece}")
    fits = len(piece.box) == len(piece.shape) and all(
        0 <= start <= stop <= size for (start, stop), size in zip(piece.box, piece.shape, strict=True)
    )
    start, stop = piece.flat or (0, 0)
    if not (fits and 0 <= start <= stop <= prod(piece.box_shape)):
        raise ValueError(f"{name}: box {piece.box} and range {piece.flat}: expected them within shape {piece.shape}")


def _assign(entries: list[list[list]]) -> dict[str, dict[str, Any]]:
    """The manifest's `tensors`: shape, dtype and pieces [file, box, flat] of each, every piece with one writer.

    The same on all ranks. Raises ValueError naming a tensor that ranks describe differently or that has a hole.
    """
    tensors: dict[str, dict[str, Any]] = {}
    holders: dict[tuple[str, Piece], list[int]] = {}
    sizes: dict[tuple[str, Piece], int] = {}
    for rank, described in enumerate(entries):
        for name, dtype, shape, box, flat, element_size in described:
            about = tensors.setdefault(name, {"shape": shape, "dtype": dtype, "pieces": []})
            if (about["shape"], about["dtype"]) != (shape, dtype):
                raise ValueError(
                    f"{name}: rank {rank} has a piece of {dtype} {shape}, another rank of {about['dtype']} "
                    f"{about['shape']}: expected the same whole tensor"
                )
            piece = piece_from(shape, box, flat)
            if piece.numel:
                holders.setdefault((name, piece), []).append(rank)
                sizes[name, piece] = piece.numel * element_size
    load = [0] * len(entries)
    for name, piece in sorted(holders, key=lambda key: (-sizes[key], key[0], key[1].box, key[1].flat or ())):
        writer = min(holders[name, piece], key=lambda rank: (load[rank], rank))
        load[writer] += sizes[name, piece]
        tensors[name]["pieces"].append([shard_name(writer), piece.box, piece.flat])
    for name, about in tensors.items():
        pieces = [piece_from(about["shape"], box, flat) for _, box, flat in about["pieces"]]
        hole = uncovered(tuple(about["shape"]), pieces)
        if hole is not None:
            raise ValueError(f"{name}: no rank has its part {hole} of shape {about['shape']}: not saved")
    return tensors


def piece_from(shape: list[int], box: list[list[int]], flat: list[int] | None) -> Piece:
    """Of the manifest's lists."""
    return Piece(tuple(shape), tuple((start, stop) for start, stop in box), None if flat is None else tuple(flat))


@dataclass(frozen=True, slots=True)
class _Job:
    """One rank's part of a save after all have agreed: files only, no collectives."""

    step: int
    rank: int
    ranks: int
    path: Path
    partial: Path
    staged: dict[str, Tensor]
    manifest: dict[str, Any]
    keep: int
    timeout_s: float

    def run(self) -> None:
        try:
            self._write()
            if self.rank == 0:
                self._commit(self._notes())
        except Exception as error:
            with suppress(OSError):
                if self.partial.exists() and not self._failure():
                    atomic_write(self.partial / FAILED, f"rank {self.rank}: {error or type(error).__name__}")
            raise
        if self.rank != 0:
            self._await_commit()

    def _write(self) -> None:
        self.partial.mkdir(parents=True, exist_ok=True)
        file = self.partial / shard_name(self.rank)
        safetensors.torch.save_file(self.staged, file)
        _to_disk(file)
        note = {"sha256": _sha256(file), "bytes": file.stat().st_size}
        atomic_write(self._note(self.rank), json.dumps(note))

    def _note(self, rank: int) -> Path:
        return self.partial / f"{shard_name(rank)}.done"

    def _notes(self) -> dict[str, Any]:
        """Of all ranks, by file. Raises UserError naming the ranks that left none."""
        missing = set(range(self.ranks))
        for _ in self._looks(self.timeout_s):
            missing -= {rank for rank in missing if self._note(rank).exists()}
            if not missing:
                return {shard_name(rank): json.loads(self._note(rank).read_bytes()) for rank in range(self.ranks)}
        names = ", ".join(map(str, sorted(missing)))
        raise UserError(f"checkpoint of step {self.step}: no file from rank {names} within {self.timeout_s:g} s")

    def _await_commit(self) -> None:
        limit_s = 2 * self.timeout_s  # rank 0, which knows whose file is missing, is to speak first
        for _ in self._looks(limit_s):
            if not self.partial.exists():  # it has its name now
                return
        raise UserError(f"checkpoint of step {self.step}: rank 0 did not finish it within {limit_s:g} s")

    def _looks(self, limit_s: float) -> Iterator[None]:
        """Yields until the time is over, slower and slower. Raises UserError when another rank has failed."""
        pause, longest = POLL_S
        deadline = time.monotonic() + limit_s
        while True:
            yield
            if failure := self._failure():
                raise UserError(f"checkpoint of step {self.step}: {failure}")
            if time.monotonic() > deadline:
                return
            time.sleep(pause)
            pause = min(1.5 * pause, longest)

    def _failure(self) -> str:
        try:
            return (self.partial / FAILED).read_text()
        except FileNotFoundError:
            return ""

    def _commit(self, files: dict[str, Any]) -> None:
        atomic_write(self.partial / MANIFEST, _signed({**self.manifest, "files": files}))
        for rank in range(self.ranks):
            self._note(rank).unlink()
        _to_disk(self.partial)
        old = self.path.with_name(f"{self.path.name}.old")
        if self.path.exists():  # this step again: broken before, or a run that was resumed there
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.path, old)
        os.replace(self.partial, self.path)
        _to_disk(self.path.parent)
        self._prune()

    def _prune(self) -> None:
        """Deletes the older ones, and the later ones: those are broken, or the run would have gone on from there."""
        folders = checkpoint_folders(self.path.parent.parent)
        kept = folders[folders.index(self.path) :]
        kept = [folder for folder in kept if folder.suffix != ".old"][: self.keep]
        for old in {*folders, *self.path.parent.glob(".step_*.partial")} - {*kept}:
            shutil.rmtree(old)
