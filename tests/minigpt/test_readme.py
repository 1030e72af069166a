"""The chapter's walk-through, run as it is printed."""

import doctest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_walk_through():
    done = doctest.testfile(str(ROOT / "minigpt" / "README.md"), module_relative=False)
    assert done.attempted >= 4 and done.failed == 0
