"""The floors of the house: who may import whom is written in pyproject.toml, and holds."""

import shutil
import subprocess
import sys

import pytest

from icl_lib.files.paths import root


def _lint(folder) -> subprocess.CompletedProcess:
    """import-linter on the package in `folder`, by the contracts of the project."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))",
    ]
    return subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(folder), "PATH": ""}, capture_output=True, text=True
    )


def test_imports_go_downwards_only():
    found = _lint(root())
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    "room, upwards",
    [
        ("models/config.py", "icl_lib.training.recipes"),
        ("files/paths.py", "icl_lib.models"),
        ("figures/style.py", "icl_lib.circuits.circuit"),
        ("runs/store.py", "icl_lib.tasks"),
        ("circuits/effects.py", "icl_lib.vectors.insert"),
    ],
)
def test_an_import_upwards_is_found(tmp_path, room, upwards):
    shutil.copytree(root() / "icl_lib", tmp_path / "icl_lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root() / "pyproject.toml", tmp_path)
    with open(tmp_path / "icl_lib" / room, "a") as file:
        file.write(f"\nimport {upwards}\n")
    found = _lint(tmp_path)
    assert found.returncode == 1 and upwards.rsplit(".", 1)[0] in found.stdout, found.stdout


def test_files_are_of_at_most_300_lines():
    long = {path.name for path in (root() / "icl_lib").rglob("*.py") if len(path.read_text().splitlines()) > 300}
    assert not long
