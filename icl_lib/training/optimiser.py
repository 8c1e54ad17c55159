"""The weights of one SAE between gradients: Adam, unit decoder rows, rounding to bfloat16, resampled dead latents."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from icl_lib.training.kernels import matmul
from icl_lib.training.objectives.base import Weights, unit_rows
from icl_lib.training.objectives.jumprelu import start_threshold
from icl_lib.training.recipes import Recipe

RESAMPLED_NORM = 0.2  # of a resampled encoder column, relative to the mean of the living


class Moments(NamedTuple):
    """Running means of Adam, float32."""

    first: Weights | None  # of gradients; none if beta1 is 0
    second: Weights  # of their squares


def start(weights: Weights, recipe: Recipe) -> Moments:
    """Moments before the first step."""
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), weights)
    return Moments(zeros if recipe.beta1 else None, zeros)


def update(
    weights: Weights, moments: Moments, grads: Weights, recipe: Recipe, step: Array, *, key: PRNGKeyArray
) -> tuple[Weights, Moments]:
    """One step of Adam on the clipped gradient, bias-corrected; with `unit_norm` decoder rows move along the sphere.

    A bfloat16 weight is rounded up or down at random, by `key`, so that its mean is the float32 result: small steps are
    not lost.
    """
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    if recipe.unit_norm:  # without the part along the row, which normalising would undo
        along = jnp.sum(grads.W_dec * weights.W_dec.astype(jnp.float32), axis=1, keepdims=True)
        grads = grads._replace(W_dec=grads.W_dec - along * weights.W_dec.astype(jnp.float32))
    shrink = jnp.float32(1)
    if recipe.clip:
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        shrink = jnp.minimum(1.0, recipe.clip / (norm + 1e-12))
    b1, b2, done = recipe.beta1, recipe.beta2, (step + 1).astype(jnp.float32)
    second = jax.tree.map(lambda s, g: b2 * s + (1 - b2) * (shrink * g) ** 2, moments.second, grads)
    correction = 1 - b2**done
    if b1:
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * (shrink * g), moments.first, grads)
        rate = recipe.rate(step) / (1 - b1**done)
    else:
        first, rate = None, recipe.rate(step) * shrink
    # XLA would compute the moments a second time where the weights need them, and copy the old ones to do so
    first, second = jax.lax.optimization_barrier((first, second))
    towards = grads if first is None else first
    new = jax.tree.map(
        lambda p, m, s: p.astype(jnp.float32) - rate * m / (jnp.sqrt(s / correction) + 1e-8), weights, towards, second
    )
    if recipe.unit_norm:
        new = new._replace(W_dec=unit_rows(new.W_dec))
    keys = jax.random.split(jax.random.fold_in(key, 1), len(new))
    rounded = [None if p is None else round_to(v, p.dtype, key=k) for v, p, k in zip(new, weights, keys, strict=True)]
    return Weights(*rounded), Moments(first, second)


def round_to(value: Float[Array, "..."], dtype, *, key: PRNGKeyArray) -> Array:
    """float32 as it is; bfloat16 by adding 16 random bits below its last bit and cutting them off."""
    if dtype == jnp.float32:
        return value
    noise = jax.random.bits(key, value.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(dtype)


def resample(
    weights: Weights, moments: Moments, dead: Array, x: Float[Array, "tokens d_in"], y: Float[Array, "tokens d_out"],
    recipe: Recipe, *, key: PRNGKeyArray,
) -> tuple[Weights, Moments]:  # fmt: skip
    """Dead latents start again at inputs that are poorly explained; their moments at 0.

    A token is drawn with probability proportional to its squared loss. The decoder row points along the target less
    b_dec, at the mean norm of living rows, and the encoder along the centred input, at `RESAMPLED_NORM` of theirs; a
    threshold starts anew. Not for topk and batchtopk, whose auxiliary loss revives. Source: Bricken et al. (2023),
    "Towards Monosemanticity", Appendix.
    """
    centre = jnp.mean(x, axis=0)
    pre = matmul(x, weights.W_enc) + weights.b_enc[None]
    threshold = 0.0 if weights.log_threshold is None else jnp.exp(weights.log_threshold)[None]
    err = y - weights.b_dec[None] - matmul(jnp.where((pre > threshold) & ~dead[None], pre, 0), weights.W_dec)
    weight = jnp.cumsum(jnp.sum(err**2, axis=1) ** 2)
    drawn = jnp.searchsorted(weight, weight[-1] * jax.random.uniform(jax.random.fold_in(key, 2), dead.shape))
    drawn = jnp.minimum(drawn, x.shape[0] - 1)
    living = jnp.maximum(jnp.sum(~dead, dtype=jnp.float32), 1)
    norm = lambda W, axis: jnp.sum(jnp.where(dead, 0, jnp.linalg.norm(W.astype(jnp.float32), axis=axis))) / living
    rows_dec = norm(weights.W_dec, 1) * unit_rows(y - weights.b_dec[None])
    rows_enc = RESAMPLED_NORM * norm(weights.W_enc, 0) * unit_rows(x - centre[None])
    bias = -(rows_enc @ centre)
    fresh = Weights(
        rows_enc.T[:, drawn], rows_dec[drawn], b_enc=bias[drawn], b_mag=bias[drawn], r_mag=jnp.zeros(len(dead)),
        b_dec=weights.b_dec, log_threshold=start_threshold(len(dead), x.shape[1], recipe), W_skip=weights.W_skip,
    )  # fmt: skip
    fresh = Weights(*(None if p is None else f.astype(p.dtype) for f, p in zip(fresh, weights, strict=True)))
    zeros = jax.tree.map(jnp.zeros_like, moments.second)
    per_latent = Weights(dead[None], dead[:, None], dead, dead, dead, None, dead)
    pick = lambda mask, n, o: o if o is None or mask is None else jnp.where(mask, n, o)
    put = lambda new, old: Weights(*map(pick, per_latent, new, old))  # `new` for what belongs to a dead latent
    first = None if moments.first is None else put(zeros, moments.first)
    return put(fresh, weights), Moments(first, put(zeros, moments.second))
