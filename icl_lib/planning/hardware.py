"""What devices can do: memory and peak speed by kind, and how `--devices` is read.

Numbers are the makers': bytes of memory and dense bfloat16 operations per second of one device as JAX counts them (on
TPU v2 to v4 and v5p a "v4-8" is 8 cores, which are 4 devices). Those of a CPU are measured on this machine; where an
accelerator is present, its memory is what it says itself.
"""

import dataclasses
import difflib
import os
import re
import time

import numpy as np

# kind: (memory in GB, 10^12 operations per second, pattern of JAX's device_kind: an L40S is no L4, v5p is "TPU v5")
KINDS = {
    "v4": (32, 275, r"^TPU v4$"),
    "v5e": (16, 197, r"^TPU v5( lite|e)$"),
    "v5p": (95, 459, r"^TPU v5p?$"),
    "v6e": (32, 918, r"^TPU v6( lite|e)$"),
    "a100": (80, 312, r"\bA100\b"),
    "h100": (80, 989, r"\bH100\b"),
    "h200": (141, 989, r"\bH200\b"),
    "l4": (24, 121, r"\bL4\b"),
    "cpu": (None, None, r"^cpu$"),
}
_TWO_CORES = ("v4", "v5p")  # named by cores, of which a device has two
# What a process can have of it: JAX takes 92 % of a GPU (as the Snakefile says; JAX's own default is less).
_USABLE, _TAKEN = 0.92, 0.75
# The part of the peak that these experiments reach, by our own benchmarks and by common experience; only the times
# depend on it. On a CPU it is a part of the matrix product's own rate, fitted to three steps of a 135M Llama on two
# cores of an Intel Xeon (.51, .58 and .62: `benchmarks/preflight_check.py --hours`).
EFFICIENCY, _ON_CPU = 0.35, 0.57


def efficiency(kind: str) -> float:
    """The part of the peak speed of such devices that a notebook reaches."""
    return _ON_CPU if kind == "cpu" else EFFICIENCY


@dataclasses.dataclass(frozen=True)
class Devices:
    """`count` devices of one kind; `memory` is what one of them can give to a run, in bytes, `flops` its peak."""

    kind: str
    count: int
    memory: int
    flops: float | int

    @property
    def dtype(self) -> str:
        """The dtype that notebooks compute in there (`devices.compute_dtype`)."""
        return "float32" if self.kind == "cpu" else "bfloat16"

    def __str__(self) -> str:
        return f"{self.count} x {self.kind}" if self.count > 1 else self.kind


def parse_devices(text: str) -> Devices:
    """`h100`, `8xv5e`, `v5e-8`, `v4-8` (8 cores, 4 devices), `cpu`. Raises `ValueError` on what is unknown."""
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*?)(?:-(\d+))?", text.strip().lower())
    if not match or match[2] not in KINDS or (match[1] and match[3]):
        known = ", ".join(KINDS)
        near = difflib.get_close_matches(match[2] if match else text, KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"devices are written like h100, 8xv5e, v4-8 or cpu, got {text!r}{hint} Kinds are {known}")
    kind = match[2]
    count = int(match[1] or match[3] or 1)
    if match[3] and kind in _TWO_CORES:
        if count % 2:
            raise ValueError(f"{text!r}: a {kind} slice is named by its cores, two a device: the number must be even")
        count //= 2
    if count < 1:
        raise ValueError(f"{text!r}: the number of devices must be 1 or more")
    memory, speed, _ = KINDS[kind]
    if kind == "cpu":
        return Devices(kind, count, host_memory() // count, matmul_rate() / count)
    return Devices(kind, count, int(_USABLE * memory * 1e9), speed * 1e12)


def host_memory() -> int:
    """Bytes of this machine's memory that a run can have."""
    return int(_USABLE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def matmul_rate(n: int = 2000) -> float:
    """Operations per second of a float32 matrix product of `n` rows and columns on all cores: the best of three."""
    a, seconds = np.ones((n, n), np.float32), []
    for _ in range(3):
        start = time.perf_counter()
        np.matmul(a, a)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def present(devices: Devices) -> bool:
    """Whether this machine has that many devices of that kind."""
    import jax

    found = jax.devices()
    return len(found) >= devices.count and bool(re.search(KINDS[devices.kind][2], found[0].device_kind, re.IGNORECASE))


def with_own_memory(devices: Devices) -> Devices:
    """The same devices, which are present, with their own memory: there are two sizes of A100, and slices have less.

    What a program can have is what JAX says, but on a GPU where nothing was set JAX takes less here than for the
    notebooks. A CPU says nothing.
    """
    import jax

    found = jax.local_devices()
    told = [(device.memory_stats() or {}).get("bytes_limit") for device in found]
    if devices.kind == "cpu" or not all(told):
        return devices
    chosen = any(os.environ.get(name) for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"))
    part = _USABLE / _TAKEN if found[0].platform == "gpu" and not chosen else 1
    return dataclasses.replace(devices, memory=int(part * min(told)))
