r"""Features with few non-zero entries as a list of pairs (token, latent), for SAEs that keep the largest (topk, batchtopk).

A dense step costs five products of size tokens x d x d_sae. On a CPU, where a row of a matrix is read as fast as it is asked for, only
the first, that of the encoder, has to be done: decoding and all gradients touch one row of W_dec or of W_enc (which is stored latent
by latent) for each pair. On accelerators the dense products are faster, and objectives.py uses them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_CHUNKS = (128, 16)  # the largest of all are looked for among the largest of chunks of this many, then of this many
_BLOCK = 32  # pairs whose inner products are one matrix product


class Pairs(NamedTuple):
    """Features that may be non-zero: their values, at least 0, their tokens and their latents; the order means nothing."""

    value: Float[Array, " n"]
    token: Int[Array, " n"]
    latent: Int[Array, " n"]


def largest(f: Float[Array, "tokens d_sae"], k: Float[Array, ""], k_max: int, whole: bool) -> Pairs:
    """The k largest of each token, or the (tokens x k) largest of the `whole` batch; room for `k_max`, the others have value 0."""
    n_tokens, d_sae = f.shape
    if whole:
        value, place = top_of_all(f, min(n_tokens * k_max, f.size))
        keep = jnp.arange(len(value), dtype=jnp.float32) < jnp.round(k * n_tokens)
        return Pairs(jnp.where(keep, jax.nn.relu(value), 0), place // d_sae, place % d_sae)
    value, latent = jax.lax.top_k(f, k_max)
    value = jnp.where(jnp.arange(k_max, dtype=jnp.float32)[None] < k, jax.nn.relu(value), 0)
    return Pairs(value.ravel(), jnp.repeat(jnp.arange(n_tokens), k_max), latent.ravel())


def top_of_all(f: Float[Array, "tokens d_sae"], n: int) -> tuple[Float[Array, " n"], Int[Array, " n"]]:
    """The n largest entries in falling order and their flat positions, exactly.

    The n chunks with the largest maxima hold the n largest entries, so that no sort has to look at all of them.
    """
    value, place = f.ravel(), jnp.arange(f.size, dtype=jnp.int32)
    for size in _CHUNKS:
        if value.size % size == 0 and value.size // size > n:
            top = jax.lax.top_k(jnp.max(value.reshape(-1, size), axis=1), n)[1]
            value, place = value.reshape(-1, size)[top].ravel(), place.reshape(-1, size)[top].ravel()
    value, top = jax.lax.top_k(value, n)
    return value, place[top]


@jax.custom_vjp
def reconstruct(
    pairs: Pairs,
    x: Float[Array, "tokens d_in"],
    W_enc: Float[Array, "d_sae d_in"],
    b_enc: Float[Array, " d_sae"],
    W_dec: Float[Array, "d_sae d_out"],
) -> Float[Array, "tokens d_out"]:
    """f @ W_dec, where f is relu(x @ W_enc.T + b_enc) at the pairs, whose values are known already, and 0 elsewhere.

    The gradient goes to the three weights, through the pairs alone; x gets none.
    """
    return add_rows((x.shape[0], W_dec.shape[1]), pairs.token, pairs.value, pairs.latent, W_dec)


def _forward(pairs, x, W_enc, b_enc, W_dec):
    return reconstruct(pairs, x, W_enc, b_enc, W_dec), (pairs, x, W_enc, W_dec)


def _backward(saved, g):
    (value, token, latent), x, W_enc, W_dec = saved
    dvalue = jnp.where(value > 0, inner(g, token, W_dec, latent), 0)
    db = jnp.zeros(W_enc.shape[0]).at[latent].add(dvalue)
    dW_enc = add_rows(W_enc.shape, latent, dvalue, token, x).astype(W_enc.dtype)
    return None, None, dW_enc, db, add_rows(W_dec.shape, latent, value, token, g).astype(W_dec.dtype)


reconstruct.defvjp(_forward, _backward)


def add_rows(
    shape: tuple[int, int],
    to: Int[Array, " n"],
    scale: Float[Array, " n"],
    origin: Int[Array, " n"],
    rows: Float[Array, "m d"],
) -> Float[Array, "r d"]:
    """Zeros of `shape`, to whose row `to[p]` is added `scale[p] * rows[origin[p]]` for every p: in place, half the time of a scatter."""

    def add(p, total):
        row = jax.lax.dynamic_slice(rows, (origin[p], 0), (1, rows.shape[1])).astype(jnp.float32)
        old = jax.lax.dynamic_slice(total, (to[p], 0), (1, shape[1]))
        return jax.lax.dynamic_update_slice(total, old + scale[p] * row, (to[p], 0))

    return jax.lax.fori_loop(0, len(to), add, jnp.zeros(shape))


def inner(
    a: Float[Array, "m d"], i: Int[Array, " n"], b: Float[Array, "r d"], j: Int[Array, " n"]
) -> Float[Array, " n"]:
    """Inner products of rows i of a with rows j of b."""
    ones = jnp.ones(a.shape[1])  # a product with ones sums a row faster than XLA's own reduction on a CPU
    fill = -len(i) % _BLOCK
    blocks = [jnp.pad(v, (0, fill)).reshape(-1, _BLOCK) for v in (i, j)]
    return jax.lax.map(lambda ij: (a[ij[0]] * b[ij[1]].astype(jnp.float32)) @ ones, tuple(blocks)).ravel()[: len(i)]
