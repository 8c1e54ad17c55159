"""Names that stand for folders: what comes with the repository is asked for by name, from any folder.

The catalogue (`icl_lib.embedded.catalogue`) registers them when the package is imported; here is only where they are
kept, so that readers of models and SAEs need not know any. And what is said of a name that is not known: the nearest.
"""

import difflib
from collections.abc import Callable, Iterable
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


def did_you_mean(name: str | Path, known: Iterable[str] | None = None, cutoff: float = 0.6) -> str:
    """The question after the nearest of `known` (None: of the names registered here), with a blank behind it; empty
    where none is near: of 1 for equal texts and 0 for texts without a common letter, less than `cutoff`.
    """
    known = {each for each, _ in _FOLDERS} if known is None else known
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}? " if near else ""
