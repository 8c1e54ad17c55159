"""Where things are: the repository root, paths that start there, and which files of a folder are data."""

from collections.abc import Iterable
from pathlib import Path

# What other programs leave beside data without hiding it; the two files describe a data set of the hub, and hold none.
_OF_OTHERS = {"__pycache__", "__MACOSX", "dataset_info.json", "dataset_infos.json"}


def root() -> Path:
    """The repository root: the folder with `notebooks/` above this package; installed elsewhere, the current folder.

    Jupyter and nbval run a notebook in `notebooks/`, papermill where it is called: no path may depend on that folder.
    """
    above = Path(__file__).resolve().parents[2]
    return above if (above / "notebooks").is_dir() else Path.cwd()


def resolve(path: str | Path | list[str]) -> str | list[str]:
    """The absolute form of a path that exists under the root (or is absolute); else the text itself, as for a hub id.

    Of a pattern, "data/layer{layer}/16k", the folder before the first part with a brace or star decides. A list is
    resolved one by one.
    """
    if isinstance(path, list):
        return [resolve(p) for p in path]
    parts = (root() / Path(path).expanduser()).parts
    fixed = next((i for i, part in enumerate(parts) if set("{*") & set(part)), len(parts))
    # of a pattern at least one folder must be there: the root alone, where it starts with the brace, says nothing
    found = Path(*parts[:fixed]).exists() and (fixed == len(parts) or Path(*parts[:fixed]) != root())
    return str(Path(*parts)) if found else str(path)


def run_folder(run_dir: str | Path) -> Path:
    """The absolute folder of a run: `runs/tiny` counts from the repository root."""
    return root() / Path(run_dir).expanduser()


def data_files(folder: Path, suffixes: Iterable[str] | None = None) -> list[Path]:
    """The data files below a folder, at any depth, in order; with `suffixes` (".json") only those that end so.

    What other programs put there is no data: hidden files and folders (`.cache` of the hub, `.git`, a file half
    written), compiled Python, backups of editors ("x.tsv~"), the hub's descriptions of a data set. Only names below
    `folder` count, so that a folder inside a hidden one, as in the hub's cache, can be read.
    """
    wanted = None if suffixes is None else set(suffixes)
    found = (p for p in folder.rglob("*") if wanted is None or p.suffix in wanted)
    return sorted(p for p in found if p.is_file() and not any(map(_foreign, p.relative_to(folder).parts)))


def _foreign(name: str) -> bool:
    return name.startswith(".") or name.endswith("~") or name in _OF_OTHERS
