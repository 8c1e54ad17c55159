"""Where things are: the repository root, and paths that start there."""

from pathlib import Path


def root() -> Path:
    """The repository root: the folder with `notebooks/` above this package; the current folder when installed elsewhere.

    Jupyter and nbval run a notebook in `notebooks/`, papermill where it is called, so no path may depend on the current folder.
    """
    above = Path(__file__).resolve().parents[2]
    return above if (above / "notebooks").is_dir() else Path.cwd()


def resolve(path: str | Path | list[str]) -> str | list[str]:
    """The absolute form of a path that exists under the root (or is absolute); otherwise the text unchanged, as for a hub id.

    Of a pattern, "data/layer{layer}/16k", the folder before the first part with a brace or star decides. A list is resolved one by one.
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
