"""Which notebook needs which, read from their sources: they say what they save in the store and what they load."""

import re

from icl_lib.files.paths import root

_CALL = re.compile(r"""\bstore\.(save|load)(?:_table)?\(\s*["']([\w.-]+)["']""")


def _calls(verb: str) -> dict[str, list[str]]:
    """Notebook -> names of the artefacts that its source saves or loads, in order."""
    sources = sorted((root() / "notebooks").glob("[0-9][0-9]_*.py"))
    found = {path.stem: _CALL.findall(path.read_text(encoding="utf-8")) for path in sources}
    return {notebook: [name for called, name in calls if called == verb] for notebook, calls in found.items()}


def makers() -> dict[str, str]:
    """Artefact -> the notebook that saves it. Raises `ValueError` where two notebooks save one name."""
    found: dict[str, str] = {}
    for notebook, names in _calls("save").items():
        for name in names:
            if found.setdefault(name, notebook) != notebook:
                raise ValueError(f"{found[name]} and {notebook} both save {name!r}; give one of them another name")
    return found


def needs() -> dict[str, list[str]]:
    """Notebook -> the notebooks whose artefacts it loads. Raises `ValueError` for one that no notebook saves."""
    made_by, found = makers(), {}
    for notebook, names in _calls("load").items():
        if missing := [name for name in names if name not in made_by]:
            raise ValueError(f"{notebook} loads {', '.join(missing)}, which no notebook saves")
        found[notebook] = sorted({made_by[name] for name in names} - {notebook})
    return found
