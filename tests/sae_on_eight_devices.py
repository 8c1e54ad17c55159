"""What test_sae_training.py runs in a process of its own: SAEs divided over eight devices take the steps of one."""

import jax
import jax.numpy as jnp
import numpy as np

from icl_lib.models import Site
from icl_lib.saes.recipes import make_recipe
from icl_lib.saes.training import Member, Suite, finish, init_state, run_steps

MESH = jax.make_mesh((8,), ("sae",), axis_types=(jax.sharding.AxisType.Auto,))
SITES = [Site("resid_pre", layer) for layer in range(8)]


def check(objective: str, level: float, shard: str) -> None:
    """Five steps, with dead latents, sharded and not."""
    sites = SITES if shard == "sae" else SITES[:1]
    recipe = make_recipe(objective, n_steps=100, batch_size=32, learning_rate=1e-3, dead_after=1)
    members, widths = [Member(site, 32, level) for site in sites], dict.fromkeys(sites, 16)
    buffer = {site: jax.random.normal(jax.random.key(i), (200, 16)) for i, site in enumerate(sites)}
    results = []
    for mesh in (None, MESH):
        suite = Suite(members, recipe, widths, mesh, shard)
        state = init_state(suite, buffer, key=jax.random.key(1))
        state, _ = run_steps(state, buffer, 2, suite)
        state, means = run_steps(state, buffer, 3, suite)
        results.append((means, finish(state, suite)[members[-1]]))
        where = state.stacks[0].params.W_dec.sharding.shard_shape(state.stacks[0].params.W_dec.shape)
        assert mesh is None or where == ((1, 32, 16) if shard == "sae" else (1, 4, 16)), where
    (one, sae), (many, other) = results
    np.testing.assert_allclose(one.l0, many.l0, rtol=1e-3)
    np.testing.assert_allclose(one.fvu, many.fvu, rtol=1e-4)
    np.testing.assert_array_equal(one.dead, many.dead)
    np.testing.assert_allclose(sae.W_dec, other.W_dec, atol=1e-4)
    assert bool(jnp.all(jnp.isfinite(other.W_enc)))
    print(objective, shard, "equal", flush=True)


if __name__ == "__main__":
    check("icl-sfc", 0.1, "sae")
    check("batchtopk", 3, "sae")
    check("gated", 0.1, "latent")
    check("topk", 3, "latent")
