"""Whether a card is being run in this checkout: the kernel keeps the lock, so that it goes when its process ends,
however it ends.
"""

import fcntl
from typing import IO

from icl_lib.files.paths import root


def _open() -> IO[bytes]:
    folder = root() / ".snakemake"
    folder.mkdir(exist_ok=True)
    return open(folder / "running", "ab")


def say_that_one_runs() -> IO[bytes]:
    """Hold the lock for as long as the file that this gives is open. Several processes may: rehearsals run beside each
    other.
    """
    file = _open()
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def someone_runs() -> bool:
    """Whether any process holds it."""
    with _open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
