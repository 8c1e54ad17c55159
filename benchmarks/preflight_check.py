"""Preflight against this machine: memory that the arithmetic and the compiler expect, beside what a process really takes.

    python benchmarks/preflight_check.py [--small]

For each model and computation a fresh process compiles, makes the weights, runs, and reads its resident-set high-water mark from
/proc (Linux). One JSON line each; `arithmetic` and `compiler` are ratios to the measured bytes, which should lie within 25 % of 1.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

# (known model, layers, rows, tokens); large enough for the arrays to dwarf the allocator, small enough for a few seconds
CASES = [
    ("EleutherAI/pythia-70m-deduped", 6, 16, 256),
    ("Qwen/Qwen2.5-0.5B", 4, 4, 256),
    ("google/gemma-2-2b", 2, 4, 128),
    ("google/gemma-2b", 2, 4, 128),
]
SMALL = [("Qwen/Qwen2.5-0.5B", 2, 2, 256)]


def resident(key: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (the highest so far) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def measure(name: str, layers: int, rows: int, seq: int, what: str) -> dict:
    """One computation in this process: bytes by arithmetic, by the compiler, and measured."""
    import jax
    import jax.numpy as jnp

    from icl_lib.models.families import known_config
    from icl_lib.models.tensors import abstract
    from icl_lib.planning import workload
    from icl_lib.planning.preflight import _shallow

    config = _shallow(known_config(name), layers)
    costs = workload._Costs({"saes": [], "sae_layers": [], "tasks": "paper"}, config, 1, 4)
    step = {
        "forward": lambda: costs.answers("00", what, rows, seq, 1),
        "gradient": lambda: costs.gradient("05", what, rows, seq, 1, layers),
        "residuals": lambda: costs.trunk("02", what, rows, seq, 1),
        "cleaning": lambda: costs.suffix("03", what, rows, 1, layers, lanes=4),
    }[what]()
    shapes = abstract(config)
    program = jax.jit(step.function).lower(shapes, jax.ShapeDtypeStruct((rows, step.seq), "int32")).compile()
    memory = program.memory_analysis()
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    jax.block_until_ready(jnp.ones(1))
    before = resident("VmRSS")
    model = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), shapes)
    jax.block_until_ready(model)
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark of compiling
    jax.block_until_ready(program(model, jnp.zeros((rows, step.seq), jnp.int32)))
    measured = resident("VmHWM") - before
    compiler = weights + memory.output_size_in_bytes + memory.temp_size_in_bytes
    ratios = {"arithmetic": round((weights + step.temp) / measured, 3), "compiler": round(compiler / measured, 3)}
    flops = round(step.flops / program.cost_analysis()["flops"], 3)
    return {
        "model": name,
        "layers": layers,
        "rows": rows,
        "seq": step.seq,
        "computes": what,
        "measured_mb": measured // 10**6,
        **ratios,
        "flops": flops,
    }


def main() -> None:
    """Measure every case, each in a process of its own; exit status 1 if a ratio is off by more than 25 %."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="one model only, as in the tests")
    parser.add_argument("--case", help="used by the script itself")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*json.loads(options.case))))
        return
    from common import write_line

    good = True
    for case in SMALL if options.small else CASES:
        for what in ("forward", "gradient") if options.small else ("forward", "gradient", "residuals", "cleaning"):
            command = [sys.executable, __file__, "--case", json.dumps([*case, what])]
            line = json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
            )
            if options.small:
                print(json.dumps(line), flush=True)
            else:
                write_line("preflight_check", **line)
            good &= all(0.75 <= line[key] <= 1.25 for key in ("arithmetic", "compiler", "flops"))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
