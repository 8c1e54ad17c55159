"""Whether files are still the same: hashes of folders, and of the library itself."""

import functools
import hashlib
import subprocess
from pathlib import Path

from icl_lib.files.paths import data_files

_SAMPLE = 2**16


def fingerprint(folder: Path) -> str:
    """A hash of the names, sizes, and first and last 64 KiB of a folder's data files; it is quick for any size."""
    digest = hashlib.sha256()
    for path in data_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:12]


@functools.cache
def code_version() -> dict[str, str]:
    """The git commit, where there is one, and a hash of the library's own files, which tells edits apart."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in data_files(package, (".py", ".tsv", ".mplstyle")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    command = ["git", "-C", str(package), "rev-parse", "--short=12", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "no git"
    return {"commit": commit, "library": digest.hexdigest()[:12]}
