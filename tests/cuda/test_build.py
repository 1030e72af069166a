"""What `make native` leaves behind: modules that import anywhere, hold their steps, and say what is missing."""

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided

from cuda import dispatch, modules
from cuda.native import ptxas

ROOT = Path(__file__).resolve().parents[2]


def present(name):
    if not any(modules.FOLDER.glob(f"{name}.*.so")):
        pytest.skip(f"cuda.{name} is not built: make native")
    return modules.load(name)  # one that is there and cannot be loaded is a failure


@pytest.mark.parametrize("name", modules.NAMES)
def test_a_module_has_its_steps(name):
    module = present(name)
    wanted = dispatch.WITHOUT_HOPPER if name == "_sm80" else dispatch.STEPS
    assert tuple(step["name"] for step in module.steps()) == wanted
    assert module.operations() == present("_simt").operations()  # steps are by name: what is not there says so
    assert module.device == ("cpu" if name.startswith("_simt") else "cuda")
    assert hasattr(module, "Error") == hasattr(module, "options") == name.startswith("_simt")
    assert hasattr(module, "take_counters") == (name == "_simt_checked")


def test_a_models_error_is_a_runtime_error():
    fast, checked = present("_simt"), present("_simt_checked")
    assert issubclass(fast.Error, RuntimeError) and issubclass(checked.Error, RuntimeError)
    assert fast.Error is not checked.Error


def test_both_models_live_in_one_process():
    for name in ("_simt", "_simt_checked", "_simt"):
        a, d = torch.eye(9), torch.zeros(9, 9)
        with present(name).options(seed=2):
            present(name).matmul(1, a, a, d)
        assert torch.equal(d, a)


@pytest.mark.parametrize("name", ["_simt", "_simt_checked"])
def test_what_the_model_refuses_is_its_error_and_the_next_call_is_right(name):
    module = present(name)
    a = np.eye(64, dtype=np.float16)
    d = np.zeros_like(a)
    with pytest.raises(module.Error, match="stride"):  # more than the 40 bits that TMA has for it
        module.matmul("wgmma_09", as_strided(a, (64, 64), (1 << 41, 2)), a, d)
    module.matmul("wgmma_09", a, a, d)
    assert np.array_equal(d, a)


def test_counters_name_the_lines_of_a_kernel():
    module = present("_simt_checked")
    a, d = torch.ones(8, 8), torch.zeros(8, 8)
    module.take_counters()
    with module.options(counters=True):
        module.matmul("naive_01", a, a, d)
    rows = module.take_counters()
    assert rows and {"file", "line", "kind", "requests", "bytes", "actual", "ideal"} == set(rows[0])
    assert {Path(row["file"]).parent.name for row in rows} == {"matmul"}
    assert sum(row["bytes"] for row in rows if row["kind"] == "global write") == 8 * 8 * 4
    assert module.take_counters() == []


@pytest.mark.parametrize("name", ["_sm90", "_sm80"])
def test_without_a_driver_a_gpu_module_imports_and_a_call_says_what_is_missing(name):
    module = present(name)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(RuntimeError, match=r"no GPU can be used here: .*Expected an NVIDIA GPU and its driver.*_simt"):
        module.matmul("naive_01", torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_module_refuses_cpu_tensors():
    with pytest.raises(ValueError, match=r"a: is not on a CUDA device: .*\.cuda\(\)"):
        present("_sm80").matmul("naive_01", torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.parametrize("name", modules.NAMES)
def test_a_module_needs_no_library_that_may_be_missing(name):
    file = Path(present(name).__file__)
    needed = subprocess.run(["ldd", file], capture_output=True, text=True, check=True).stdout
    assert "not found" not in needed
    assert not any(word in needed for word in ("libcuda", "libtsan", "libtorch")), needed


def test_symbols_of_one_module_are_hidden_from_the_others():
    library = ctypes.CDLL(present("_simt_checked").__file__)
    assert not hasattr(library, "__tsan_read4"), "other libraries of the process must not find our functions"


# ---- a module that is not there --------------------------------------------------------------------------------------


def missing(name):
    return ModuleNotFoundError(f"No module named 'cuda.{name}'", name=f"cuda.{name}")


def test_what_is_not_built_says_how(tmp_path):
    assert "run `make native` (it needs a C++ compiler)" in modules.why_not("_simt", missing("_simt"), tmp_path)
    assert "nvcc 12.3 or newer" in modules.why_not("_sm90", missing("_sm90"), tmp_path)


def test_a_module_for_another_python_says_so(tmp_path):
    (tmp_path / "_simt.cpython-30-x86_64-linux-gnu.so").touch()
    said = modules.why_not("_simt", missing("_simt"), tmp_path)
    assert (
        f"built for another Python (_simt.cpython-30-x86_64-linux-gnu.so), this is Python 3.{sys.version_info.minor}"
        in said
    )
    assert "run `make native`" in said


def test_a_module_that_cannot_be_loaded_says_why(tmp_path):
    said = modules.why_not("_simt", ImportError("undefined symbol: x"), tmp_path)
    assert "cannot be loaded: undefined symbol: x. Run `make native`" in said


def test_load_raises_runtime_error():
    with pytest.raises(RuntimeError, match="cuda._no_such is not built: run `make native`"):
        modules.load("_no_such")


# ---- the wrapper around nvcc -----------------------------------------------------------------------------------------

QUIET = """ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas info    : Function properties for f
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers"""


def test_ptxas_remarks_and_spills_are_faults():
    assert ptxas.faults(QUIET) == []
    spilled = QUIET.replace("0 bytes spill loads", "12 bytes spill loads")
    assert len(ptxas.faults(spilled)) == 2 and "Function properties for f" in ptxas.faults(spilled)[0]
    remark = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert ptxas.faults(QUIET + "\n" + remark) == [remark]


def test_the_wrapper_fails_the_build_and_keeps_the_report(tmp_path):
    def compile_(text):
        script = tmp_path / "nvcc"
        script.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{text}\nEND\ntouch {tmp_path}/k.o\n")
        script.chmod(0o755)
        command = [sys.executable, ROOT / "cuda/native/ptxas.py", script, "-c", "k.cu", "-o", tmp_path / "k.o"]
        return subprocess.run(command, capture_output=True, text=True)

    done = compile_(QUIET)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "k.o.ptxas.txt").read_text().strip() == QUIET and (tmp_path / "k.o").exists()
    done = compile_(QUIET.replace("0 bytes spill stores", "8 bytes spill stores"))
    assert done.returncode == 1 and "8 bytes spill stores" in done.stderr and not (tmp_path / "k.o").exists()
