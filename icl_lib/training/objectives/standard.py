r"""standard: $f = \mathrm{ReLU}(p)$ and $L = E(f) + \lambda\, \mathrm{mean} \sum_i f_i w_i$.

Source: Conerly et al. (April 2024).
"""

import jax
import jax.numpy as jnp

from icl_lib.training.kernels import add_bias, over_tokens, product
from icl_lib.training.objectives import base


class Standard(base.Objective):
    """A ReLU SAE whose penalty weighs each latent by the length of what it writes."""

    name = "standard"
    # Conerly et al., Transformer Circuits update of April 2024: the penalty rises over the first 5 % of the steps
    published = dict(learning_rate=5e-5, beta1=0.9, beta2=0.999, sparsity_warmup=lambda steps, batch: steps // 20)
    own = ("resample_every", "skip")

    def loss(self, weights, batch, recipe):
        target = base.missing(weights, batch)
        f = jax.nn.relu(add_bias(product(batch.x, weights.W_enc), weights.b_enc))
        penalty = jnp.dot(over_tokens(f), base.row_norms(weights.W_dec)) / len(f)
        err = target - product(f, weights.W_dec)
        total = base.mean_square(err) + batch.sparsity * penalty
        return total, base.statistics(base.times_on(f), err, batch.y)

    def fold(self, weights, norm_in, norm_out, least, sparsity):
        return base.fold_linear(weights, norm_in, norm_out)[0] | {"architecture": self.name}
