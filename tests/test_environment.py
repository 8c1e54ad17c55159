"""The three lists of packages agree: pyproject.toml (what is needed), constraints.txt (tested with), environment.yml
(conda).
"""

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

from icl_lib.files.paths import root


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _project() -> dict:
    return tomllib.loads((root() / "pyproject.toml").read_text())["project"]


def _pins() -> dict[str, str]:
    lines = [line.strip() for line in (root() / "constraints.txt").read_text().splitlines()]
    return {
        _key(name): version
        for name, version in (line.split("==") for line in lines if line and not line.startswith("#"))
    }


def test_constraints_hold_names_and_versions_only():
    for line in (root() / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), (
            f"not a bare pin: {line}"
        )


@pytest.mark.parametrize("group", ["", "test", "bench"])
def test_every_requirement_is_pinned_inside_its_bounds(group):
    project = _project()
    wanted = project["optional-dependencies"][group] if group else project["dependencies"]
    for requirement in map(Requirement, wanted):
        assert _key(requirement.name) in _pins(), f"{requirement.name} has no pin in constraints.txt"
        assert requirement.specifier.contains(_pins()[_key(requirement.name)]), f"the pin breaks {requirement}"


def test_environment_yml_is_pyproject_in_the_pinned_versions():
    environment = yaml.safe_load((root() / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    listed = dict(line.split("==") for line in pip if "==" in line)
    wanted = [_key(Requirement(r).name) for r in _project()["dependencies"]]
    assert {_key(k): v for k, v in listed.items()} == {k: _pins()[k] for k in wanted}
    assert "-c constraints.txt" in pip and "-e ." in pip
    assert any(str(d).startswith("python=3.11") for d in environment["dependencies"])


def test_torch_is_for_tests_only():
    assert not any(Requirement(r).name == "torch" for r in _project()["dependencies"])
    texts = {p.name: p.read_text() for p in (root() / "icl_lib").rglob("*.py")}
    assert not [name for name, text in texts.items() if re.search(r"^(import|from) torch\b", text, re.M)]
    # ae.pt is read without torch; writing one, as rehearsals and tests do, takes torch's own writer
    inside = {name for name, text in texts.items() if re.search(r"^\s+(import|from) torch\b", text, re.M)}
    assert inside == {"dictionary_learning.py"}


def test_package_data_is_declared():
    import setuptools

    config = tomllib.loads((root() / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = setuptools.find_packages(str(root()), include=config["packages"]["find"]["include"])
    kinds = set(config["package-data"]["*"])
    for path in (root() / "icl_lib").rglob("*"):
        if path.suffix in (".tsv", ".mplstyle", ".py") and "__pycache__" not in path.parts:
            package = ".".join(path.parent.relative_to(root()).parts)
            inside = package in packages or any(package.startswith(f"{p}.") and path.suffix != ".py" for p in packages)
            assert inside, f"{path} is in no package: add an __init__.py to {path.parent}"
            assert path.suffix == ".py" or f"*{path.suffix}" in kinds
