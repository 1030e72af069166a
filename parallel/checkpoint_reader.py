"""Reading sharded checkpoints: the newest whole one of a run, and any piece of any tensor out of it.

The ranks of any layout, or one process, put together the pieces that they want out of those that were saved. A file of
stage 2 reads the same way: one piece a tensor. Refused: a checkpoint with a missing or altered file (the newest whole
one is taken), pieces of a tensor of another shape.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from minigpt import checkpoint as single
from minigpt.checkpoint import _sha256, _signed
from parallel.checkpoint_writer import FOLDER, FORMAT, MANIFEST, checkpoint_folders, gather, piece_from
from parallel.comm import Comm, make_comm
from parallel.mesh import Group
from parallel.pieces import Box, Piece
from parallel.reshard import Run, inside, overlap, runs, view_of


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a piece of a tensor is: in which file, under which name."""

    file: str
    key: str
    piece: Piece


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    state: Mapping[str, Any]  # what `save` was given, and the step
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype, list[Stored]]]  # shape and dtype of the whole, its pieces
    _files: dict[str, Any] = field(default_factory=dict, repr=False)  # open ones

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor. Raises ValueError when there is none of this name."""
        if name not in self.tensors:
            raise ValueError(f"{self.path} holds no {name}: expected one of its {len(self.tensors)} tensors")
        return self.tensors[name][0]

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """This piece (the whole without one) on the CPU, flat where the piece is; reads what overlaps, no more.

        Raises ValueError for a tensor that is not there or of another shape, or whose file has gone since.
        """
        piece = Piece.whole(self.shape(name)) if piece is None else piece
        if piece.shape != self.shape(name):
            raise ValueError(f"{self.path}: {name} has shape {self.shape(name)} there, {piece.shape} asked")
        _, dtype, pieces = self.tensors[name]
        out = torch.empty(piece.numel, dtype=dtype)
        wanted = runs(piece)
        for stored in pieces:
            for source in runs(stored.piece):
                for target in wanted:
                    region = overlap(source.box, target.box)
                    if region is not None:
                        view_of(out, target)[inside(region, target.box)] = self._part(stored, source, region)
        return out.view(piece.box_shape) if piece.flat is None else out

    def _part(self, stored: Stored, source: Run, region: Box) -> Tensor:
        """A region of a run, out of the file: of a flat piece whole rows are read."""
        held = self._open(stored.file).get_slice(stored.key)
        index = inside(region, source.box)
        if stored.piece.flat is None:
            return held[index]
        if not index:
            return held[source.offset : source.stop].view(())
        rows, *rest = index
        row = (source.stop - source.offset) // source.shape[0]
        flat = held[source.offset + rows.start * row : source.offset + rows.stop * row]
        return flat.view(-1, *source.shape[1:])[(slice(None), *rest)]

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.path / file, "pt")
            except FileNotFoundError:
                raise ValueError(
                    f"{self.path / file} is gone: the run has written newer checkpoints meanwhile, try again"
                ) from None
        return self._files[file]


def load(run: Path, comm: Comm | None = None) -> tuple[Checkpoint, list[str]]:
    """The newest whole checkpoint of a run, and a warning for each newer one that is broken and was skipped.

    With a comm all its ranks call this, share the work of checking the files, and get the same one. Raises ValueError,
    on all of them, when there is none, with what is wrong with those that there are.
    """
    comm = comm or make_comm(Group((), (0,), 0))
    broken: list[str] = []
    for name in gather(comm, [path.name for path in checkpoint_folders(run)])[0]:
        path = run / FOLDER / name
        manifest, error = _verified(path, comm.rank, comm.size)
        verdicts = gather(comm, [error, manifest.get("sha256")])
        if errors := [error for error, _ in verdicts if error]:
            broken.append(errors[0])
        elif any(verdict != verdicts[0] for verdict in verdicts):
            broken.append(f"{path / MANIFEST}: ranks read different ones")
        else:
            return _opened(path, manifest), [f"skipped a broken checkpoint: {what}" for what in broken]
    raise ValueError("; ".join([f"{run}: no such checkpoint: expected a run folder with a whole sharded one", *broken]))


def stored_config(run: Path) -> dict[str, Any]:
    """The `train_config` in the state of the newest checkpoint with a whole manifest; its other files are not looked
    at, so that every rank may ask before the ranks know each other. Raises ValueError when there is none."""
    for path in checkpoint_folders(run):
        with suppress(ValueError):
            return _manifest(path)["state"]["train_config"]
    raise ValueError(f"{run}: no such checkpoint: expected a run folder with a whole sharded one")


def open_single(run: Path) -> tuple[Checkpoint, list[str]]:
    """The newest whole checkpoint of a run of stage 2, to start from its weights: its tensors are `model/<name>`.

    Warnings and errors as of `load`.
    """
    found, warnings = single.load_checkpoint(run)
    file = "model.safetensors"
    tensors = {}
    with safe_open(found.path / file, "pt") as held:
        for key in held.keys():  # noqa: SIM118
            value = held.get_slice(key)
            shape = tuple(value.get_shape())
            tensors[f"model/{key}"] = (shape, held.get_tensor(key).dtype, [Stored(file, key, Piece.whole(shape))])
    return Checkpoint(found.path, found.state, tensors), warnings


def _opened(path: Path, manifest: Mapping[str, Any]) -> Checkpoint:
    tensors = {}
    for name, about in manifest["tensors"].items():
        pieces = [Stored(file, name, piece_from(about["shape"], box, flat)) for file, box, flat in about["pieces"]]
        tensors[name] = (tuple(about["shape"]), getattr(torch, about["dtype"]), pieces)
    return Checkpoint(path, {**manifest["state"], "step": manifest["step"], "ranks": manifest["ranks"]}, tensors)


def _verified(path: Path, rank: int, ranks: int) -> tuple[dict[str, Any], str]:
    """The manifest, and what is wrong with it or with this rank's share of the files; empty when nothing is."""
    try:
        manifest = _manifest(path)
        for name, about in sorted(manifest["files"].items())[rank::ranks]:
            _check_file(path / name, about)
    except ValueError as error:
        return {}, str(error)
    return manifest, ""


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        raise ValueError(f"{path}: {MANIFEST} is missing or no JSON (truncated?)") from None
    if not isinstance(manifest, dict) or json.loads(_signed(manifest)).get("sha256") != manifest.get("sha256"):
        raise ValueError(f"{path}: the checksum of {MANIFEST} does not fit it")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint of format {FORMAT!r}, found {manifest['format']!r}")
    return manifest


def _check_file(file: Path, about: Mapping[str, Any]) -> None:
    if not file.is_file():
        raise ValueError(f"{file}: missing")
    if (size := file.stat().st_size) != about["bytes"]:
        raise ValueError(f"{file}: {size} bytes, expected {about['bytes']} (truncated?)")
    if _sha256(file) != about["sha256"]:
        raise ValueError(f"{file}: broken: its checksum does not fit")
