"""The result file: its name, its content, and what must stay out of it."""

import datetime
import json
import os
import platform
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import common.results as results
from common.log import versions
from common.results import device_name, save_result, slug
from common.timing import Samples

TODAY = datetime.datetime.now(datetime.UTC).date().isoformat()


@pytest.fixture
def epyc(monkeypatch):
    monkeypatch.setattr(results, "_cpu_model", lambda: "AMD EPYC 7R13 48-Core Processor")
    monkeypatch.setattr(results, "cpu_threads", lambda: 2)


def test_name_and_content(tmp_path, epyc):
    rows = [{"case": "add", "ms": np.float32(0.5), "ours": Samples((2.0, 1.0, 3.0), 4)}, {"case": "nan", "ms": np.nan}]
    path = save_result("autograd", "ops_f32", rows, config={"rounds": 3}, root=tmp_path)
    assert path.relative_to(tmp_path).as_posix() == f"autograd/ops_f32_amd-epyc-7r13-2threads_{TODAY}.json"
    result = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert result["rows"][0]["ours"] == {"median": 2.0, "p10": 1.2, "p90": 2.8, "inner": 4, "raw": [2.0, 1.0, 3.0]}
    assert result["rows"][1] == {"case": "nan", "ms": "nan"}
    assert (result["stage"], result["name"], result["date"]) == ("autograd", "ops_f32", TODAY)
    assert (result["device"], result["config"]) == ("amd-epyc-7r13-2threads", {"rounds": 3})
    assert result["versions"] == versions()
    assert {"command", "commit", "dirty", "platform"} <= set(result)
    assert len(path.read_text().splitlines()) < 40, "raw samples do not get a line each"


def test_a_second_run_of_the_day_replaces_the_first(tmp_path):
    for value in (1, 2):
        path = save_result("s", "n", [{"x": value}], config={}, root=tmp_path)
    assert json.loads(path.read_text())["rows"] == [{"x": 2}] and len(list(path.parent.iterdir())) == 1


def test_config_may_be_a_dataclass_and_names_the_device(tmp_path, monkeypatch):
    @dataclass
    class Config:
        device: str = "cuda:0"

    monkeypatch.setattr(results, "device_name", lambda device: slug(f"fake {device}"))
    assert "_fake-cuda-0_" in save_result("s", "n", [{}], config=Config(), root=tmp_path).name
    assert "_fake-cpu_" in save_result("s", "n", [{}], config={}, root=tmp_path).name
    assert "_fake-cuda_" in save_result("s", "n", [{}], config=Config(), device="cuda", root=tmp_path).name


def test_no_host_name_and_no_path_of_the_machine(tmp_path, monkeypatch):
    """The whole file is searched, so a field added later is searched too."""
    host = "secret-host-42"
    uname = platform.uname()._replace(node=host)
    monkeypatch.setattr(platform, "uname", lambda: uname)
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    monkeypatch.chdir(tmp_path)
    here = os.getcwd()
    monkeypatch.setattr(sys, "argv", [f"{here}/bench.py", "--out", f"{here}/runs/x", "--data=/home/someone/corpus.bin"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    config = {"data": Path("/home/someone/corpus.bin"), "out": Path(here) / "runs" / "x", "url": "https://a.org/b/c"}
    rows = [{"case": "see /home/someone/notes.txt", "speed": "tokens/s/gpu", "path": "runs/x/y"}]
    text = save_result("s", "n", rows, config=config, root=Path("results")).read_text()
    for secret in (host, here, "/home", "someone", str(tmp_path)):
        assert secret not in text
    result = json.loads(text)
    assert result["command"] == "python bench.py --out runs/x --data=corpus.bin"
    assert result["config"] == {"data": "corpus.bin", "out": "runs/x", "url": "https://a.org/b/c"}
    assert result["rows"] == [{"case": "see notes.txt", "speed": "tokens/s/gpu", "path": "runs/x/y"}]


def test_command_of_a_module(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/autograd/bench.py", "--rounds", "3"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", type("Spec", (), {"name": "autograd.bench"}))
    path = save_result("s", "n", [{}], config={}, root=tmp_path)
    assert json.loads(path.read_text())["command"] == "python -m autograd.bench --rounds 3"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c-2threads"),
        ("AMD EPYC", "amd-epyc-2threads"),
        ("Apple M2 Pro", "apple-m2-pro-2threads"),
    ],
)
def test_device_name_of_a_cpu(epyc, monkeypatch, model, name):
    monkeypatch.setattr(results, "_cpu_model", lambda: model)
    assert device_name("cpu") == name


def test_device_name_of_this_machine():
    assert re.fullmatch(r"[a-z0-9-]+-\d+threads", device_name())


def test_device_name_of_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert device_name("cuda:0") == "nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize(("stage", "name"), [("a/b", "n"), ("s", "N"), ("s", "../n"), ("", "n"), ("s", "n m")])
def test_names_that_are_refused(tmp_path, stage, name):
    with pytest.raises(ValueError, match="lower case"):
        save_result(stage, name, [{"x": 1}], config={}, root=tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        save_result("s", "n", [], config={}, root=tmp_path)
