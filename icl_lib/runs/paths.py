"""Where things are: the repository root, and paths that start there."""

from pathlib import Path


def root() -> Path:
    """The repository root: the folder with `notebooks/` above this package; the current folder when installed elsewhere.

    Jupyter and nbval run a notebook in `notebooks/`, papermill where it is called, so no path may depend on the current folder.
    """
    above = Path(__file__).resolve().parents[2]
    return above if (above / "notebooks").is_dir() else Path.cwd()


def resolve(path: str | Path) -> str:
    """The absolute form of a path that exists under the root (or is absolute); otherwise the text unchanged, as for a hub id."""
    candidate = root() / Path(path).expanduser()
    return str(candidate) if candidate.exists() else str(path)


def run_folder(run_dir: str | Path) -> Path:
    """The absolute folder of a run: `runs/tiny` counts from the repository root."""
    return root() / Path(run_dir).expanduser()
