"""What the scripts here share: one way to write a result down."""

import datetime
import json
import os
from importlib.metadata import version
from pathlib import Path

from icl_lib.runs.devices import describe


def write_line(name: str, **figures) -> None:
    """Print the figures as one JSON line with date, device and versions, and append it to `benchmarks/results/<name>.jsonl`."""
    line = {"what": name, **figures, "date": datetime.date.today().isoformat(), "cores": os.cpu_count(), **describe()}
    line |= {package: version(package) for package in ("equinox", "safetensors")}
    text = json.dumps(line)
    print(text, flush=True)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    with open(folder / f"{name}.jsonl", "a") as file:
        file.write(text + "\n")
