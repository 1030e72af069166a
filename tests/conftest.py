"""A small real text for the tests, two modules of the standard library in one file; and what spawned ranks import."""

import argparse
import signal
import textwrap
from pathlib import Path

import pytest

from common import dist

# What a shell starts in the background ignores Ctrl-C, and so would every program that a test stops that way.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What ranks import, once in the server that forks them instead of in each.
dist.PRELOAD += ["pytest", "parallel.assembly", "parallel.checkpoint"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.py"
    path.write_bytes(b"".join(Path(module.__file__).read_bytes() for module in (argparse, textwrap)))
    return path
