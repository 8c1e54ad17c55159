"""What the scripts here share: one way to write a result down, and PyTorch's faster path on AMD processors."""

import datetime
import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from icl_lib.runs.devices import describe


def write_line(name: str, **figures) -> None:
    """Print the figures as one JSON line with date, device and versions, and append it to
    `benchmarks/results/<name>.jsonl`.
    """
    line = {"what": name, **figures, "date": datetime.date.today().isoformat(), "cores": os.cpu_count(), **describe()}
    line |= {package: version(package) for package in ("equinox", "safetensors")}
    text = json.dumps(line)
    print(text, flush=True)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    with open(folder / f"{name}.jsonl", "a") as file:
        file.write(text + "\n")


def avx512(folder: str) -> dict:
    """Environment in which MKL takes this for an Intel processor; none without a C compiler."""
    if shutil.which("gcc") is None:
        return {}
    library = str(Path(folder) / "intel.so")
    code = "int mkl_serv_intel_cpu_true(void) { return 1; }"
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-o", library, "-"], input=code, text=True, check=True)
    return {"LD_PRELOAD": library}
