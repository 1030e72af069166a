"""The picture of which rank has what: ownership by brute force, and an SVG that can be read."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from lora.draw import EVERYONE, main, owners, svg
from lora.sharding import SHARDINGS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("ranks", [2, 4])
def test_owners_are_those_of_the_definition(ranks):
    own = torch.arange(8) * ranks // 8 + 1  # of channels
    mine, everyone = torch.arange(ranks) + 1, torch.tensor(EVERYONE)
    diagonal = torch.where(own[:, None] == mine, mine, 0)  # (8, r)
    want = {
        ("block-diagonal", "query"): (mine[:, None].expand(-1, 8), diagonal),
        ("block-diagonal", "output"): (diagonal.T, mine.expand(8, -1)),
        ("s-lora", "query"): (mine[:, None].expand(-1, 8), own[:, None].expand(-1, ranks)),
        ("s-lora", "output"): (own.expand(ranks, -1), own[:, None].expand(-1, ranks)),
        ("replicated", "query"): (everyone.expand(ranks, 8), own[:, None].expand(-1, ranks)),
        ("replicated", "output"): (own.expand(ranks, -1), everyone.expand(8, ranks)),
    }
    frozen = {"query": own[:, None].expand(-1, 8), "output": own.expand(8, -1)}
    for sharding in SHARDINGS:
        for kind, (W, A, B) in owners(ranks, sharding).items():
            assert torch.equal(W, frozen[kind])
            assert torch.equal(A, want[sharding, kind][0]), (sharding, kind)
            assert torch.equal(B, want[sharding, kind][1]), (sharding, kind)


def test_the_picture(tmp_path, capsys):
    picture = svg(4)
    assert picture == svg(4) == (ROOT / "results/lora/block_diagonal.svg").read_text(), "python -m lora.draw"
    root = ElementTree.fromstring(picture)
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert (
        sum("in a forward pass." in text or "a sum over the ranks anyway" in text for text in texts) == 2
    )  # what it leaves out
    assert texts.count("nothing") == 4 and texts.count("all-gather") == texts.count("all-reduce") == 1
    squares = [element for element in root.iter() if element.tag.endswith("rect")]
    assert len(squares) == 1 + 6 + 2 * 64 + 6 * (4 * 8 + 8 * 4)
    main(["--ranks", "2", "--out", str(tmp_path / "a" / "picture.svg")])
    assert (tmp_path / "a" / "picture.svg").read_text() == svg(2)
    with pytest.raises(ValueError, match="ranks 3: expected 2 or 4"):
        svg(3)
