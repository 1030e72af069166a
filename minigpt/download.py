"""Files from the web, whole or not at all: resumed after a break, tried again a bounded number of times, checked.

`download` fetches one file; `fineweb10b` and `parquet_files` know data sets of the Hugging Face hub, and
`python -m minigpt.download --shards 5` fetches FineWeb, also for a machine that has no network. A file in the making is
called `<name>.part` and survives an interruption. Refused: an answer shorter than announced under the final name, two
versions of a file glued together, a length or digest other than the expected one.
"""

import contextlib
import email.message
import fcntl
import hashlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import cli
from common.cli import UserError
from common.log import atomic_write

HUGGING_FACE = "https://huggingface.co"
FINEWEB, FINEWEB_SHARDS, GPT2 = "kjj0/fineweb10B-gpt2", 103, "openai-community/gpt2"
CHUNK = 1 << 20
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})

Progress = Callable[[int, int | None], None]  # (bytes on disk, bytes in all)


class _Again(Exception):
    """This try broke off; another may do better."""


def endpoint_from_env() -> str:
    """The hub's address for a command line: HF_ENDPOINT, else huggingface.co."""
    return os.environ.get("HF_ENDPOINT", HUGGING_FACE).rstrip("/")


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    progress: Progress | None = None,
    tries: int = 5,
    wait_s: float = 1.0,
    timeout_s: float = 30.0,
) -> Path:
    """Fetches url to path, unless the file is there already; returns path.

    A `.part` file of the same url goes on where it ended if the server gave a validator for it (ETag or Last-Modified)
    or sha256 is given; else it starts anew. After a break it waits wait_s, then twice as long, ...; `tries` failures in
    a row with less than CHUNK gained are the end. Processes that want files of the same folder wait for each other.
    Raises UserError, naming url and path, when the server refuses or keeps failing, or size or sha256 differ.
    """
    path = Path(path)
    with locked(path.parent):
        if path.exists():
            if size is not None and path.stat().st_size != size:
                raise UserError(f"{path} is {path.stat().st_size:,} bytes, expected {size:,}: delete it to fetch {url}")
            return path
        transfer = _Transfer(url, path, sha256, size, progress or (lambda *_: None), timeout_s)
        failures, reached = 0, 0
        while True:
            try:
                transfer.attempt()
                return path
            except _Again as error:
                gained = transfer.have() - reached
                failures = 1 if gained >= CHUNK else failures + 1
                reached = max(reached, transfer.have())
                if failures >= tries:
                    raise UserError(f"{url} -> {path}: {error}; gave up after {failures} tries in a row") from None
            time.sleep(wait_s * 2 ** (failures - 1))


class _Transfer:
    """One file on its way: the .part file, and beside it what is known of the version it is a part of."""

    def __init__(
        self, url: str, path: Path, sha256: str | None, size: int | None, progress: Progress, timeout_s: float
    ) -> None:
        self.url, self.path, self.sha256, self.size = url, path, sha256, size
        self.progress, self.timeout_s = progress, timeout_s
        self.part, self.about = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")

    def have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def attempt(self) -> None:
        """One request; on return the file stands under its name. Raises _Again where another try makes sense."""
        start, headers = self._resume_point()
        # All of it is here where an earlier process ended between the last byte and the name.
        if start and start == self._known().get("total") and self.size in (None, start):
            return self._finish(resumed=True)
        try:
            with _open(self.url, headers, self.timeout_s) as answer:
                total = self._receive(answer, start)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                _raise_http(error, self.url, self.path)
            self._restart()
            raise _Again(f"the server has no bytes from {start:,} on") from None
        except (OSError, http.client.HTTPException) as error:  # URLError, time-outs, resets
            raise _Again(f"{type(error).__name__}: {error}") from None
        if self.have() < total:
            raise _Again(f"the connection ended after {self.have():,} of {total:,} bytes")
        self._finish(resumed=start > 0)

    def _known(self) -> dict[str, Any]:
        """What was noted of the version that the .part file is of: url, validator, total; {} if it is another url's."""
        try:
            about = json.loads(self.about.read_text())
            return about if about["url"] == self.url else {}
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def _resume_point(self) -> tuple[int, dict[str, str]]:
        """(first byte to ask for, the headers that ask for it)."""
        known, have = self._known(), self.have()
        validator = known.get("validator")
        if not (have and known and (validator or self.sha256)):
            self._restart()
            return 0, {}
        return have, {"Range": f"bytes={have}-", **({"If-Range": validator} if validator else {})}

    def _restart(self) -> None:
        self.part.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)

    def _receive(self, answer: http.client.HTTPResponse, start: int) -> int:
        """Appends the answer's body to the .part file; returns how long the file is to be."""
        validator, known = _validator(answer.headers), self._known()
        if start and answer.status == 206:
            total = _range_total(answer.headers, start)
            # A server may know ranges and not If-Range: then another total or validator tells of another version.
            if total is None or total != known.get("total", total) or validator != known.get("validator"):
                self._restart()
                shown = f"Content-Range {answer.headers.get('Content-Range')!r}, version {validator}"
                raise _Again(f"asked for bytes {start}- of version {known.get('validator')}, got {shown}")
        else:
            self._restart()  # 200: the whole file, because it changed or the server knows no ranges
            length = answer.headers.get("Content-Length")
            total = int(length) if length is not None else self.size
        if total is not None and self.size is not None and total != self.size:
            raise UserError(f"{self.url} is {total:,} bytes, expected {self.size:,} for {self.path}")
        if total is None and not getattr(answer, "chunked", False):
            raise UserError(f"{self.url}: the server does not say how long it is, so {self.path} could be cut short")
        about = {"url": self.url, "validator": validator, **({"total": total} if total is not None else {})}
        atomic_write(self.about, json.dumps(about))
        with open(self.part, "ab") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                self.progress(file.tell(), total)
            file.flush()
            os.fsync(file.fileno())
        return self.have() if total is None else total

    def _finish(self, resumed: bool) -> None:
        """Gives the file its name if its digest is the one asked for."""
        if self.sha256 is not None:
            with open(self.part, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.sha256.lower():
                self._restart()
                if resumed:
                    raise _Again("the parts did not fit together")
                raise UserError(f"{self.url} has SHA-256 {found}, expected {self.sha256} for {self.path}")
        os.replace(self.part, self.path)
        self.about.unlink(missing_ok=True)


def _open(url: str, headers: dict[str, str], timeout_s: float) -> http.client.HTTPResponse:
    # identity: a compressed answer would have other lengths than the file
    request = urllib.request.Request(url, headers={"User-Agent": "groundup", "Accept-Encoding": "identity", **headers})
    return urllib.request.urlopen(request, timeout=timeout_s)


def _raise_http(error: urllib.error.HTTPError, url: str, path: Path | str) -> None:
    if error.code in RETRIED:
        raise _Again(f"the server answered {error.code} {error.reason}") from None
    raise UserError(f"{url} -> {path}: the server answered {error.code} {error.reason}") from None


def _range_total(headers: email.message.Message, start: int) -> int | None:
    """The total of `Content-Range: bytes start-end/total` if it begins at `start` and runs to the end, else None."""
    unit, _, rest = (headers.get("Content-Range") or "").partition(" ")
    span, _, total = rest.partition("/")
    first, _, last = span.partition("-")
    if unit != "bytes" or not (first.isdecimal() and last.isdecimal() and total.isdecimal()):
        return None
    return int(total) if int(first) == start and int(last) == int(total) - 1 else None


def _validator(headers: email.message.Message) -> str | None:
    """What If-Range accepts: a strong ETag, else the date of the last change."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder, and waits until no other process is inside this context for it: ranks start together."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which unlocks


def show_progress(label: str, every_s: float = 5.0) -> Progress:
    """A Progress that prints a line on stderr now and then, for what takes longer than that."""
    shown = time.monotonic()

    def show(done: int, total: int | None) -> None:
        nonlocal shown
        if time.monotonic() - shown >= every_s:
            shown = time.monotonic()
            print(f"{label}: {done / 1e6:,.0f} MB" + (f" of {total / 1e6:,.0f}" if total else ""), file=sys.stderr)

    return show


def read_json(url: str, *, tries: int = 3, wait_s: float = 1.0, timeout_s: float = 30.0) -> Any:
    """The JSON at url. Raises UserError when the server refuses or keeps failing, or answers anything else."""
    for attempt in range(tries):
        try:
            with _open(url, {}, timeout_s) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            reason = f"the server answered {error.code} {error.reason}"
            if error.code not in RETRIED:
                break
        except (OSError, http.client.HTTPException) as error:
            reason = f"{type(error).__name__}: {error}"
        except ValueError:
            reason = "the answer is no JSON"
            break
        if attempt < tries - 1:
            time.sleep(wait_s * 2**attempt)
    raise UserError(f"{url}: {reason}")


def fineweb10b(count: int, folder: Path, *, endpoint: str = HUGGING_FACE) -> tuple[list[Path], Path]:
    """(the first `count` training shards, the validation shard) of FineWeb-10B in GPT-2 tokens, fetched to folder.

    200 MB a shard; GPT-2's vocab.json and merges.txt come beside them, since bits per byte need each token's length.
    """
    if not 1 <= count <= FINEWEB_SHARDS:
        raise ValueError(f"fineweb10B:{count}: expected 1 to {FINEWEB_SHARDS} training shards")
    for name in ("vocab.json", "merges.txt"):
        download(f"{endpoint}/{GPT2}/resolve/main/{name}", folder / name)
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{number:06d}.bin" for number in range(1, count + 1))]
    base = f"{endpoint}/datasets/{FINEWEB}/resolve/main"
    paths = [download(f"{base}/{name}", folder / name, progress=show_progress(name)) for name in names]
    return paths[1:], paths[0]


def parquet_splits(name: str, config: str | None, *, endpoint: str = HUGGING_FACE) -> tuple[str, dict[str, list[str]]]:
    """(config, {split: addresses of its parquet files}) of the data set `owner/name`, as the hub converted it.

    Without a config it is the only one, or `default`. Raises UserError when the hub does not answer, ValueError when
    the config is not there or has to be chosen.
    """
    url = f"{endpoint}/api/datasets/{name}/parquet"
    configs = read_json(url)
    if not (isinstance(configs, dict) and configs and all(isinstance(splits, dict) for splits in configs.values())):
        raise UserError(f"{url}: expected {{config: {{split: [addresses]}}}}, got {str(configs)[:60]}")
    if config is None:
        config = "default" if len(configs) > 1 else next(iter(configs))
    if config not in configs:
        raise ValueError(f"data set {name} has no config {config!r}: expected one of {', '.join(configs)}")
    # The hub names its own address even where a mirror answers.
    hub = HUGGING_FACE + "/"
    return config, {
        split: [f"{endpoint}/{url.removeprefix(hub)}" if url.startswith(hub) else url for url in addresses]
        for split, addresses in configs[config].items()
    }


def parquet_files(addresses: list[str], folder: Path) -> list[Path]:
    """Fetches them to folder as 00000.parquet, 00001.parquet, ..."""
    paths = [folder / f"{number:05d}.parquet" for number in range(len(addresses))]
    for number, (address, path) in enumerate(zip(addresses, paths, strict=True), start=1):
        download(address, path, progress=show_progress(f"{path} ({number} of {len(paths)})"))
    return paths


@dataclass(frozen=True, slots=True)
class DownloadConfig:
    shards: int = field(
        default=1, metadata={"help": f"training shards of FineWeb-10B, 200 MB each, {FINEWEB_SHARDS} at most"}
    )
    folder: Path = field(default=Path("data/fineweb10B"), metadata={"help": "where corpus fineweb10B:N looks for them"})
    endpoint: str = field(default_factory=endpoint_from_env, metadata={"help": "address of the Hugging Face hub"})


def main() -> None:
    config = cli.parse(DownloadConfig, prog=cli.program(), description="fetch FineWeb in GPT-2 tokens")
    train, held_out = fineweb10b(config.shards, config.folder, endpoint=config.endpoint)
    print(f"{config.folder}: {len(train)} training shards and {held_out.name}: --corpus fineweb10B:{len(train)}")


if __name__ == "__main__":
    cli.run(main)
