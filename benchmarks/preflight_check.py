"""Preflight against this machine: memory that the arithmetic and the compiler expect, beside what a process really
takes; and hours.

    python benchmarks/preflight_check.py [--small | --hours]

For each model and computation a fresh process compiles, makes the weights, runs, and reads its resident-set high-water
mark from /proc (Linux). One JSON line each; `arithmetic` and `compiler` are ratios to the measured bytes, which should
lie within 25 % of 1.

`--hours` runs three steps of a random Llama with the sizes of SmolLM2-135M and SAEs at four layers, and compares the
seconds with those that preflight takes for them, at this machine's own rate of matrix products; `ratio` is predicted to
measured, and should lie within 1.5 of 1, either way. `share` is the part of that rate which the step reached.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

# (known model, layers, rows, tokens); large enough for the arrays to dwarf the allocator, small enough for a few
# seconds
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

    from icl_lib.behaviours.cost import answers_cost
    from icl_lib.circuits.cost import node_effects_cost
    from icl_lib.models.cost import Part
    from icl_lib.models.families import known_config
    from icl_lib.models.tensors import abstract
    from icl_lib.planning.preflight import shallow
    from icl_lib.vectors.cost import cleaning_cost, task_vector_cost

    config, part = shallow(known_config(name), layers), Part()
    cost = {
        "forward": lambda: answers_cost(config, rows, seq, part),
        "gradient": lambda: node_effects_cost(config, rows, seq, layers, 1, [], part),
        "residuals": lambda: task_vector_cost(config, rows, seq, part),
        "cleaning": lambda: cleaning_cost(config, rows, 16, 32, layers, 1, 4, 1, part),
    }[what]()
    shapes = abstract(config)
    function, *arguments = cost.program(shapes)
    program = jax.jit(function).lower(shapes, *arguments).compile()
    memory = program.memory_analysis()
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    jax.block_until_ready(jnp.ones(1))
    before = resident("VmRSS")
    fill = lambda tree, value: jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), tree)  # noqa: E731
    model, values = fill(shapes, 0.01), fill(arguments, 0)
    jax.block_until_ready((model, values))
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark of compiling
    jax.block_until_ready(program(model, *values))
    measured = resident("VmHWM") - before
    compiler = weights + memory.output_size_in_bytes + memory.temp_size_in_bytes
    ratios = {"arithmetic": round((weights + cost.temp) / measured, 3), "compiler": round(compiler / measured, 3)}
    flops = round(cost.model_flops / program.cost_analysis()["flops"], 3)
    return {
        "model": name,
        "layers": layers,
        "rows": rows,
        "seq": cost.seq,
        "computes": what,
        "measured_mb": measured // 10**6,
        **ratios,
        "flops": flops,
    }


def hours() -> bool:
    """Three steps by the clock and by preflight, one JSON line each; whether all agree within a factor of 1.5."""
    import jax
    import numpy as np
    from common import write_line

    from icl_lib.circuits import OnLogits, node_effects
    from icl_lib.circuits.cost import node_effects_cost
    from icl_lib.models import Site, Transformer, tiny_config
    from icl_lib.models.cost import Part
    from icl_lib.planning.hardware import efficiency, matmul_rate
    from icl_lib.planning.stand_in import random_sae, small_tokenizer
    from icl_lib.saes.cost import Dictionary
    from icl_lib.tasks import load_tasks, make_prompts, pair_logprob, stack_prompts
    from icl_lib.vectors import clean, cut, inserted_nll_by_layer
    from icl_lib.vectors.cost import ANSWER_TOKENS, cleaning_cost, insertion_cost

    config = tiny_config(
        "llama",
        n_layers=30,
        d_model=576,
        n_heads=9,
        n_kv_heads=3,
        d_head=64,
        d_mlp=1536,
        d_vocab=49152,
        n_ctx=2048,
        tied=True,
    )
    layers, n_latents, n_tasks, n_l1, n_steps, part = (10, 15, 20, 25), 4096, 2, 5, 10, Part()
    model, rng = Transformer.init(config, key=jax.random.key(0)), np.random.default_rng(0)
    suite = {
        site: random_sae((site, site), rng.normal(size=(64, 576)), 576, n_latents=n_latents, gated=False, seed=0)
        for site in (Site("resid_pre", layer) for layer in layers)
    }
    tasks = list(load_tasks("embedded").values())[:n_tasks]
    tokenizer = small_tokenizer(
        "llama", [f"Follow the pattern:\n{x} -> {y}\n" for task in tasks for x, y in task.pairs]
    )
    draw = lambda n, shots: stack_prompts(  # noqa: E731
        [make_prompts(task, tokenizer, n_prompts=n, n_shots=shots, seed=0) for task in tasks]
    )
    zero, few, many = draw(16, 0), draw(12, 0), draw(4, 12)
    at_0, at_layer = cut(model, zero, 0), cut(model, few, layers[1])
    vectors = jax.random.normal(jax.random.key(1), (n_tasks, config.n_layers, config.d_model))
    sae, seq, shots = suite[Site("resid_pre", layers[1])], zero.tokens.shape[-1], many.tokens.shape[-1]
    options = {"l1": [1e-4] * n_l1, "lr": 1e-3, "max_steps": n_steps, "patience": n_steps}
    sizes, behind = [Dictionary(site, 576, 576, n_latents) for site in suite], lambda layer: config.n_layers - layer
    steps = {
        "vectors inserted at every layer": (
            lambda: inserted_nll_by_layer(model, at_0, vectors),
            insertion_cost(config, 16, ANSWER_TOKENS, seq, config.n_layers, n_tasks, config.n_layers, part), 1,
        ),
        "cleaning": (
            lambda: clean(model, sae, vectors[:, layers[1]], at_layer, **options).nll,
            cleaning_cost(config, 12, ANSWER_TOKENS, seq, behind(layers[1]), n_tasks, n_l1, n_steps, part), 1,
        ),
        "node effects": (
            lambda: node_effects(model, suite, many, layers, metric=OnLogits(pair_logprob)).metric,
            node_effects_cost(config, 4, shots, behind(layers[0]), n_tasks * 6, sizes, part), n_tasks,
        ),
    }  # fmt: skip
    good = True
    for what, (run, cost, times) in steps.items():
        jax.block_until_ready(run())  # compiles
        before, start = matmul_rate(), time.perf_counter()
        jax.block_until_ready(run())
        seconds, flops = time.perf_counter() - start, times * cost.flops
        rate = (before + matmul_rate()) / 2  # others may take the machine in between
        ratio = flops / (rate * efficiency("cpu")) / seconds
        write_line(
            "preflight_hours", computes=what, seconds=round(seconds, 2), flops=flops, gflops=round(rate / 1e9, 1),
            share=round(flops / rate / seconds, 3), ratio=round(ratio, 3),
        )  # fmt: skip
        good &= 1 / 1.5 <= ratio <= 1.5
    return good


def main() -> None:
    """Measure every case, each in a process of its own; exit status 1 if a ratio is off by more than 25 %."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="one model only, as in the tests")
    parser.add_argument("--case", help="used by the script itself")
    parser.add_argument("--hours", action="store_true", help="seconds of three steps in the place of memory")
    options = parser.parse_args()
    if options.hours:
        sys.exit(0 if hours() else 1)
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
