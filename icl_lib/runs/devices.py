"""Devices and processes: what a run computes on, its compilation cache, its dtype, and which process writes."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import jax

from icl_lib.models.sharding import is_writer, to_host
from icl_lib.runs.paths import run_folder

__all__ = ["compute_dtype", "describe", "is_writer", "join_processes", "setup", "to_host", "wait_for_all"]


def setup(run_dir: str | Path) -> dict[str, Any]:
    """Join the other processes of the run, if there are any; keep compiled programs in `<run_dir>/compiled`; describe the device.

    Call it before the first computation: JAX reads these settings when it starts and when it compiles.
    """
    join_processes()
    folder = run_folder(run_dir) / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The default leaves out everything that compiles in under a second, which is most of what a small model needs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return describe()


def join_processes() -> None:
    """Start `jax.distributed` where the environment says that this process is one of several; otherwise do nothing.

    JAX itself finds address, number and rank under SLURM, Open MPI and on TPU pods. Elsewhere set JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Raises `ValueError` if these do not say enough,
    `RuntimeError` (from JAX) if something was computed before.
    """
    if jax.distributed.is_initialized() or not _one_of_several():
        return
    number, rank = (_integer(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        jax.distributed.initialize(num_processes=number, process_id=rank)
    except ValueError as error:
        raise ValueError(
            f"this process seems to be one of several, but not which of how many ({error}): set JAX_COORDINATOR_ADDRESS to "
            "host:port of the first, JAX_NUM_PROCESSES, and JAX_PROCESS_ID from 0 on, in each of them"
        ) from error


def _one_of_several() -> bool:
    """Whether a launcher says so. JAX is not simply asked, because it fails where it has computed, as in a second notebook cell."""
    launched = any((_integer(name) or 1) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    named = any(name in os.environ for name in ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS"))
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return launched or named or pod or _on_tpu_vm()


def _on_tpu_vm() -> bool:
    """Whether this is a TPU virtual machine; whether of a pod, JAX then asks the machine's metadata."""
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return chips and importlib.util.find_spec("libtpu") is not None and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")


def _integer(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdigit():
        raise ValueError(f"the environment variable {name} must be a number, got {text!r}")
    return None if text is None else int(text)


def wait_for_all(what: str) -> None:
    """Return when every process has come here; `what` names the place. At once if there is one process."""
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def describe() -> dict[str, Any]:
    """Platform, kind and number of the devices, and the versions that decide their numbers."""
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "jax": jax.__version__,
    }


def compute_dtype() -> str:
    """`bfloat16` on accelerators; `float32` on CPU, where bfloat16 is slow and saves nothing."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
