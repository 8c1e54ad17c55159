"""Tokens per second of collecting every residual, with and without logits, beside transformers on the same machine in
one run.

    python benchmarks/forward.py                      # 6 layers, d_model 512, 16 x 128 tokens, float32, on this device
    python benchmarks/forward.py --size gemma-2-2b    # random weights, 16 x 256 tokens, bfloat16: for an accelerator

Both models have the same weights. Runs alternate, each figure is a median; the share of the matmul rate is what the
model's matrix products (2 x parameters a token, attention scores added) would take at the rate of one large product,
measured here. Bar for the small size: at least 1.3 times the tokens per second of transformers as installed, or the
exit status is 1. On AMD processors MKL, which PyTorch calls, takes its AVX2 path by default. So a CPU is measured
twice: "default" is PyTorch as anyone has it, "avx512" the same with a preloaded answer to MKL's question for the maker
(a C compiler is needed; see common.py). It stops where JAX and PyTorch would compute on different devices; on a TPU,
which PyTorch does not know, it measures ours alone.
"""

import argparse
import functools
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import avx512, write_line
from transformers import AutoModelForCausalLM

from icl_lib.models import ModelConfig, Site, Transformer, load_model, record, run_with_cache, save_model
from icl_lib.models.families import known_config
from icl_lib.models.tensors import n_params

BAR = 1.3
SMALL = ModelConfig(
    family="gemma", d_model=512, n_layers=6, n_heads=8, n_kv_heads=1, d_head=64, d_mlp=2048, d_vocab=8192, n_ctx=1024
)  # fmt: skip


def flops(config: ModelConfig, batch: int, seq: int) -> float:
    """Of one forward pass: matrix products with every parameter, and scores and mixing of attention."""
    per_token = 2 * n_params(config) - 2 * config.d_vocab * config.d_model * (not config.tied)
    attention = 4 * config.n_layers * config.n_heads * config.d_head * seq
    return batch * seq * (per_token + attention)


def matmul_rate(dtype, n: int) -> float:
    """FLOP per second of an n x n product in `dtype`, median of 5."""
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    return 2 * n**3 / statistics.median(timed(lambda: product(a).block_until_ready()) for _ in range(5))


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@eqx.filter_jit
def residuals(model, tokens, sites):
    """The residuals alone: what nobody reads, such as the logits, is not computed."""
    cache = {}
    model(tokens, tap=record(sites, cache))
    return cache


def peers(folder: str, dtype: str, device: str):
    """transformers' model with hidden states on, as functions of tokens: with its output matrix, and without."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)

    def run(model):
        def forward(tokens):
            with torch.inference_mode():
                out = model(tokens, output_hidden_states=True, use_cache=False)
            if device == "cuda":
                torch.cuda.synchronize()
            return out

        return forward

    return {"residuals and logits": run(theirs), "residuals": run(theirs.model)}


def platform() -> str:
    """JAX's platform, on which PyTorch computes as well unless it is a TPU. Ends the program where the two differ."""
    ours, theirs = jax.default_backend(), "gpu" if torch.cuda.is_available() else "cpu"
    if ours not in ("tpu", theirs):
        remedy = {
            "gpu": "install a PyTorch that sees the GPU, or set JAX_PLATFORMS=cpu",
            "cpu": "install icl-lib[cuda], or hide the GPU with CUDA_VISIBLE_DEVICES=''",
        }.get(ours, "set JAX_PLATFORMS=cpu")
        sys.exit(f"JAX computes on {ours} and PyTorch on {theirs}, so their times do not compare: {remedy}")
    return ours


def compare(runs: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each, run by turns."""
    seconds = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return {name: statistics.median(values) for name, values in seconds.items()}


def on_both_paths() -> int:
    """The measurement in two processes, one for each path of MKL; the exit status of the default one."""
    with tempfile.TemporaryDirectory() as folder:
        run = lambda kind, preload: subprocess.run([sys.executable, *sys.argv, "--mkl", kind], env=os.environ | preload)
        done = run("default", {})
        if preload := avx512(folder):
            run("avx512", preload)
    return done.returncode


def main():
    """Measure, and exit with status 1 if the small size misses the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["small", "gemma-2-2b"], default="small")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--mkl", choices=["default", "avx512"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    on = platform()
    if args.mkl is None and on == "cpu":
        sys.exit(on_both_paths())
    config, batch, seq, dtype, n = {
        "small": (SMALL, 16, 128, "float32", 2048),
        "gemma-2-2b": (known_config("google/gemma-2-2b"), 16, 256, "bfloat16", 8192),
    }[args.size]
    tokens = np.random.default_rng(0).integers(3, config.d_vocab, (batch, seq))
    runs, difference = prepared(config, dtype, tokens, on)
    misses = {}
    for what, run in runs.items():
        median = compare(run, args.repeats)
        rate = matmul_rate(dtype, n)
        work = flops(config, batch, seq) - (
            2 * batch * seq * config.d_vocab * config.d_model if what == "residuals" else 0
        )
        ratio = median["transformers"] / median["ours"] if "transformers" in median else None
        misses |= {what: round(ratio, 2)} if args.size == "small" and ratio is not None and ratio < BAR else {}
        write_line(
            "forward",
            model=args.size, collects=what, batch=batch, seq=seq, dtype=dtype,
            tokens_per_s={name: round(batch * seq / s) for name, s in median.items()},
            ratio=ratio and round(ratio, 2),
            share_of_matmul_rate={name: round(work / s / rate, 2) for name, s in median.items()},
            matmul_gflops=round(rate / 1e9), largest_difference_of_logits=difference,
            torch_threads=torch.get_num_threads(), mkl=args.mkl or "none",
        )  # fmt: skip
    sys.exit(f"below the bar of {BAR}: {misses}" if misses else 0)


def prepared(config: ModelConfig, dtype: str, tokens: np.ndarray, on: str) -> tuple[dict, float | None]:
    """What is to be timed, by what it collects and whose it is, and the largest difference of the logits; on a TPU ours
    alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_model(eqx.filter_jit(Transformer.init)(config, key=jax.random.key(0)), folder, dtype=dtype)
        gc.collect()
        ours = load_model(folder, dtype=dtype)
        device = "cuda" if on == "gpu" else "cpu"
        theirs = {} if on == "tpu" else peers(folder, dtype, device)
    sites = tuple(Site("resid_pre", i) for i in range(config.n_layers)) + (Site("final_norm"),)
    jax_tokens, torch_tokens = jnp.asarray(tokens), torch.tensor(tokens, device=device)
    runs = {
        "residuals and logits": {"ours": lambda: jax.block_until_ready(run_with_cache(ours, jax_tokens, sites))},
        "residuals": {"ours": lambda: jax.block_until_ready(residuals(ours, jax_tokens, sites))},
    }
    for what, peer in theirs.items():
        runs[what]["transformers"] = functools.partial(peer, torch_tokens)
    if not theirs:
        return runs, None
    both = runs["residuals and logits"]
    logits, expected = both["ours"]()[0], both["transformers"]().logits
    return runs, float(np.abs(np.asarray(logits) - expected.float().cpu().numpy()).max())


if __name__ == "__main__":
    main()
