r"""Training objectives of SAEs as published, for one SAE and one batch; training.py runs many at once.

Inputs $x$ and targets $y$ (= $x$, or another activation for a transcoder) arrive scaled to a mean norm of $\sqrt d$.
With $p = x W_{enc} + b_{enc}$, $\hat y(f) = f W_{dec} + b_{dec}$ (plus $x W_{skip}^T$ if there is a skip), $w_i = \|W_{dec,i}\|$, means
over the tokens of the batch and $E(f) = \mathrm{mean} \|y - \hat y(f)\|^2$,

- standard: $f = \mathrm{ReLU}(p)$ and $L = E(f) + \lambda\, \mathrm{mean} \sum_i f_i w_i$ (Conerly et al., April 2024);
- gated: $L = E(f) + \lambda\, \mathrm{mean} \sum_i \mathrm{ReLU}(p_i) w_i + E'(\mathrm{ReLU}(p))$, with $f$ as in `SAE` and the decoder of
  $E'$ held constant (Rajamanoharan et al., 2024, "Gated SAEs", Eq. 8);
- jumprelu: $f = p\,1[p > \theta]$ and $L = E(f) + \lambda\, \mathrm{mean} \|f\|_0$, $\theta$ learned by straight-through
  gradients (the same authors, 2024, "Jumping Ahead", Eqs. 9 to 12);
- topk, batchtopk: $f$ is $\mathrm{ReLU}(p)$ where it is among the $k$ largest of a token, or the $nk$ largest of $n$ tokens, and
  $L = \mathrm{FVU}(f) + \alpha\, \mathrm{FVU}_{aux}$, the latter of the error by the `k_aux` largest dead latents of each token (Gao et
  al., 2024, Sec. 2.4; Bussmann et al., 2024). Where more than 4 `k_aux` are dead, that many are drawn anew at each step.

The encoder reads $x$ and not $x - b_{dec}$: the same functions, as $b_{enc}$ is free. It starts at $-\bar x W_{enc}$.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from icl_lib.training.recipes import Recipe
from icl_lib.training.sparse import largest, reconstruct

_EPS = 1e-6


class Params(NamedTuple):
    """Trainable weights of one SAE, those its objective has; a leading axis when several are stacked."""

    W_enc: Float[Array, "*saes d_in d_sae"]  # topk, batchtopk: (d_sae, d_in), since few rows have a gradient
    W_dec: Float[Array, "*saes d_sae d_out"]
    b_enc: Float[Array, "*saes d_sae"]  # of the gate, if there is one
    b_mag: Float[Array, "*saes d_sae"] | None
    r_mag: Float[Array, "*saes d_sae"] | None
    b_dec: Float[Array, "*saes d_out"]
    log_threshold: Float[Array, "*saes d_sae"] | None = None
    W_skip: Float[Array, "*saes d_in d_out"] | None = None


class Stats(NamedTuple):
    """What a batch says about an SAE: L0 per token, FVU about the mean of the batch, how often each latent fired."""

    l0: Float[Array, ""]
    fvu: Float[Array, ""]
    count: Float[Array, " d_sae"]  # tokens on which each latent fired
    least: Float[Array, ""]  # batchtopk: smallest feature that was kept
    err: Array | None = None  # (tokens, d_out) topk, batchtopk: what the reconstruction lacks, for the auxiliary loss


def init(
    x: Float[Array, "tokens d_in"], y: Float[Array, "tokens d_out"], d_sae: int, recipe: Recipe, *, key: PRNGKeyArray
) -> Params:
    r"""Start of training from a sample of (scaled) activations.

    Decoder rows are random directions of norm 1 (`unit_norm`) or 0.1, the encoder is the transpose; $b_{dec}$ is the mean target.
    A transcoder whose input and output widths differ gets an independent encoder of the same norm.
    """
    d_in, d_out = x.shape[1], y.shape[1]
    enc_key, dec_key = jax.random.split(key)
    scale = 1.0 if recipe.unit_norm else 0.1
    W_dec = scale * unit_rows(jax.random.normal(dec_key, (d_sae, d_out)))
    rows = W_dec if d_in == d_out else scale * unit_rows(jax.random.normal(enc_key, (d_sae, d_in)))
    bias = -(rows @ jnp.mean(x, axis=0))
    gated, jump = recipe.objective == "gated", recipe.objective == "jumprelu"
    dtype = jnp.dtype(recipe.dtype)
    return Params(
        W_enc=(rows if recipe.top else rows.T).astype(dtype),
        W_dec=W_dec.astype(dtype),
        b_enc=bias,
        b_mag=bias if gated else None,
        r_mag=jnp.zeros(d_sae) if gated else None,
        b_dec=jnp.mean(y, axis=0),
        log_threshold=start_threshold(d_sae, d_in, recipe) if jump else None,
        W_skip=jnp.zeros((d_in, d_out), dtype) if recipe.skip else None,
    )


def start_threshold(d_sae: int, d_in: int, recipe: Recipe) -> Float[Array, " d_sae"]:
    """Logarithms of jumprelu's thresholds before training, for inputs of mean norm sqrt(d_in)."""
    return jnp.full(d_sae, math.log(recipe.threshold * math.sqrt(d_in)), jnp.float32)


def unit_rows(W: Float[Array, "rows d"]) -> Float[Array, "rows d"]:
    """Each row at norm 1, in float32."""
    W = W.astype(jnp.float32)
    return W / (jnp.linalg.norm(W, axis=1, keepdims=True) + 1e-12)


def target_norm(y: Float[Array, "tokens d_out"]) -> Float[Array, " tokens"]:
    """Norm of each target about the mean of the batch, never 0."""
    return jnp.linalg.norm(y - jnp.mean(y, axis=0, keepdims=True), axis=1) + _EPS


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

    On a CPU XLA's product of two plain matrices is 1.2 to 2.7 times as fast as its product with a transposed first factor. icl-sfc
    keeps `matmul`: with another order of sums the committed suite would not come out again bit for bit.
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
    """The sum over tokens, as a product with ones: on a CPU XLA takes several times as long for its own sum over the first axis.

    With two rows of ones, since XLA takes a single one into a slow loop with the operations before it.
    """
    return jnp.matmul(jnp.ones((2, len(f)), f.dtype), f, precision=jax.lax.Precision.HIGHEST)[0]


@jax.custom_vjp
def add_bias(h: Float[Array, "tokens d"], bias: Float[Array, " d"]) -> Float[Array, "tokens d"]:
    """`h + bias`, with `over_tokens` in the gradient."""
    return h + bias[None]


add_bias.defvjp(lambda h, bias: (add_bias(h, bias), None), lambda _, g: (g, over_tokens(g)))


def loss(
    params: Params,
    x: Float[Array, "tokens d_in"],
    y: Float[Array, "tokens d_out"],
    sparsity: Float[Array, ""],
    recipe: Recipe,
    k_max: int = 0,
    *,
    sparse: bool = False,
) -> tuple[Float[Array, ""], Stats]:
    r"""The loss of `recipe.objective`, but for $\alpha\, \mathrm{FVU}_{aux}$, and the batch's statistics.

    `sparsity` is $\lambda$, or $k$ up to the static `k_max`.
    topk and batchtopk go by pairs of token and latent if `sparse`, else by dense products.
    """
    target = y - params.b_dec[None]
    if params.W_skip is not None:
        target = target - product(x, params.W_skip)
    if recipe.top:
        return _top(params, x, target, y, sparsity, recipe, k_max, sparse)
    h = product(x, params.W_enc)
    pre = add_bias(h, params.b_enc)
    norms = jnp.linalg.norm(params.W_dec.astype(jnp.float32), axis=1)
    open_gate = jax.nn.relu(pre)
    if recipe.objective == "jumprelu":
        theta, width = jnp.exp(params.log_threshold), recipe.bandwidth * math.sqrt(x.shape[1])
        count = over_tokens(step(pre, theta, width))
        f, penalty = jump(pre, theta, width), jnp.sum(count) / len(x)
    else:
        f, penalty = open_gate, jnp.dot(over_tokens(open_gate), norms) / len(x)
    if recipe.objective == "gated":
        f = jnp.where(pre > 0, jax.nn.relu(add_bias(h * jnp.exp(params.r_mag)[None], params.b_mag)), 0)
    err = target - product(f, params.W_dec)
    total = _mean_square(err) + sparsity * penalty
    if recipe.objective == "gated":
        W_dec, frozen = jax.lax.stop_gradient((params.W_dec, target))
        total = total + _mean_square(frozen - product(open_gate, W_dec))
    return total, _stats(count if recipe.objective == "jumprelu" else _count(f), err, y)


def _mean_square(err):
    return jnp.mean(jnp.sum(err**2, axis=1))


def _count(f):
    """On how many tokens each latent is on."""
    return over_tokens((f > 0).astype(jnp.float32))


def _stats(count, err, y) -> Stats:
    fvu = jnp.sum(err**2) / jnp.sum(target_norm(y) ** 2)
    return Stats(jnp.sum(count) / len(y), fvu, count, jnp.float32(jnp.nan))


@jax.custom_vjp
def step(
    pre: Float[Array, "tokens d_sae"], theta: Float[Array, " d_sae"], width: float | Array
) -> Float[Array, "tokens d_sae"]:
    r"""$1[p > \theta]$; to $\theta$ it passes the straight-through gradient $-K((p - \theta) / \epsilon) / \epsilon$.

    $K$ is 1 between -1/2 and 1/2, $\epsilon$ is `width`; nothing passes to $p$.
    """
    return (pre > theta[None]).astype(pre.dtype)


@jax.custom_vjp
def jump(
    pre: Float[Array, "tokens d_sae"], theta: Float[Array, " d_sae"], width: float | Array
) -> Float[Array, "tokens d_sae"]:
    r"""$p\,1[p > \theta]$; to $\theta$ it passes the straight-through gradient $-\theta K((p - \theta) / \epsilon) / \epsilon$."""
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


def _top(params: Params, x, target, y, k, recipe: Recipe, k_max: int, sparse: bool):
    """Loss of topk and batchtopk, without the auxiliary one."""
    whole = recipe.objective == "batchtopk"
    if sparse:
        weights = params.W_enc, params.b_enc, params.W_dec
        fixed = jax.lax.stop_gradient(params)
        pairs = largest(product(x, fixed.W_enc.T) + fixed.b_enc[None], k, k_max, whole)
        err, kept = target - reconstruct(pairs, x, *weights), pairs.value
        count = jnp.zeros(len(params.b_enc)).at[pairs.latent].add((kept > 0).astype(jnp.float32))
    else:
        positive = jax.nn.relu(add_bias(product(x, params.W_enc.T), params.b_enc))
        f = jnp.where(positive >= _least(jax.lax.stop_gradient(positive), k, k_max, whole), positive, 0)
        err, kept, count = target - product(f, params.W_dec), f, _count(f)
    stats = _stats(count, err, y)
    if whole:
        stats = stats._replace(least=jnp.min(jnp.where(kept > 0, kept, jnp.inf)))
    return stats.fvu, stats._replace(err=err)


def _least(f: Float[Array, "tokens d_sae"], k: Float[Array, ""], k_max: int, whole: bool) -> Float[Array, "#tokens 1"]:
    """A number that the k largest of each row reach and no others, or of the `whole` the (tokens x k) largest; ties all do.

    `f` is at least 0, so that its order is that of its bits: bisected between the largest and, since each of `k_max` parts of a row has
    a number of at least that, the least of their maxima. Counts are sums of float32, exact up to 2^24: XLA takes them faster on a CPU
    than those of integers, and bisects several times faster than it sorts.
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


def draw_dead(dead: Array, n: int, *, key: PRNGKeyArray) -> tuple[Array, Array]:
    """`n` latents, the dead among them first and in random order so that stubborn ones do not keep others waiting; which are dead."""
    rank, latents = jax.lax.top_k(jnp.where(dead, jax.random.uniform(key, dead.shape), -1.0), n)
    return latents, rank >= 0


def auxiliary(
    params: Params,
    x: Float[Array, "tokens d_in"],
    err: Float[Array, "tokens d_out"],
    dead: Array,
    recipe: Recipe,
    *,
    key: PRNGKeyArray,
) -> Float[Array, ""]:
    r"""$\alpha\, \mathrm{FVU}_{aux}$ of topk and batchtopk: of the error by the `k_aux` largest of the dead (d_sae,); 0 if there are none."""
    k_aux, n = recipe.k_aux, min(4 * recipe.k_aux, len(dead))
    latents, is_dead = draw_dead(dead, n, key=key)
    f = jax.nn.relu(add_bias(product(x, params.W_enc[latents].T), params.b_enc[latents]))
    f = jnp.where(is_dead[None], f, 0)
    f = jnp.where(f >= _least(jax.lax.stop_gradient(f), jnp.float32(min(k_aux, n)), min(k_aux, n), whole=False), f, 0)
    missing = err - product(f, params.W_dec[latents])
    fvu = jnp.sum(missing**2) / (jnp.sum(target_norm(err) ** 2) + _EPS)
    return recipe.aux * jnp.where(jnp.any(dead), fvu, 0)
