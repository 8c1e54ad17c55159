"""What test_sae_training.py runs in a process of its own: SAEs divided over eight devices take the steps of one."""

import os

# Compiled to run once, and each device on its own thread: with Eigen's threads too, eight devices on two cores can wait
# for each other for good.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false"
)

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from icl_lib.models import Site, Transformer, tiny_config
from icl_lib.models.sharding import make_mesh, shard_model
from icl_lib.training import JobSettings, Member, Plan, make_recipe, steps, train_suite
from icl_lib.training.buffer import ActivationBuffer, _refill
from icl_lib.training.steps import finish, init_state, run_steps

MESH = jax.make_mesh((8,), ("sae",), axis_types=(jax.sharding.AxisType.Auto,))
SITES = [Site("resid_pre", layer) for layer in range(8)]
MLP = Site("mlp_in", 0), Site("mlp_out", 0)


def check(objective: str, level: float, shard: str, transcoder: bool = False, **changes) -> None:
    """Three steps, with dead latents, sharded and not; transcoders are 16 wide in and 12 out."""
    sites = [MLP[0]] if transcoder else SITES if shard == "sae" else SITES[:1]
    recipe = make_recipe(objective, **(dict(n_steps=100, batch_size=32, learning_rate=1e-3, dead_after=1) | changes))
    members, widths = (
        [Member(site, 32, level) for site in sites],
        dict.fromkeys(sites, 16) | ({MLP[1]: 12} if transcoder else {}),
    )
    buffer = {site: jax.random.normal(jax.random.key(i), (200, d)) for i, (site, d) in enumerate(widths.items())}
    results = []
    for mesh in (None, MESH):
        plan = Plan(members, recipe, widths, mesh, shard)
        state = init_state(plan, buffer, key=jax.random.key(1))
        state, _ = jax.block_until_ready(run_steps(state, buffer, 1, plan))
        state, means = jax.block_until_ready(run_steps(state, buffer, 2, plan))
        results.append((means, finish(state, plan)[members[-1]]))
        weights = state.stacks[0].weights.W_dec
        where, d_out = weights.sharding.shard_shape(weights.shape), weights.shape[2]
        assert mesh is None or where == ((1, 32, d_out) if shard == "sae" else (1, 4, d_out)), where
    (one, sae), (many, other) = results
    loose = recipe.dtype == "bfloat16"  # sums of another order are rounded to other neighbours
    np.testing.assert_allclose(one.l0, many.l0, rtol=0.05 if loose else 1e-3)
    np.testing.assert_allclose(one.fvu, many.fvu, rtol=0.02 if loose else 1e-4)
    np.testing.assert_array_equal(one.dead, many.dead)
    np.testing.assert_allclose(sae.W_dec, other.W_dec, atol=0.05 if loose else 1e-4)
    assert bool(jnp.all(jnp.isfinite(other.W_enc)))
    print(objective, shard, *changes, flush=True)


def check_start() -> None:
    """An orthogonal start of eight SAEs, cut by latents, never holds the whole stack of a matrix on one device."""
    recipe = make_recipe("icl-sfc", n_steps=10, batch_size=64)
    plan = Plan([Member(site, 2048, 0.1) for site in SITES], recipe, dict.fromkeys(SITES, 64), MESH, "latent")
    buffer = {site: jax.ShapeDtypeStruct((500, 64), jnp.float32) for site in SITES}
    start, key = functools.partial(steps._start, plan=plan, groups=(0,)), jax.random.key(0)
    places = steps.shardings(plan, jax.eval_shape(start, buffer, key))
    memory = jax.jit(start, out_shardings=places).lower(buffer, key).compile().memory_analysis()
    sample, stack = 8 * steps._SAMPLE * 64 * 4, 8 * 2048 * 64 * 4
    assert memory.temp_size_in_bytes - sample < stack / 2, memory
    print("start latent", flush=True)


def check_buffer() -> None:
    """A pass is written into a buffer that lies on eight devices without any of them holding the whole."""
    model = shard_model(Transformer.init(tiny_config(), key=jax.random.key(0)), make_mesh(data=8))
    buffer = ActivationBuffer(model, Rows(), [MLP[0]], contexts=8, passes=32, dtype="float32", mesh=MESH)
    inputs = (model, jnp.zeros((8, 8), jnp.int32), buffer.sites, np.int32(0), np.int32(0), buffer._rows)
    text = _refill.lower(inputs, buffer.rows, buffer._bad).compile().compiled.as_text()
    n, d = buffer.rows[MLP[0]].shape
    assert f"f32[{n // 8},{d}]" in text and f"f32[{n},{d}]" not in text
    print("buffer", flush=True)


class Rows:
    """A corpus of random tokens."""

    seq = 8

    def __init__(self):
        self.passes = 0

    def batch(self, n: int) -> np.ndarray:
        self.passes += 1
        return np.random.default_rng(self.passes).integers(3, 40, (n, self.seq)).astype(np.int32)

    def state_dict(self):
        return {"passes": self.passes}

    def load_state_dict(self, state):
        self.passes = state["passes"]

    def describe(self):
        return {"corpus": "rows"}


def check_job() -> None:
    """The whole job with each SAE cut by its latents, as cards do: harvest, training, checkpoint, files."""
    model, member = Transformer.init(tiny_config(), key=jax.random.key(0)), Member(MLP[0], 32, 0.1)
    recipe = make_recipe("icl-sfc", n_steps=4, batch_size=32, learning_rate=1e-3, dead_after=1)
    saes = []
    for mesh, placed in ((None, model), (MESH, shard_model(model, make_mesh(data=8)))):
        with tempfile.TemporaryDirectory() as folder:
            settings = JobSettings(
                contexts=8, passes=2, steps_per_pass=2, save_every=2, held_out=3, mesh=mesh, shard="latent", log=None
            )
            saes.append(train_suite(placed, Rows(), [member], recipe, folder, settings)[member])
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        np.testing.assert_allclose(getattr(saes[0], name), getattr(saes[1], name), atol=1e-4)
    print("train_suite latent", flush=True)


if __name__ == "__main__":
    check("icl-sfc", 0.1, "sae")
    check("batchtopk", 3, "sae")
    check("icl-sfc", 0.1, "latent", transcoder=True, dtype="bfloat16")
    check("gated", 0.1, "latent", resample_every=2)
    check("topk", 3, "latent", transcoder=True, skip=True)
    check("jumprelu", 0.1, "latent", threshold=0.1, bandwidth=0.1)
    check("standard", 0.1, "latent")
    check_start()
    check_buffer()
    check_job()
    print("all equal")
