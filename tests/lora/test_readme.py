"""The chapter's Python examples do what they say."""

import doctest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_examples_of_the_readme():
    done = doctest.testfile(str(ROOT / "lora" / "README.md"), module_relative=False)
    assert done.attempted >= 13 and done.failed == 0
