"""Several processes, one set of files: which of them writes, how it gets whole arrays, and where all wait."""

from typing import Any

import jax
import numpy as np


def is_writer() -> bool:
    """Whether this process writes files: process 0, or the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def to_host(x: Any) -> np.ndarray:
    """An array as NumPy on this process, whole even where parts lie with others; every process has to call it then."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def wait_for_all(what: str) -> None:
    """Return when every process has come here; `what` names the place. At once if there is one process."""
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)
