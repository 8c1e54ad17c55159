"""Devices: what a run computes on, its compilation cache and its dtype."""

from pathlib import Path
from typing import Any

import jax

from icl_lib.runs.paths import run_folder


def setup(run_dir: str | Path) -> dict[str, Any]:
    """Keep compiled programs in `<run_dir>/compiled`, so that a second run starts at once, and describe the device.

    Call it before the first computation: JAX reads the setting when it compiles.
    """
    folder = run_folder(run_dir) / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The default leaves out everything that compiles in under a second, which is most of what a small model needs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return describe()


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
