"""One training step of one SAE by this library, by sae-lens or by dictionary_learning, told what to do through standard
input.

`python sae_peers.py LIBRARY OBJECTIVE D_MODEL,D_SAE,BATCH` prints "ready", then for each line N takes N steps and
prints their wall and processor seconds. Apart from it and sae_step.py nothing imports the peers, so that they may live
in another environment.
"""

import itertools
import os
import sys
import time

K = 32  # of topk and batchtopk


def ours(objective: str, d: int, d_sae: int, batch: int):
    import jax

    from icl_lib.models import Site
    from icl_lib.training import Member, Plan, make_recipe
    from icl_lib.training.steps import init_state, run_steps

    site, key = Site("resid_pre", 0), jax.random.key(0)
    recipe = make_recipe(objective, n_steps=10_000, batch_size=batch, beta1=0.9)  # the peers keep a first moment too
    plan = Plan([Member(site, d_sae, K if recipe.top else 1e-3)], recipe, {site: d})
    buffer = {site: jax.random.normal(key, (4 * batch, d))}
    state = init_state(plan, buffer, key=key)

    def steps(n):
        nonlocal state
        state, means = run_steps(state, buffer, n, plan)
        jax.block_until_ready(means)

    return steps


def rows(d: int, batch: int):
    """A stored buffer and rows of it drawn at random, as a training loop would."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    buffer = torch.randn(4 * batch, d)
    return lambda: buffer[torch.randint(len(buffer), (batch,))]


def sae_lens(objective: str, d: int, d_sae: int, batch: int):
    import sae_lens.saes as s
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    names = {"standard": "Standard", "gated": "Gated", "jumprelu": "JumpReLU", "topk": "TopK", "batchtopk": "BatchTopK"}
    sparsity = {"topk": {"k": K}, "batchtopk": {"k": K}, "jumprelu": {"l0_coefficient": 1e-3}}.get(
        objective, {"l1_coefficient": 1e-3}
    )
    config = getattr(s, names[objective] + "TrainingSAEConfig")(d_in=d, d_sae=d_sae, device="cpu", **sparsity)
    sae, draw = getattr(s, names[objective] + "TrainingSAE")(config), rows(d, batch)
    settings = SAETrainerConfig(10_000 * batch, batch, lr_end=3e-5, logger=LoggingConfig(log_to_wandb=False))
    trainer = SAETrainer(settings, sae, itertools.repeat(draw()))

    def steps(n):
        for _ in range(n):
            trainer.step(draw())
            trainer.n_training_steps += 1

    return steps


def dictionary_learning(objective: str, d: int, d_sae: int, batch: int):
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, standard, top_k

    trainers = {
        "standard": standard.StandardTrainerAprilUpdate,
        "gated": gdm.GatedSAETrainer,
        "jumprelu": jumprelu.JumpReluTrainer,
        "topk": top_k.TopKTrainer,
        "batchtopk": batch_top_k.BatchTopKTrainer,
    }
    sparsity = {"k": K} if "topk" in objective else {}
    trainer = trainers[objective](
        steps=10_000,
        activation_dim=d,
        dict_size=d_sae,
        layer=0,
        lm_name="none",
        device="cpu",
        decay_start=8000,
        **sparsity,
    )
    draw, done = rows(d, batch), itertools.count()

    def steps(n):
        for _ in range(n):
            trainer.update(next(done), draw())

    return steps


def matmul(_, d: int, d_sae: int, batch: int):
    """The product of the encoder alone, by JAX, into memory that is there already: fresh pages would cost up to half of
    the rate.
    """
    import jax

    x, w = jax.random.normal(jax.random.key(0), (batch, d)), jax.random.normal(jax.random.key(1), (d, d_sae))
    product = jax.jit(lambda x, w, old: x @ w, donate_argnames="old", keep_unused=True)
    h = x @ w

    def steps(n):
        nonlocal h
        for _ in range(n):
            h = product(x, w, h).block_until_ready()

    return steps


def main():
    library, objective, shape = sys.argv[1:]
    steps = {"ours": ours, "sae_lens": sae_lens, "dictionary_learning": dictionary_learning, "matmul": matmul}[library]
    steps = steps(objective, *map(int, shape.split(",")))
    steps(2)  # compiled, allocated, warm
    print("ready", flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        steps(int(line))
        print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


if __name__ == "__main__":
    main()
