"""The house rules of CONTRIBUTING.md, checked on the syntax tree and on the READMEs.

Stage N imports only stages below it and `common`; `autograd` is ours; the folder `cuda` leaves NVIDIA's namespace
package alone; what a README tells a reader to type exists.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common import tables

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["common", "autograd", "minigpt", "cuda", "parallel", "lora", "speedrun"]  # each may import those before it
FOREIGN = {"bindings", "core", "pathfinder", "tile", "compute"}  # names that NVIDIA's packages have inside `cuda`
BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def tracked(*patterns):
    """Files that git tracks or would track; everything below the root where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return sorted({ROOT / line for line in done.stdout.splitlines() if (ROOT / line).exists()})
    return sorted(path for pattern in patterns for path in ROOT.rglob(pattern) if ".venv" not in path.parts)


def imported_stages(source: str) -> set[str]:
    """The stages that a source file imports, at any depth: in functions, under `if`, through importlib too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found |= {name.split(".")[0] for name in names}
    return found & set(STAGES)


def test_imports_point_downwards():
    wrong = []
    for path in tracked("*.py"):
        stage = path.relative_to(ROOT).parts[0]
        if stage in STAGES and path.name != "bench_hips.py":  # it runs isolated, where `autograd` is the other package
            above = imported_stages(path.read_text()) - set(STAGES[: STAGES.index(stage) + 1])
            wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(above)]
    assert not wrong, "\n".join(wrong)


def test_the_import_check_sees_every_kind_of_import():
    source = """
def f():
    import speedrun.train
    if True:
        from lora import x
    importlib.import_module("parallel.mesh")
from . import cuda
"""
    assert imported_stages(source) == {"speedrun", "lora", "parallel"}


def test_stage_1_does_not_import_torch():
    for path in tracked("autograd/*.py"):
        if path.name != "bench.py":  # the benchmark is where torch is the peer
            assert "torch" not in {
                name.split(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
            }, path


def test_autograd_is_ours():
    import autograd

    assert Path(autograd.__file__).is_relative_to(ROOT)


def test_cuda_stays_a_namespace_portion():
    assert not (ROOT / "cuda" / "__init__.py").exists()
    taken = {path.stem for path in (ROOT / "cuda").glob("*")} & FOREIGN
    assert not taken, f"cuda/ must not hold {taken}: these are NVIDIA's names"


def test_nvidias_cuda_packages_import_beside_ours():
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        pytest.skip("cuda-bindings is not installed")
    script = "import cuda, cuda.bindings, torch; print(len(list(cuda.__path__)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 1 + (ROOT / "cuda").is_dir()  # their folder and ours are both on the path


def test_every_test_folder_is_a_package():
    for folder in {path.parent for path in tracked("tests/*.py", "tests/**/*.py")}:
        assert (folder / "__init__.py").exists(), folder


def test_readme_tables_are_those_of_the_results():
    assert tables.rewrite(ROOT, check=True) == [], "python -m common.tables rewrites them"


def readme_commands():
    for path in tracked("*.md"):
        for block in BLOCK.findall(path.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ").strip()
                if line and not line.startswith("#"):
                    yield pytest.param(line, id=f"{path.relative_to(ROOT)}: {line}"[:90])


@pytest.mark.parametrize("line", list(readme_commands()))
def test_readme_commands_name_what_exists(line):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"\bmake ([a-z]+)", line):
        assert target in targets, f"no target {target} in the Makefile"
    for module in re.findall(r"(?<!pip )-m ([a-z_]+(?:\.[a-z_]+)*)", line):
        if module.split(".")[0] in STAGES:
            assert importlib.util.find_spec(module), f"no module {module}"
    for path in re.findall(r"\b(?:tests|results|shared)/[\w./-]+", line):
        assert (ROOT / path.rstrip("/.")).exists(), f"no {path}"
