"""Names that stand for folders: what comes with the repository is asked for by name, from any folder.

The catalogue (`icl_lib.embedded.catalogue`) registers them when the package is imported; here is only where they are
kept, so that readers of models and SAEs need not know any.
"""

from collections.abc import Callable
from pathlib import Path

from icl_lib.files.paths import resolve

_FOLDERS: dict[tuple[str, str], Callable[[], Path]] = {}


def register(name: str, what: str, folder: Callable[[], Path]) -> None:
    """Let `name` stand for the folder of a "model" or of its "saes"; `folder()` makes or fetches it when it is asked
    for.
    """
    _FOLDERS[name, what] = folder


def named(name: str | Path, what: str) -> Path | None:
    """The folder that the name stands for, None for any other text."""
    found = _FOLDERS.get((str(name), what))
    return None if found is None else found()


def located(name: str | Path, what: str) -> Path:
    """Where the folder of a "model" or of its "saes" is: that of the name, or the path, which counts from the root."""
    return named(name, what) or Path(resolve(str(name)))
