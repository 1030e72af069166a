"""The chapter's Python examples do what they say, and its commands have the flags that they are given."""

import doctest
import re
import shlex
from pathlib import Path

import pytest

from speedrun.presets import from_command_line

README = Path(__file__).resolve().parents[2] / "speedrun" / "README.md"
TRAIN = re.findall(r"-m speedrun\.train( --[^\n`#]*)", README.read_text())


def test_examples_of_the_readme():
    done = doctest.testfile(str(README), module_relative=False)
    assert done.attempted >= 12 and done.failed == 0


@pytest.mark.parametrize("flags", sorted(set(TRAIN) - {flags for flags in TRAIN if "--resume" in flags}))
def test_races_of_the_readme_have_their_flags(flags):
    from_command_line(shlex.split(flags))


def test_the_readme_has_races():
    assert len(TRAIN) >= 5
