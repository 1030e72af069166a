"""The chapter's walk-through, run as it is printed."""

import doctest

from tests.autograd.commands import ROOT


def test_walk_through(monkeypatch, tmp_path):
    (tmp_path / "results" / "autograd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # the picture it draws must not change the one that is committed
    readme = str(ROOT / "autograd" / "README.md")
    done = doctest.testfile(readme, module_relative=False, optionflags=doctest.ELLIPSIS)
    assert done.attempted > 20 and done.failed == 0
    drawn, committed = (folder / "results" / "autograd" / "graph.svg" for folder in (tmp_path, ROOT))
    assert drawn.read_text() == committed.read_text()
