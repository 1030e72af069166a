"""The chapters' Python examples do what they say."""

import doctest
from pathlib import Path

import pytest

pytest.importorskip("cuda._simt", reason="make native builds the kernels")
ROOT = Path(__file__).resolve().parents[2]


CHAPTERS = [("cuda", 10), ("cuda/attention", 15), ("cuda/fused", 8), ("cuda/triton", 14)]  # and how many examples


@pytest.mark.parametrize(("chapter", "examples"), CHAPTERS)
def test_examples_of_the_readme(chapter, examples):
    if chapter == "cuda/triton":
        pytest.importorskip("triton", reason="Triton is for Linux")
    done = doctest.testfile(str(ROOT / chapter / "README.md"), module_relative=False)
    assert done.attempted >= examples and done.failed == 0
