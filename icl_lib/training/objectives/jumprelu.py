r"""jumprelu: $f = p\,1[p > \theta]$ and $L = E(f) + \lambda\, \mathrm{mean} \|f\|_0$.

Straight-through gradients teach $\theta$. Source: Rajamanoharan et al. (2024), "Jumping Ahead", Eqs. 9 to 12.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from icl_lib.training.kernels import add_bias, over_tokens, product
from icl_lib.training.objectives import base
from icl_lib.training.recipes import Recipe

Pre = Float[Array, "tokens d_sae"]


class JumpReLU(base.Objective):
    """A threshold for each latent, and a penalty on how many are on."""

    name = "jumprelu"
    # Rajamanoharan et al. (2024), "Jumping Ahead", App. D. Clipping and decay as for gated; they have neither
    published = dict(learning_rate=7e-5, beta1=0.0, beta2=0.999, unit_norm=True, sparsity_warmup=10_000)
    own = ("resample_every", "skip", "bandwidth", "threshold")

    def init(self, x, y, d_sae, recipe, *, key):
        start = super().init(x, y, d_sae, recipe, key=key)
        return start._replace(log_threshold=start_threshold(d_sae, x.shape[1], recipe))

    def loss(self, weights, batch, recipe):
        target = base.missing(weights, batch)
        pre = add_bias(product(batch.x, weights.W_enc), weights.b_enc)
        theta, width = jnp.exp(weights.log_threshold), recipe.bandwidth * math.sqrt(batch.x.shape[1])
        count = over_tokens(step(pre, theta, width))
        err = target - product(jump(pre, theta, width), weights.W_dec)
        total = base.mean_square(err) + batch.sparsity * (jnp.sum(count) / len(pre))
        return total, base.statistics(count, err, batch.y)

    def fold(self, weights, norm_in, norm_out, least, sparsity):
        fields, norms = base.fold_linear(weights, norm_in, norm_out)
        return fields | {"architecture": self.name, "threshold": norms * jnp.exp(weights.log_threshold)}


def start_threshold(d_sae: int, d_in: int, recipe: Recipe) -> Float[Array, " d_sae"]:
    """Logarithms of the thresholds before training, for inputs of mean norm sqrt(d_in)."""
    return jnp.full(d_sae, math.log(recipe.threshold * math.sqrt(d_in)), jnp.float32)


@jax.custom_vjp
def step(pre: Pre, theta: Float[Array, " d_sae"], width: float | Array) -> Pre:
    r"""$1[p > \theta]$; to $\theta$ it passes the straight-through gradient $-K((p - \theta) / \epsilon) / \epsilon$.
    $K$ is 1 between -1/2 and 1/2, $\epsilon$ is `width`; nothing passes to $p$."""
    return (pre > theta[None]).astype(pre.dtype)


@jax.custom_vjp
def jump(pre: Pre, theta: Float[Array, " d_sae"], width: float | Array) -> Pre:
    r"""$p\,1[p > \theta]$; to $\theta$ it passes the gradient $-\theta K((p - \theta) / \epsilon) / \epsilon$."""
    return jnp.where(pre > theta[None], pre, 0)


def _window(pre, theta, width):
    return (jnp.abs(pre - theta[None]) < width / 2).astype(pre.dtype)


def _step_backward(saved, g):
    pre, theta, width = saved
    return jnp.zeros_like(pre), -over_tokens(g * _window(pre, theta, width)) / width, None


def _jump_backward(saved, g):
    pre, theta, width = saved
    return jnp.where(pre > theta[None], g, 0), -theta * over_tokens(g * _window(pre, theta, width)) / width, None


step.defvjp(lambda pre, theta, width: (step(pre, theta, width), (pre, theta, width)), _step_backward)
jump.defvjp(lambda pre, theta, width: (jump(pre, theta, width), (pre, theta, width)), _jump_backward)
