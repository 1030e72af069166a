"""The chapter's Python examples do what they say."""

import doctest
from pathlib import Path

import pytest

pytest.importorskip("cuda._simt", reason="make native builds the kernels")
ROOT = Path(__file__).resolve().parents[2]


def test_examples_of_the_readme():
    done = doctest.testfile(str(ROOT / "cuda" / "README.md"), module_relative=False)
    assert done.attempted >= 10 and done.failed == 0
