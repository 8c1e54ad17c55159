"""Models on many devices and in many processes. Both need a JAX started for it, hence processes of their own."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.models import Transformer, save_model, tiny_config
from icl_lib.runs import devices
from icl_lib.runs.store import Store

HERE = Path(__file__).parent
LAUNCHERS = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "XLA_FLAGS")


def environment(n_devices, **more):
    """This environment on a CPU that plays `n_devices`, without what a launcher may have put there. Little is optimised: it runs once."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    flags = f"--xla_force_host_platform_device_count={n_devices} --xla_backend_optimization_level=0"
    return clean | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | more


def test_eight_devices_give_the_numbers_of_one():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "eight_devices.py")]
    run = subprocess.run(command, env=environment(8), capture_output=True, text=True, cwd=HERE.parent)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 40 and "skipped" not in run.stdout
