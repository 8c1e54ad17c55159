"""What `test_sharding.py` starts twice: one of two processes of two devices each, which share a model and write one
store.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from icl_lib.files.processes import is_writer
from icl_lib.models import Site, gate, load_model, make_mesh, perturb, run_with_cache, save_model, shard_batch
from icl_lib.runs import devices
from icl_lib.runs.ledger import Ledger
from icl_lib.runs.store import Store
from icl_lib.saes import SAE, save_suite
from icl_lib.saes.formats.suites import shard_sae

shared, own, model, data = sys.argv[1:]
assert devices.setup(shared)["processes"] == 2
mesh = make_mesh(data=int(data))
assert load_model(model).embed.devices() == {jax.local_devices()[0]}  # without a mesh, for this process alone
lm = load_model(model, mesh=mesh)
tokens = np.arange(48).reshape(4, 12) % 40
logits, cache = run_with_cache(lm, shard_batch(tokens, mesh), [Site("resid_post", 1)])
assert not logits.is_fully_addressable  # neither process could answer alone
arrays = {"logits": logits, "resid": cache[Site("resid_post", 1)]}
mean = float(jnp.mean(logits))


@eqx.filter_jit
def gradient(model, tokens):
    """Of the mean log-probability of the next token, by what is added to a residual."""

    def loss(delta):
        log_p = jax.nn.log_softmax(model(tokens, tap=perturb({Site("resid_pre", 1): delta}))[:, :-1])
        return jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))

    return jax.grad(loss)(jnp.zeros((*tokens.shape, model.config.d_model)))


arrays["gradient"] = gradient(lm, shard_batch(tokens, mesh))

store = Store(shared, {"model": "random"})
store.save("first", arrays)
assert store.load("first")[0]["logits"].shape == logits.shape  # there for both, as soon as save returns
store.save("second", {"mean": np.float32(mean)}, meta={"data": int(data)})
local = Store(own, {"model": "random"})  # a folder of this process alone shows what it wrote
local.save("kept", arrays)
ledger = Ledger(local, "00")
ledger.record("mean", item="-", published=None, ours=mean, criterion="-", holds=True)
ledger.write()
save_model(lm, own + "/model", dtype="float32")  # put together from both
gate.record(lm, lambda prompt: {"input_ids": [1, 2, 3]}, own + "/model")
weights = {
    name: jnp.ones(shape) for name, shape in (("W_enc", (16, 8)), ("b_enc", (8,)), ("W_dec", (8, 16)), ("b_dec", (16,)))
}
sae = SAE(**weights, site_in=Site("resid_pre", 1), site_out=Site("resid_pre", 1), architecture="standard")
save_suite({sae.site_in: shard_sae(sae, mesh)}, own + "/saes")
print("writer" if is_writer() else "reader", jax.process_index(), len(jax.local_devices()))
