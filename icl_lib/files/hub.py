"""From a name to a folder: what lies on the disk is used as it is, anything else is asked of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from icl_lib.files.names import located
from icl_lib.files.paths import root


def fetch_folder(name: str | Path, revision: str | None, patterns: Sequence[str], what: str) -> Path:
    """The folder `name`, or a snapshot of the hub repository of that name with the files that match `patterns`.

    `what` says in the errors what the folder holds. Raises `FileNotFoundError` if there is no such folder and the hub
    has no such repository or revision, does not let us in, or cannot be reached.
    """
    folder = located(name, "model")
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(name).startswith((".", "~")):
        raise FileNotFoundError(
            f"no folder {str(name)!r} here, where {root() / folder.expanduser()} would be (paths count from the "
            f"repository root): correct it, or pass a folder with {what}"
        )
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(patterns)))
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        raise FileNotFoundError(_reason(str(name), revision, what, error, errors)) from error


def _reason(name: str, revision: str | None, what: str, error: Exception, errors) -> str:
    """What went wrong, and what to do about it."""
    page = f"https://huggingface.co/{name}"
    token = "log in with `hf auth login` or set HF_TOKEN"
    start = f"no folder {name!r} here, and "
    if isinstance(error, errors.GatedRepoError):  # before its parent, the missing repository
        return start + f"the hub's repository of that name is gated: accept its terms at {page}, then {token}"
    if isinstance(error, errors.RepositoryNotFoundError):
        what = "the hub has no repository of that name that it shows to us"
        return start + f"{what}: check the spelling; if it is private, {token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return start + f"the hub's repository has no revision {revision!r}: see {page}/commits/main"
    if isinstance(error, errors.HFValidationError):
        return start + f"it is no hub id (owner/name) either: pass the path of a folder with {what}"
    at = f" --revision {revision}" if revision else ""
    return start + (
        f"the hub could not be reached ({type(error).__name__}): pass a folder with {what}; where there is a network, "
        f"`hf download {name}{at} --local-dir FOLDER` makes one"
    )
