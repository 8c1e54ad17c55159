"""Where a token stands: the rotation of queries and keys by position, and which keys a query sees."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from icl_lib.models.config import ModelConfig


def rotary_frequencies(config: ModelConfig) -> Float[Array, " half"]:
    r"""$\theta^{-2i/n}$ for the pairs i of the n rotating dimensions, in radians a token.

    Llama 3 slows down what turns less than once in `original_n_ctx` / `low_freq_factor` tokens by `factor`, leaves
    alone what turns more than once in `original_n_ctx` / `high_freq_factor`, and blends between the two.
    """
    n = config.rotary_dim or config.d_head
    frequency = config.rope_theta ** (-jnp.arange(n // 2, dtype=jnp.float32) / (n // 2))
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_n_ctx * frequency / (2 * math.pi)  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (keep + (1 - keep) / scaling.factor)


def rotate(
    x: Float[Array, "batch seq heads d_head"], positions: Int[Array, "#batch seq"], frequency: Float[Array, " half"]
) -> Float[Array, "batch seq heads d_head"]:
    r"""Rotary embedding: the pair $(x_i, x_{i + n/2})$ turns by position times frequency (Hugging Face's half split).
    Dimensions beyond the n = 2 half first ones stay as they are."""
    half = frequency.shape[0]
    angle = (positions.astype(jnp.float32)[..., None] * frequency[None, None, :])[:, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def causal_mask(
    seq: int, past: tuple[int, Int[Array, " batch"]] | None, window: int | None = None
) -> Bool[Array, "rows seq keys"]:
    """Where token s sees a key: the valid past and the tokens up to itself, the last `window` of them at most. `past`
    is the width of the prefix axis and how many of its places each row uses. There is one row for all without it."""
    ago = jnp.arange(seq)[:, None] - jnp.arange(seq)[None, :]  # how many tokens the key lies behind the query
    own = (ago >= 0)[None] if window is None else ((ago >= 0) & (ago < window))[None]
    if past is None:
        return own
    n_past, length = past
    place = jnp.arange(n_past)[None, None, :]
    valid = jnp.broadcast_to(place < length[:, None, None], (len(length), seq, n_past))
    if window is not None:
        query = length[:, None, None] + jnp.arange(seq)[None, :, None]
        valid = valid & (query - place < window)
    return jnp.concatenate([valid, jnp.broadcast_to(own, (len(length), seq, seq))], axis=-1)
