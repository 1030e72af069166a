"""The chapter's Python examples do what they say, and its exact numbers are what the program prints."""

import doctest
from pathlib import Path

from lora import sharding_costs

ROOT = Path(__file__).resolve().parents[2]


def test_examples_of_the_readme():
    done = doctest.testfile(str(ROOT / "lora" / "README.md"), module_relative=False)
    assert done.attempted >= 20 and done.failed == 0


def test_the_costs_in_the_readme_are_those_of_the_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sharding_costs"])
    sharding_costs.main()
    assert capsys.readouterr().out.rstrip() in (ROOT / "lora" / "README.md").read_text()
