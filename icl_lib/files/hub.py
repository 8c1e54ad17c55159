"""From a name to a folder: what lies on the disk is used as it is, anything else is asked of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from icl_lib.files.names import did_you_mean, located
from icl_lib.files.paths import root

_ENDS = (".gguf", ".safetensors")  # of files, which no repository's name has


def fetch_folder(
    name: str | Path, revision: str | None, patterns: Sequence[str], what: str, asked: str | None = None
) -> Path:
    """The folder `name`, or a snapshot of the hub repository of that name with the files that match `patterns`.

    A name that can only be a path is not asked of the hub. `what` says in the errors what the folder holds, and `asked`
    what was asked for, if `name` is only a part of it. Raises `FileNotFoundError` if there is no such folder and the
    hub has no such repository or revision, does not let us in, or cannot be reached.
    """
    folder = located(name, "model")
    if folder.is_dir():
        return folder
    asked = asked or str(name)
    if only_here(name, ends=_ENDS):
        raise FileNotFoundError(nothing_at(asked, f"a folder with {what}"))
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(patterns)))
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        raise FileNotFoundError(_reason(str(name), asked, revision, what, error, errors)) from error


def only_here(name: str | Path, parts: int = 2, ends: tuple[str, ...] = ()) -> bool:
    """Whether a name can only be a path on this machine: it begins as one ("/", ".", "~"), ends as a file (`ends`), or
    has more parts than a name on the hub (`parts`).
    """
    path = Path(name)
    begun = str(name).startswith((".", "~")) or path.is_absolute()
    return begun or str(name).endswith(ends) or len(path.parts) > parts


def nothing_at(name: str | Path, wanted: str) -> str:
    """What to say of a path at which there is not what is `wanted` ("a folder with SAEs"): where it would be, and what
    lies there instead.
    """
    path = root() / Path(name).expanduser()
    if path.is_file():
        return f"{str(name)!r} is a file: pass {wanted}, such as the one that it lies in, {path.parent}"
    near = next(parent for parent in path.parents if parent.is_dir())
    beside = [each.name for each in near.iterdir()] if near == path.parent else []
    there = did_you_mean(name) or did_you_mean(path.name, beside)
    until = "" if near == path.parent else f", of which there is only {near}"
    return (
        f"no folder {str(name)!r} here, where {path} would be (paths count from the repository root){until}: "
        f"{there}Correct it, or pass {wanted}"
    )


def _begins_here(name: str) -> bool:
    """Whether a name of several parts begins with a folder that lies under the root."""
    first, *rest = Path(name).parts
    return bool(rest) and (root() / first).is_dir()


def _reason(name: str, asked: str, revision: str | None, what: str, error: Exception, errors) -> str:
    """What went wrong, and what to do about it."""
    page = f"https://huggingface.co/{name}"
    token = "log in with `hf auth login` or set HF_TOKEN"
    near = did_you_mean(asked)
    start = f"no folder {asked!r} here{' (' + near.strip() + ')' if near else ''}, and "
    if isinstance(error, errors.GatedRepoError):  # before its parent, the missing repository
        return start + f"the hub's repository of that name is gated: accept its terms at {page}, then {token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return start + f"the hub's repository has no revision {revision!r}: see {page}/commits/main"
    if _begins_here(asked):  # a misspelt path more likely than a repository
        return nothing_at(asked, f"a folder with {what}") + f"; nor is it on the hub ({type(error).__name__})"
    if isinstance(error, errors.RepositoryNotFoundError):
        what = "the hub has no repository of that name that it shows to us"
        return start + f"{what}: check the spelling; if it is private, {token}"
    if isinstance(error, errors.HFValidationError):
        return start + f"it is no hub id (owner/name) either: pass the path of a folder with {what}"
    at = f" --revision {revision}" if revision else ""
    return start + (
        f"the hub could not be reached ({type(error).__name__}): pass a folder with {what}; where there is a network, "
        f"`hf download {name}{at} --local-dir FOLDER` makes one"
    )
