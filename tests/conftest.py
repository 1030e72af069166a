"""A small real text for the tests: two modules of the standard library in one file."""

import argparse
import textwrap
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.py"
    path.write_bytes(b"".join(Path(module.__file__).read_bytes() for module in (argparse, textwrap)))
    return path
