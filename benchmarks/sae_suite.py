"""What a suite of 18 equal SAEs costs per step: beside 18 single ones, with one language-model pass, and its peak
memory.

    python benchmarks/sae_suite.py
    python benchmarks/sae_suite.py --d-model 512 --d-sae 4096 --batch 1024 --objective topk --sparsity 32

The suite has the residual, attention-output and MLP-output SAEs of six layers. The single SAE and the suite take turns,
on buffers of random numbers, medians of `--repeats`. The pass is one of a six-layer Gemma of that width over as many
tokens as a step takes rows, with the suite's 18 sites recorded. `ratio` is the suite's step over 18 single steps;
`ratio_with_pass` adds the pass to both: its bar is 1.1. `peak_mb` is of a process of its own that makes the buffer and
trains the suite for two steps.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from common import write_line

from icl_lib.models import ModelConfig, Site, Transformer, run_with_cache
from icl_lib.training import Member, Plan, make_recipe
from icl_lib.training.steps import init_state, run_steps

SITES = [Site(kind, layer) for layer in range(6) for kind in ("resid_pre", "attn_out", "mlp_out")]
N = len(SITES)
SEQ = 128


def runner(args, n: int):
    """A function that takes steps of a suite of n SAEs, and the bytes of its state."""
    sites = SITES[:n]
    recipe = make_recipe(args.objective, n_steps=100_000, batch_size=args.batch, dead_after=10_000)
    plan = Plan([Member(site, args.d_sae, args.sparsity) for site in sites], recipe, dict.fromkeys(sites, args.d_model))
    buffer = {
        site: jax.random.normal(jax.random.key(i), (4 * args.batch, args.d_model)) for i, site in enumerate(sites)
    }
    state = init_state(plan, buffer, key=jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state, buffer)))

    def steps(count: int) -> None:
        nonlocal state
        state, means = run_steps(state, buffer, count, plan)
        jax.block_until_ready(means)

    return steps, size


def language_model(args):
    """A function that runs one pass and returns the activations at every site."""
    config = ModelConfig(
        family="gemma", d_model=args.d_model, n_layers=6, n_heads=4, n_kv_heads=1, d_head=args.d_model // 4,
        d_mlp=4 * args.d_model, d_vocab=8192, n_ctx=SEQ,
    )  # fmt: skip
    model = Transformer.init(config, key=jax.random.key(1))
    tokens = jnp.ones((max(1, args.batch // SEQ), SEQ), jnp.int32)
    return lambda: jax.block_until_ready(run_with_cache(model, tokens, SITES)[1])


def timed(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def peak(argv: list[str]) -> int:
    """Peak resident bytes of a process that trains the suite for two steps."""
    subprocess.run([sys.executable, __file__, *argv, "--only-suite"], check=True, env=os.environ)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--objective", default="icl-sfc")
    parser.add_argument("--sparsity", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only-suite", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_suite:
        return runner(args, N)[0](2)
    memory = peak(sys.argv[1:])
    (single, _), (suite, size), model = runner(args, 1), runner(args, N), language_model(args)
    for warm in (lambda: single(1), lambda: suite(1), model):
        warm()
    times = [(timed(single, N) / N, timed(suite, 1), timed(model)) for _ in range(args.repeats)]
    one, all_, passed = (statistics.median(t) for t in zip(*times, strict=True))
    write_line(
        "sae_suite",
        objective=args.objective,
        d_model=args.d_model,
        d_sae=args.d_sae,
        batch=args.batch,
        repeats=args.repeats,
        single_ms=round(1e3 * one, 1),
        suite_ms=round(1e3 * all_, 1),
        pass_ms=round(1e3 * passed, 1),
        ratio=round(all_ / (N * one), 3),
        ratio_with_pass=round((all_ + passed) / (N * one + passed), 3),
        state_and_buffer_mb=round(size / 1e6),
        peak_mb=round(memory / 1e6),
    )


if __name__ == "__main__":
    main()
