r"""Kernels: plain functions of arrays, written as a CPU takes them fastest. The first line of each says what it is.

A CPU reads a row of a matrix as fast as it is asked for. Features with few non-zero entries (topk, batchtopk) are
therefore a list of pairs (token, latent): of the five products of size tokens x d x d_sae of a dense step only the
encoder's has to be done, and decoding and all gradients touch one row of W_dec or of W_enc (which is stored latent by
latent) for each pair. Accelerators take dense products.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PAIRS_FROM = 128  # latents per one kept from which a CPU goes by pairs; dense products are faster below
_CHUNKS = (128, 16)  # the largest of all are looked for among the largest of chunks of this many, then of this many
_BLOCK = 32  # pairs whose inner products are one matrix product


def on_cpu() -> bool:
    """Whether arrays lie on a CPU; steps.py asks it for the order of its work, and the choice of pairs hangs on it."""
    return jax.default_backend() == "cpu"


def by_pairs(d_sae: int, k: int) -> bool:
    """Whether pairs are faster than dense products for k of d_sae latents a token."""
    return on_cpu() and d_sae >= PAIRS_FROM * k


@jax.custom_vjp
def matmul(a: Float[Array, "n m"], W: Float[Array, "m p"]) -> Float[Array, "n p"]:
    """`a @ W` in the dtype of W with sums in float32; so are both products of its gradient."""
    return jnp.matmul(a.astype(W.dtype), W, preferred_element_type=jnp.float32)


def _matmul_forward(a, W):
    return matmul(a, W), (a.astype(W.dtype), W)


def _matmul_backward(saved, g):
    a, W = saved
    g = g.astype(W.dtype)
    return _times(g, W.T), _times(a.T, g).astype(W.dtype)


def _times(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def product(a: Float[Array, "n m"], W: Float[Array, "m p"]) -> Float[Array, "n p"]:
    """`matmul`, but for the order of sums in the gradient of W: the narrower factor is transposed in memory beforehand.

    On a CPU XLA's product of two plain matrices is 1.2 to 2.7 times as fast as its product with a transposed first
    factor. icl-sfc keeps `matmul`: with another order of sums the committed suite would not come out again bit for bit.
    """
    return matmul(a, W)


def _product_backward(saved, g):
    a, W = saved
    g = g.astype(W.dtype)
    written = jax.lax.optimization_barrier  # else XLA takes the transposition into the product
    if a.shape[1] <= g.shape[1]:
        dW = _times(written(a.T), g)
    elif a.shape[0] >= g.shape[1]:
        dW = written(_times(written(g.T), a)).T
    else:  # few tokens: to transpose the result would take what it saves
        dW = _times(a.T, g)
    return _times(g, W.T), dW.astype(W.dtype)


product.defvjp(_matmul_forward, _product_backward)


def over_tokens(f: Float[Array, "tokens d"]) -> Float[Array, " d"]:
    """The sum over tokens. It is a product with ones: on a CPU XLA takes several times as long for its own sum over the
    first axis. With two rows of ones, since XLA takes a single one into a slow loop with the operations before it."""
    return jnp.matmul(jnp.ones((2, len(f)), f.dtype), f, precision=jax.lax.Precision.HIGHEST)[0]


@jax.custom_vjp
def add_bias(h: Float[Array, "tokens d"], bias: Float[Array, " d"]) -> Float[Array, "tokens d"]:
    """`h + bias`, with `over_tokens` in the gradient."""
    return h + bias[None]


add_bias.defvjp(lambda h, bias: (add_bias(h, bias), None), lambda _, g: (g, over_tokens(g)))


def least(f: Float[Array, "tokens d_sae"], k: Float[Array, ""], k_max: int, whole: bool) -> Float[Array, "#tokens 1"]:
    """A number that the k largest of each row reach, or the (tokens x k) largest of the `whole`, and no others.

    All that are equal to the last reach it. `f` is at least 0, so that its order is that of its bits: bisected between
    the largest and, since each of `k_max` parts of a row has a number of at least that, the least of their maxima.
    Counts are sums of float32, exact up to 2^24: XLA takes them faster on a CPU than those of integers, and bisects
    several times faster than it sorts.
    """
    n, axis = (jnp.round(k * f.shape[0]), (0, 1)) if whole else (k, 1)
    number = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)
    bits = lambda number: jax.lax.bitcast_convert_type(number, jnp.int32)
    parts = f[:, : f.shape[1] // k_max * k_max].reshape(f.shape[0], k_max, -1)
    low = bits(jnp.min(jnp.max(parts, axis=2), axis=axis, keepdims=True))
    high = bits(jnp.max(f, axis=axis, keepdims=True)) + 1

    def halve(bounds):
        low, high, reached = bounds
        middle = low + (high - low) // 2
        count = jnp.sum((f >= number(middle)).astype(jnp.float32), axis=axis, keepdims=True)
        enough = count >= n
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle), jnp.where(enough, count, reached)

    unsure = lambda bounds: jnp.any((bounds[1] - bounds[0] > 1) & (bounds[2] != n))
    return number(jax.lax.while_loop(unsure, halve, (low, high, jnp.full(low.shape, -1.0)))[0])


class Pairs(NamedTuple):
    """Features that may be non-zero, in any order: their values, at least 0, their tokens and their latents."""

    value: Float[Array, " n"]
    token: Int[Array, " n"]
    latent: Int[Array, " n"]


def largest(f: Float[Array, "tokens d_sae"], k: Float[Array, ""], k_max: int, whole: bool) -> Pairs:
    """The k largest of each token, or (tokens x k) of the `whole` batch, in room for `k_max`; the others are 0."""
    n_tokens, d_sae = f.shape
    if whole:
        value, place = top_of_all(f, min(n_tokens * k_max, f.size))
        keep = jnp.arange(len(value), dtype=jnp.float32) < jnp.round(k * n_tokens)
        return Pairs(jnp.where(keep, jax.nn.relu(value), 0), place // d_sae, place % d_sae)
    value, latent = jax.lax.top_k(f, k_max)
    value = jnp.where(jnp.arange(k_max, dtype=jnp.float32)[None] < k, jax.nn.relu(value), 0)
    return Pairs(value.ravel(), jnp.repeat(jnp.arange(n_tokens), k_max), latent.ravel())


def top_of_all(f: Float[Array, "tokens d_sae"], n: int) -> tuple[Float[Array, " n"], Int[Array, " n"]]:
    """The n largest entries in falling order and their flat positions, exactly. The n chunks with the largest maxima
    hold the n largest entries, so that no sort has to look at all of them."""
    value, place = f.ravel(), jnp.arange(f.size, dtype=jnp.int32)
    for size in _CHUNKS:
        if value.size % size == 0 and value.size // size > n:
            top = jax.lax.top_k(jnp.max(value.reshape(-1, size), axis=1), n)[1]
            value, place = value.reshape(-1, size)[top].ravel(), place.reshape(-1, size)[top].ravel()
    value, top = jax.lax.top_k(value, n)
    return value, place[top]


@jax.custom_vjp
def reconstruct(
    pairs: Pairs, x: Float[Array, "tokens d_in"], W_enc: Float[Array, "d_sae d_in"], b_enc: Float[Array, " d_sae"],
    W_dec: Float[Array, "d_sae d_out"],
) -> Float[Array, "tokens d_out"]:  # fmt: skip
    """f @ W_dec, where f is relu(x @ W_enc.T + b_enc) at the pairs, whose values are known already, and 0 elsewhere.
    The gradient goes to the three weights, through the pairs alone; x gets none."""
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
    shape: tuple[int, int], to: Int[Array, " n"], scale: Float[Array, " n"], origin: Int[Array, " n"],
    rows: Float[Array, "m d"],
) -> Float[Array, "r d"]:  # fmt: skip
    """Zeros of `shape` plus `scale[p] * rows[origin[p]]` at row `to[p]` for every p; twice as fast as a scatter."""

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
