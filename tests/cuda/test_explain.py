"""cuda/explain.py: what the checked model counts, held against counts by hand; and how it is laid beside the source."""

import pytest

from cuda import explain


def row(kind, line, requests, actual, ideal, count=0, file="k.cu"):
    return dict(file=file, line=line, kind=kind, requests=requests, bytes=count, actual=actual, ideal=ideal)


@pytest.mark.parametrize("word", ["03_shared", "shared_03", "shared", "03", "3"])
def test_a_step_has_many_names(word):
    assert explain.Config(step=word).name == "shared_03"


def test_refusals():
    with pytest.raises(ValueError, match="step 'share': expected 1 to 16, or one of naive_01"):
        explain.Config(step="share")
    with pytest.raises(ValueError, match="size 20: expected a multiple of 8"):
        explain.Config(size=20)


def test_listing_puts_counts_beside_their_lines(tmp_path):
    (tmp_path / "k.cu").write_text("".join(f"line {number}\n" for number in range(1, 31)))
    rows = [row("global read", 2, 4, 32, 16), row("shared write", 2, 2, 64, 2), row("barrier", 4, 128, 128, 128)]
    rows.append(row("tma", 20, 3, 6144, 6144, count=6144))
    text = "\n".join(explain.listing(rows, tmp_path))
    assert "4r 4/8 2w 32 32x!" in " ".join(text.split())
    assert "line 3" in text and "128 waits" in text and "..." in text and "6.0 KB in 3" in text
    assert "line 1\n" not in text and "line 19" not in text
    assert explain.total(rows, 16)[0] == "global memory: 4 requests, 32 sectors, 2.00 x the fewest"


@pytest.mark.parametrize(("step", "size"), [("03_shared", 64), ("01_naive", 32)])
def test_counts_are_those_of_the_source(step, size):
    pytest.importorskip("cuda._simt_checked", reason="make native builds the kernels")
    sums = {}
    for one in explain.count(explain.Config(step=step, size=size)):
        sums[one["kind"]] = sums.get(one["kind"], 0) + one["requests"]
    products = size**3 // 32  # of warps
    if step == "03_shared":  # both operands of a product from shared memory; each tile is loaded once for 32 others
        assert sums["shared read"] == 2 * products
        assert sums["global read"] == 2 * products // 32 == sums["shared write"]
        assert sums["barrier"] == 2 * size**3 // 32
    else:
        assert sums["global read"] == 2 * products and "shared read" not in sums
    assert sums["global write"] == size**2 // 32
