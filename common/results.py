"""The file of one benchmark run: `results/<stage>/<name>_<device>_<date>.json`, written here, read by `common.tables`.

It holds what is needed to repeat and to judge the run: command, config, versions, commit, device, and rows with their
raw samples. Refused: no rows, names that would not survive as a file name. Host names and absolute paths stay out.
"""

import datetime
import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.log import atomic_write, command, cpu_threads, git_state, jsonable, versions

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
# Two or more components, not in the middle of a word, a URL or a unit such as tokens/s/gpu.
ABSOLUTE_PATH = re.compile(r"(?<![\w.~/:-])(?:/[\w.+-]+){2,}/?")
# Words of a CPU's name that say nothing: (R), (TM), CPU, Processor, "8-Core", "@ 2.70GHz".
CPU_NOISE = re.compile(r"\((?:r|tm)\)|\bcpu\b|\bprocessor\b|\b\d+-core\b|@.*", re.IGNORECASE)


def save_result(
    stage: str,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    config: Mapping[str, Any] | Any,
    device: str | None = None,
    root: Path | str = Path("results"),
) -> Path:
    """Writes the rows of one benchmark run and returns the file's path; a second run of that day replaces the first.

    `device` is "cpu", "cuda" or "cuda:N"; None takes config["device"] where there is one, else "cpu". `config` is a
    mapping or a dataclass. A row value that is a `Samples` is kept as median, p10, p90 and the raw seconds.
    Raises ValueError for an empty `rows` and for a stage or name other than lower case letters, digits, `_`, `-`.
    """
    for what, text in (("stage", stage), ("name", name)):
        if not NAME.fullmatch(text):
            raise ValueError(f"{what} must be lower case letters, digits, _ and -, got {text!r}")
    if not rows:
        raise ValueError(f"no rows to save for {stage}/{name}")
    config = jsonable(config)
    device_label = device_name(device or config.get("device") or "cpu")
    git = git_state()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    about = {"stage": stage, "name": name, "device": device_label, "date": date, "command": command()}
    about |= {"config": config, "versions": versions(), "commit": git["commit"], "dirty": git["dirty"]}
    about |= {"platform": f"{platform.system()}-{platform.machine()}"}  # platform.platform() may hold a site's name
    path = Path(root) / stage / f"{name}_{device_label}_{date}.json"
    atomic_write(path, _layout(portable(about), [portable(jsonable(_plain(row))) for row in rows]))
    return path


def device_name(device: Any = "cpu") -> str:
    """`amd-epyc-2threads`, `nvidia-h100-80gb-hbm3`: lower case letters, digits and `-` only."""
    if str(device).startswith("cuda"):
        import torch

        return slug(torch.cuda.get_device_name(device))
    return f"{slug(CPU_NOISE.sub(' ', _cpu_model()))}-{cpu_threads()}threads"


def slug(text: str) -> str:
    """Lower case letters and digits, all else as single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.as_dict() if hasattr(value, "as_dict") else value for key, value in row.items()}


def portable(value: Any) -> Any:
    """JSON data in which each absolute path is relative to the current folder, or only its last part if outside it."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    return ABSOLUTE_PATH.sub(_shorten, value) if isinstance(value, str) else value


def _shorten(match: re.Match[str]) -> str:
    path = Path(match[0])
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def _layout(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """One row a line: indenting the raw samples would give a line to each number."""
    head = json.dumps(about, indent=1, allow_nan=False).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows)
    return f'{head},\n "rows": [\n  {lines}\n ]\n}}\n'
