r"""batchtopk: topk, but $f$ is $\mathrm{ReLU}(p)$ where it is among the $nk$ largest of $n$ tokens.

The finished SAE has the running mean of the smallest feature kept as its threshold. Source: Bussmann et al. (2024).
"""

import jax.numpy as jnp

from icl_lib.training.objectives import base, topk


class BatchTopK(topk.Top):
    """The largest latents of a batch, k a token on average."""

    name = "batchtopk"
    published = dict(learning_rate=3e-4, beta1=0.9, beta2=0.99, unit_norm=True, k_aux=512)  # Bussmann et al. (2024)

    def loss(self, weights, batch, recipe):
        loss, stats, kept = topk.top_loss(weights, batch, whole=True)
        return loss, stats._replace(least=jnp.min(jnp.where(kept > 0, kept, jnp.inf)))

    def fold(self, weights, norm_in, norm_out, least, sparsity):
        fields, norms = base.fold_linear(weights._replace(W_enc=weights.W_enc.T), norm_in, norm_out)
        return fields | {"architecture": self.name, "threshold": norms * jnp.maximum(least, 0)}
