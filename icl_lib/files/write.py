"""The one way in which a file reaches the disk: written beside its place, flushed, then renamed.

Whoever reads the file sees the old one or the new one, never half of it. Of several processes the first one writes.
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from icl_lib.files.processes import is_writer


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make the file under another name in the same folder, with the same ending, and give it its name.

    Raises `OSError` naming the file if it cannot be written; what was written of it is taken away.
    """
    if not is_writer():
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # numpy's, PyTorch's and safetensors' own
        raise OSError(
            f"could not write {path}: {error}. Is the disk full, or the folder read-only? Make room and save again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """`data` as the whole content of the file."""
    replace_file(path, lambda partial: partial.write_bytes(data))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """One object as indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
