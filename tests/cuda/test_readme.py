"""The chapters' Python examples do what they say."""

import doctest
from pathlib import Path

import pytest

pytest.importorskip("cuda._simt", reason="make native builds the kernels")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("chapter", "examples"), [("cuda", 10), ("cuda/attention", 15), ("cuda/fused", 8)])
def test_examples_of_the_readme(chapter, examples):
    done = doctest.testfile(str(ROOT / chapter / "README.md"), module_relative=False)
    assert done.attempted >= examples and done.failed == 0
