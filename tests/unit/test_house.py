"""Rules of the house that a program can check: sizes, layers, formats, docstrings, paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT

MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60
PACKAGES = ("forgetscale", "data_prep")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTION)]


def code_lines(node: ast.AST) -> int:
    """Lines of a function without its docstring."""
    length = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(getattr(first, "value", None), ast.Constant):
        length -= first.end_lineno - first.lineno + 1
    return length


def test_there_is_something_to_check():
    assert len(SOURCES) > 40


def test_file_length():
    long = {relative(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 500}
    assert not long, f"files above {MAX_FILE_LINES} lines"


def test_function_length():
    long = {
        f"{relative(path)}:{node.name}": code_lines(node)
        for path in SOURCES
        for node in functions(path)
        if code_lines(node) > MAX_FUNCTION_LINES
    }
    assert not long, f"functions above {MAX_FUNCTION_LINES} lines"


def test_no_swallowed_errors_and_no_open_ends():
    found = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler):
                name = ast.unparse(node.type) if node.type else ""
                if name in ("", "Exception"):
                    found.append(f"{relative(path)}:{node.lineno} except {name}")
        found += [f"{relative(path)}: {word}" for word in ("TODO", "FIXME", "XXX") if word in text]
    assert not found


def test_no_shelves_for_everything():
    names = {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert not [relative(path) for path in SOURCES if path.name in names]


def test_only_one_package_imports_deepspeed():
    users = {
        relative(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (
            isinstance(node, ast.Import) and any(a.name.startswith("deepspeed") for a in node.names)
        )
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed"))
    }
    assert all(user.startswith("forgetscale/zero3/") for user in users), users


def test_layers():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff(command: list[str]):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "forgetscale", "data_prep", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def tracked_files() -> list[Path]:
    """Files of the repository, or of the folder where there is no git."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    return [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]


def test_no_paths_of_one_machine():
    # Built from parts, so that this file does not hold what it looks for.
    forbidden = re.compile("|".join("/" + name + "/" for name in ("work", "root", "home/[a-z]+")))
    found = []
    for path in tracked_files():
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".yml", ".json", ".sh", ".txt", ".html"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if forbidden.search(line):
                    found.append(f"{relative(path)}:{number}: {line.strip()[:80]}")
    assert not found


def test_no_large_files():
    large = {relative(p): p.stat().st_size for p in tracked_files() if p.stat().st_size > 1_000_000}
    assert not large


def test_top_level():
    allowed = {"pyproject.toml", "README.md", "launch", "ds_configs", "data_prep", "tests"}
    names = {relative(path).split("/")[0] for path in tracked_files()}
    assert {name for name in names if not name.startswith(".")} <= allowed | {"forgetscale"}


def test_public_functions_of_the_pure_packages_say_what_they_take():
    missing = []
    for package in ("ops", "masks", "config", "models", "zero3"):
        for path in sorted((ROOT / "forgetscale" / package).glob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, FUNCTION) and not node.name.startswith("_"):
                    text = ast.get_docstring(node) or ""
                    if len(node.args.args) + len(node.args.kwonlyargs) > 2 and "Args:" not in text:
                        missing.append(f"{relative(path)}:{node.name}")
    assert not missing, "docstrings without Args"


def test_every_folder_of_tests_is_in_the_parts_that_run():
    script = (ROOT / "launch" / "test.sh").read_text(encoding="utf-8")
    folders = {path.parent.relative_to(ROOT).parts[1] for path in ROOT.glob("tests/**/test_*.py")}
    assert folders >= {"unit", "contract", "distributed"}
    assert all(f"tests/{name}" in script for name in folders), sorted(folders)
    parts = re.findall(r"tests/distributed/test_\[([a-z])-([a-z])\]", script)
    for path in ROOT.glob("tests/distributed/test_*.py"):
        assert sum(first <= path.name[5] <= last for first, last in parts) == 1, path.name
