r"""gated: $L = E(f) + \lambda\, \mathrm{mean} \sum_i \mathrm{ReLU}(p_i) w_i + E'(\mathrm{ReLU}(p))$.

$f$ is that of `SAE`. The decoder of $E'$ is held constant. Source: Rajamanoharan et al. (2024), "Gated SAEs", Eq. 8.
"""

import jax
import jax.numpy as jnp

from icl_lib.training.kernels import add_bias, over_tokens, product
from icl_lib.training.objectives import base


class Gated(base.Objective):
    """A gate that decides which latents are on, and a magnitude that shares its weights."""

    name = "gated"
    # Rajamanoharan et al. (2024), App. D: unit decoder rows, resampled dead latents. The clipping and the decay over
    # the last fifth are not in the paper; they are Conerly et al.'s
    published = dict(
        learning_rate=3e-4, beta1=0.0, beta2=0.999, unit_norm=True, resample_every=25_000, dead_after=10_000
    )
    own = ("resample_every", "skip")

    def init(self, x, y, d_sae, recipe, *, key):
        start = super().init(x, y, d_sae, recipe, key=key)
        return start._replace(b_mag=start.b_enc, r_mag=jnp.zeros(d_sae))

    def loss(self, weights, batch, recipe):
        target = base.missing(weights, batch)
        h = product(batch.x, weights.W_enc)
        pre = add_bias(h, weights.b_enc)
        open_gate = jax.nn.relu(pre)
        penalty = jnp.dot(over_tokens(open_gate), base.row_norms(weights.W_dec)) / len(h)
        f = jnp.where(pre > 0, jax.nn.relu(add_bias(h * jnp.exp(weights.r_mag)[None], weights.b_mag)), 0)
        err = target - product(f, weights.W_dec)
        W_dec, frozen = jax.lax.stop_gradient((weights.W_dec, target))
        gate_err = frozen - product(open_gate, W_dec)
        total = base.mean_square(err) + batch.sparsity * penalty + base.mean_square(gate_err)
        return total, base.statistics(base.times_on(f), err, batch.y)

    def fold(self, weights, norm_in, norm_out, least, sparsity):
        return base.fold_gated(weights, norm_in, norm_out)
