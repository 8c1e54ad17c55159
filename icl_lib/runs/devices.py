"""Devices and processes: what a run computes on, how its processes find each other, its compilation cache and its
dtype.
"""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax

from icl_lib.files.paths import run_folder


def setup(run_dir: str | Path) -> dict[str, Any]:
    """Join the other processes of the run, if there are any; keep compiled programs in `<run_dir>/compiled`; describe
    the device.

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

    JAX itself finds address, number and rank under SLURM, Open MPI 4, in indexed jobs of Kubernetes (with `jax[k8s]`)
    and on TPU pods. Under Open MPI 5 set JAX_COORDINATOR_ADDRESS (host:port of process 0), elsewhere JAX_NUM_PROCESSES
    and JAX_PROCESS_ID too; JAX_NUM_PROCESSES=1 says that there is no other. Raises `ValueError` if these do not say
    enough, `RuntimeError` (from JAX) if something was computed before.
    """
    if jax.distributed.is_initialized() or _integer("JAX_NUM_PROCESSES") == 1:
        return
    if _one_of_several():
        _initialize(**_given())
    elif _on_tpu_vm():
        _join_pod()


def _one_of_several() -> bool:
    """Whether a launcher says so. JAX is not simply asked, because it fails where it has computed, as in a second
    notebook cell.
    """
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
    launched = any((_integer(name) or 1) > 1 for name in counts)
    named = any(name in os.environ for name in ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS"))
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return launched or named or pod or _in_indexed_job()


def _in_indexed_job() -> bool:
    """Whether this is a pod of a Kubernetes job whose pods are numbered, which JAX needs; any other pod is taken to be
    alone.
    """
    return "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ


def _given() -> dict[str, Any]:
    """What JAX is told, as arguments of `jax.distributed.initialize`; None where it finds out by itself."""
    number, rank, local = _integer("JAX_NUM_PROCESSES"), _integer("JAX_PROCESS_ID"), None
    size = _integer("OMPI_COMM_WORLD_SIZE") or 1
    if size > 1 and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        if "JAX_COORDINATOR_ADDRESS" not in os.environ:
            raise ValueError(
                f"this is one of {size} processes of Open MPI 5, which does not say where the first one runs: "
                "set JAX_COORDINATOR_ADDRESS to host:port of it (mpirun -x JAX_COORDINATOR_ADDRESS=...), any free port"
            )
        number = size if number is None else number
        rank = _integer("OMPI_COMM_WORLD_RANK") if rank is None else rank
        local = _integer("OMPI_COMM_WORLD_LOCAL_RANK")
    return {"num_processes": number, "process_id": rank, "local_device_ids": _local_devices(local)}


def _local_devices(local: int | None) -> list[int] | None:
    """An empty list, which JAX reads as all that are visible, where one GPU by the number of the process on its node
    would be wrong.

    That is so for a process alone on its node, which would leave the other GPUs idle, and where the launcher shows
    each process one GPU, whose number is then 0. Elsewhere `local`, or what JAX or JAX_LOCAL_DEVICE_IDS decide.
    """
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    beside = _integer(
        "OMPI_COMM_WORLD_LOCAL_SIZE"
    )  # under SLURM's variables too, which are then of mpirun's own helpers
    tasks, nodes = _integer("SLURM_STEP_NUM_TASKS"), _integer("SLURM_STEP_NUM_NODES")
    alone = (tasks is not None and tasks == nodes) if beside is None else beside == 1
    if alone or "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ","):
        return []
    return None if local is None else [local]


def _initialize(**given) -> None:
    """`jax.distributed.initialize`, with what to do in its error."""
    try:
        jax.distributed.initialize(**given)
    except ValueError as error:
        pods = " (`pip install 'jax[k8s]'` lets JAX ask Kubernetes)" if _in_indexed_job() else ""
        raise ValueError(
            f"this process seems to be one of several, but not which of how many ({error}): set "
            "JAX_COORDINATOR_ADDRESS to host:port of the first, JAX_NUM_PROCESSES, and JAX_PROCESS_ID from 0 on, in "
            "each "
            f"of them{pods}; JAX_NUM_PROCESSES=1 if it is the only one"
        ) from error
    except RuntimeError as error:
        if _in_indexed_job():
            error.add_note("If this pod computes by itself, set JAX_NUM_PROCESSES=1.")
        raise


@functools.cache
def _join_pod() -> None:
    """On a TPU machine: join the others of its pod if JAX finds one. If not, this process is alone, also when it is
    asked again later.
    """
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise
    except OSError:  # no metadata server: requests' errors are of this kind
        pass


def _on_tpu_vm() -> bool:
    """Whether this is a TPU virtual machine; whether of a pod, JAX then asks the machine's metadata."""
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return (
        chips
        and importlib.util.find_spec("libtpu") is not None
        and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    )


def _integer(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdigit():
        raise ValueError(f"the environment variable {name} must be a number, got {text!r}")
    return None if text is None else int(text)


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
