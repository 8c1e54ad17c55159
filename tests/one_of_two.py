"""What `test_sharding.py` starts twice: one of two processes of two devices each, which share a model and write one store."""

import sys

import jax
import numpy as np

from icl_lib.models import Site, load_model, make_mesh, run_with_cache, shard_batch
from icl_lib.runs import devices
from icl_lib.runs.ledger import Ledger
from icl_lib.runs.store import Store

shared, own, model, data = sys.argv[1:]
assert devices.setup(shared)["processes"] == 2
mesh = make_mesh(data=int(data))
lm = load_model(model, mesh=mesh)
tokens = np.arange(48).reshape(4, 12) % 40
logits, cache = run_with_cache(lm, shard_batch(tokens, mesh), [Site("resid_post", 1)])
assert not logits.is_fully_addressable  # neither process could answer alone
arrays = {"logits": logits, "resid": cache[Site("resid_post", 1)]}
mean = float(jax.numpy.mean(logits))

store = Store(shared)
store.save("first", arrays)
assert store.load("first")[0]["logits"].shape == logits.shape  # there for both, as soon as save returns
store.save("second", {"mean": np.float32(mean)}, meta={"data": int(data)})
local = Store(own)  # a folder of this process alone shows what it wrote
local.save("kept", arrays)
ledger = Ledger(local, "00")
ledger.record("mean", item="-", published=None, ours=mean, criterion="-", holds=True)
ledger.write()
print("writer" if devices.is_writer() else "reader", jax.process_index(), len(jax.local_devices()))
