"""The house rules that a machine can count."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "seq2expr").rglob("*.py")) + sorted((ROOT / "data_prep").glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_module_holds_one_idea(path):
    assert len(path.read_text().splitlines()) <= 600
    assert len(path.relative_to(ROOT).parts) <= 3


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_function_fits_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            assert lines <= 65, f"{node.name} has {lines} lines of code"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_systems_know_nothing_above_the_model():
    for path in (ROOT / "seq2expr" / "systems").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seq2expr"):
                assert node.module.startswith(("seq2expr.model", "seq2expr.errors")), path


def test_no_layer_imports_a_higher_one():
    order = [
        "bench",
        "verbs",
        "interpret",
        "spots",
        "learn",
        "systems",
        "model",
        "text",
        "image",
        "dna",
    ]
    for rank, folder in enumerate(order):
        higher = tuple(
            f"seq2expr.{name}" for name in [*order[:rank], "cli", "registry", "showcase"]
        )
        place = ROOT / "seq2expr" / folder
        for path in [*place.glob("*.py"), *place.parent.glob(f"{folder}.py")]:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert not (node.module or "").startswith(higher), f"{path}: {node.module}"
