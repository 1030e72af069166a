"""What the matmul benchmark measures with, without a GPU: cublasLt through a library that is written here from its
documentation, the power meter with a card that says what it is told, and the choice of tilings."""

import ctypes
import json
import sys
from time import monotonic

import pytest
import torch

from common import timing
from cuda import dispatch
from cuda.measure import cublaslt, ladder, power, tilings
from cuda.measure.ladder import Budget, Rates
from cuda.measure.products import Competitor, Operands, Shape

SMALL = Shape(64, 64, 64)


def right(a, b, d):
    torch.mm(a, b, out=d)


def tiling_row(us, size, tiling):
    return {"us": us, "dtype": "bfloat16", "m": size, "n": size, "k": size, "tiling": tiling}


# ---- the peer: cublasLt through ctypes -----------------------------------------------------------------------------


class FakeLt:
    """cublasLt as its documentation has it, column-major, for matrices in the CPU's memory; it proposes three."""

    def __init__(self):
        self.made, self.attributes, self.calls = {}, {}, []

    def __getattr__(self, name):
        if name.endswith("Create"):
            return lambda target, *arguments: self.make(target, arguments)
        if name.endswith("SetAttribute"):
            return self.set
        raise AttributeError(name)

    def make(self, target, arguments):
        handle = 4096 + len(self.made)
        self.made[handle] = [getattr(argument, "value", argument) for argument in arguments]
        target._obj.value = handle
        return 0

    def set(self, on, attribute, value, size):
        assert size.value == ctypes.sizeof(value._obj)
        self.attributes[on.value, attribute] = value._obj.value
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, handle, description, a, b, c, d, preference, wanted, found, count):
        assert self.attributes[preference.value, 1] == cublaslt.WORKSPACE_BYTES and c.value == d.value and wanted == 16
        for i, status in enumerate((0, 15, 0)):
            found[i].status, found[i].algorithm[0] = status, i
        count._obj.value = 3
        return 0

    def matrix(self, address, layout):
        kind, rows, columns, leading = self.made[layout.value]
        assert leading == rows and kind == 0
        memory = (ctypes.c_float * (rows * columns)).from_address(address.value)
        return torch.frombuffer(memory, dtype=torch.float32).view(columns, rows).mT

    def cublasLtMatmul(self, handle, description, one, a, a_layout, b, b_layout, zero, c, c_layout, d, d_layout, *rest):
        algorithm, workspace, size, stream = rest
        assert (one._obj.value, zero._obj.value, workspace.value, stream.value) == (1.0, 0.0, 77, 5)
        self.calls.append(algorithm._obj[0])
        left, right_ = self.matrix(a, a_layout), self.matrix(b, b_layout)
        left = left.mT if self.attributes[description.value, 3] else left
        assert self.attributes[description.value, 4] == 0 and self.made[description.value] == [68, 0]
        self.matrix(d, d_layout).copy_(left @ right_)
        return 0


@pytest.mark.parametrize("transposed", [False, True])
def test_cublaslt_is_told_the_right_product(transposed):
    fake = FakeLt()
    a, d = torch.randn(3, 5), torch.full((3, 7), torch.nan)
    b = torch.randn(7, 5).mT if transposed else torch.randn(5, 7)
    proposals = cublaslt.CublasLt(fake, 77, lambda: 5).products(a, b, d)
    assert len(proposals) == 2
    for product in proposals:
        product(a, b, d.fill_(torch.nan))
        torch.testing.assert_close(d, a @ b)
    assert fake.calls == [0, 2]


def test_cublaslt_refuses_gaps_and_names_a_failed_call():
    library = cublaslt.CublasLt(FakeLt(), 77, lambda: 5)
    a, d = torch.ones(3, 5), torch.ones(3, 7)
    with pytest.raises(ValueError, match=r"b is torch.float32 with strides \(2, 14\)"):
        library.products(a, torch.ones(5, 14)[:, ::2], d)
    with pytest.raises(ValueError, match=r"d is torch.bfloat16"):
        library.products(a, torch.ones(5, 7), d.bfloat16())
    library.lib.set = lambda *_: 7
    with pytest.raises(RuntimeError, match="cublasLtMatmulDescSetAttribute returned status 7"):
        library.products(a, torch.ones(5, 7), d)
    assert ctypes.sizeof(cublaslt.Proposal) == 96 and ctypes.sizeof(power.FieldValue) == 40


def test_without_the_library_torchs_way_to_it_is_the_peer(monkeypatch, capsys):
    monkeypatch.setattr(cublaslt, "of_current_device", lambda: ctypes.CDLL("libno-such-library.so"))
    best = ladder.best_of_lt(Operands(SMALL, torch.float32, 1, "cpu"), Rates())
    assert best.name == "cublasLt" and "out of reach" in capsys.readouterr().out


# ---- power ---------------------------------------------------------------------------------------------------------


def test_readings_go_to_the_name_that_is_measured(monkeypatch):
    monkeypatch.setattr(power, "INTERVAL_S", 0.0005)
    watts = [100.0]
    with power.PowerMeter(lambda: {"power_w": watts[0], "sm_mhz": 1500.0}) as meter:
        for name, power_w in (("A", 300.0), ("B", 500.0), ("A", 300.0)):
            meter.begin(name)
            watts[0] = power_w
            deadline = monotonic() + 20
            while len(meter.found[name]) < 20:
                assert monotonic() < deadline, "the meter's thread takes no readings"
            meter.name = None
    assert meter.reading("A") == {"power_w": 300.0, "sm_mhz": 1500.0, "temperature_c": None}
    assert meter.reading("B")["power_w"] == 500.0 and not meter.thread.is_alive()


def test_nothing_is_read_while_a_sample_settles_or_without_a_library(monkeypatch):
    monkeypatch.setattr(power, "INTERVAL_S", 0.0005)
    with power.PowerMeter(lambda: {"power_w": 1.0}, skip_s=60.0) as meter:
        meter.begin("A")
        meter.closed.wait(0.02)
    assert meter.reading("A")["power_w"] is None
    monkeypatch.setattr(power, "LIBRARY", "libno-such-library.so")
    assert power.reader("GPU-0") is None


# ---- tilings -------------------------------------------------------------------------------------------------------


def test_the_table_names_the_fastest_and_is_python():
    first, second = list(dispatch.Tiling()), [64, 64, 1, 1, 0, 1, 0, 0, 1]
    rows = [tiling_row(100.0, 512, second), tiling_row(100.2, 512, first)]
    rows += [tiling_row(50.0, 64, second), tiling_row(60.0, 64, first)]
    result = {"device": "a-card", "date": "2026-01-01", "rows": rows}
    space: dict = {}
    exec(tilings.table_text(result, "tilings_a-card_2026-01-01.json", [first, second]), space)
    assert space["MEASURED"] == {
        ("sm_90", "bfloat16", 64, 64, 64): tuple(second),
        ("sm_90", "bfloat16", 512, 512, 512): tuple(first),  # as good as the fastest, and first in order
    }
    assert "tilings_a-card_2026-01-01.json" in space["__doc__"]
    with pytest.raises(ValueError, match="f.json: expected a device and rows"):
        tilings.table_text({"device": "", "rows": rows}, "f.json")


def test_the_table_is_written_from_a_file(tmp_path, monkeypatch):
    rows = [tiling_row(100.0, 4096, list(dispatch.Tiling()))]
    file = tmp_path / "tilings_a-card_2026-01-01.json"
    file.write_text(json.dumps({"device": "a-card", "date": "2026-01-01", "rows": rows}))
    monkeypatch.setattr(sys, "argv", ["t", "--results", str(file), "--table", str(tmp_path / "table.py")])
    tilings.main()
    assert '("sm_90", "bfloat16", 4096, 4096, 4096)' in (tmp_path / "table.py").read_text()


def test_neighbours_of_a_tiling_differ_in_one_field():
    found = tilings.around([dispatch.Tiling()])
    assert dispatch.Tiling() not in found and len(found) == len(set(found)) >= 5
    assert all(sum(x != y for x, y in zip(one, dispatch.Tiling(), strict=True)) == 1 for one in found)


def test_a_sweep_ranks_the_tilings_that_work(monkeypatch):
    monkeypatch.setattr(timing, "SETTLE_S", 0.0)
    monkeypatch.setattr(timing, "SAMPLE_S", 1e-5)

    def with_tiling(shape, tiling):
        broken = tiling[2] == 2
        return Competitor("x".join(map(str, tiling)), torch.bfloat16, right if not broken else lambda a, b, d: None)

    monkeypatch.setattr(tilings, "products_with", with_tiling)
    failures: list[str] = []
    options = {"rounds": 1, "cache_bytes": 1, "failures": failures, "device": "cpu"}
    rows = tilings.sweep([SMALL], Budget(100.0), **options)
    assert rows and [one["us"] for one in rows] == sorted(one["us"] for one in rows) and rows[0]["of_fastest"] == 1.0
    assert failures and all(dispatch.Tiling(*one["tiling"]).cluster == 1 for one in rows)
    assert tilings.fastest(rows)[SMALL] in {tuple(one["tiling"]) for one in rows}
    assert tilings.sweep([SMALL], Budget(1e-9), **options) == []
