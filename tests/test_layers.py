"""Imports point left: a stage may use the folders the list in docs/DESIGN.md allows it, deferred imports included."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moestro"
MAY_IMPORT = {
    "core": "",
    "cluster": "core",
    "jobs": "core cluster",
    "nn": "core",
    "dist": "core cluster nn",
    "plan": "core cluster",
    "place": "core cluster plan",
    "train": "core cluster nn dist plan place",
    "adapt": "core nn dist train",
    "federate": "core nn dist train adapt",
    "compress": "core nn train",
    "represent": "core nn dist compress",
    "package": "core",
    "ship": "core package",
    "run": "core nn dist compress represent package ship",
}


def folders_imported_by(source: str) -> set[str]:
    dotted: list[str] = []
    for node in ast.walk(ast.parse(source)):  # walk: imports inside functions count too
        match node:
            case ast.Import(names=names):
                dotted += [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names):
                dotted += [f"{module}.{alias.name}" for alias in names]
    return {name.split(".")[1] for name in dotted if name.startswith("moestro.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*/*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_left(path: Path) -> None:
    folder = path.relative_to(PACKAGE).parts[0]
    if folder == "cli":
        return  # the top may use everything
    allowed = {folder, "__version__", *MAY_IMPORT[folder].split()}
    assert folders_imported_by(path.read_text()) <= allowed, f"{folder}/ may import only {sorted(allowed)}"


def test_a_deferred_import_to_the_right_is_seen() -> None:
    assert folders_imported_by("def f():\n    from moestro.train import loop") == {"train"}
