r"""topk: $f$ is $\mathrm{ReLU}(p)$ where it is among the $k$ largest of a token.

$L = \mathrm{FVU}(f) + \alpha\, \mathrm{FVU}_{aux}$. $\mathrm{FVU}_{aux}$ is that of the error by the `k_aux` largest
dead latents of each token. Where more than 4 `k_aux` are dead, that many are drawn anew at each step. What is here is
batchtopk's too. Source: Gao et al. (2024), Sec. 2.4.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from icl_lib.training import kernels
from icl_lib.training.kernels import add_bias, product
from icl_lib.training.objectives import base
from icl_lib.training.recipes import Recipe


def auxiliary(
    weights: base.Weights, batch: base.Batch, err: Float[Array, "tokens d_out"], recipe: Recipe
) -> Float[Array, ""]:
    r"""$\alpha\, \mathrm{FVU}_{aux}$: of the error by the `k_aux` largest of the dead (d_sae,); 0 if there are none."""
    n = min(4 * recipe.k_aux, len(batch.dead))
    k = min(recipe.k_aux, n)
    latents, is_dead = base.draw_dead(batch.dead, n, key=batch.key)
    f = jax.nn.relu(add_bias(product(batch.x, weights.W_enc[latents].T), weights.b_enc[latents]))
    f = jnp.where(is_dead[None], f, 0)
    f = jnp.where(f >= kernels.least(jax.lax.stop_gradient(f), jnp.float32(k), k, whole=False), f, 0)
    missing = err - product(f, weights.W_dec[latents])
    fvu = jnp.sum(missing**2) / (jnp.sum(base.target_norm(err) ** 2) + base.EPS)
    return recipe.aux * jnp.where(jnp.any(batch.dead), fvu, 0)


def top_loss(weights: base.Weights, batch: base.Batch, whole: bool) -> tuple[Float[Array, ""], base.Stats, Array]:
    """FVU by the k largest features of each token or (tokens x k) of the `whole` batch, statistics, features kept."""
    target, k, x = base.missing(weights, batch), batch.sparsity, batch.x
    if batch.sparse:
        fixed = jax.lax.stop_gradient(weights)
        pairs = kernels.largest(product(x, fixed.W_enc.T) + fixed.b_enc[None], k, batch.k_max, whole)
        kept = pairs.value
        err = target - kernels.reconstruct(pairs, x, weights.W_enc, weights.b_enc, weights.W_dec)
        count = jnp.zeros(len(weights.b_enc)).at[pairs.latent].add((kept > 0).astype(jnp.float32))
    else:
        f = jax.nn.relu(add_bias(product(x, weights.W_enc.T), weights.b_enc))
        kept = jnp.where(f >= kernels.least(jax.lax.stop_gradient(f), k, batch.k_max, whole), f, 0)
        err, count = target - product(kept, weights.W_dec), base.times_on(kept)
    stats = base.statistics(count, err, batch.y)
    return stats.fvu, stats._replace(err=err), kept


class Top(base.Objective):
    """What topk and batchtopk share; each says what a finished SAE keeps."""

    own = ("skip", "k_aux", "aux")
    top = True
    auxiliary = staticmethod(auxiliary)


class TopK(Top):
    """The k largest latents of each token."""

    name = "topk"
    # Gao et al. (2024), App. A and B: dead after 10 million tokens; k_aux is the power of two nearest d / 2 (d = 1,024)
    published = dict(
        learning_rate=1e-4, beta1=0.9, beta2=0.999, unit_norm=True, k_aux=512,
        dead_after=lambda steps, batch: max(1, 10_000_000 // batch),
    )  # fmt: skip

    def loss(self, weights, batch, recipe):
        return top_loss(weights, batch, whole=False)[:2]

    def fold(self, weights, norm_in, norm_out, least, sparsity):
        """One factor for all latents, which the SAE compares: each keeps the norm that training gave it."""
        weights = weights._replace(W_enc=weights.W_enc.T)
        fields, _ = base.fold_linear(weights, norm_in, norm_out, norms=jnp.ones(len(weights.W_dec)))
        return fields | {"architecture": self.name, "k": int(sparsity)}
