r"""The interface of an objective, and what several have in common.

Each is for one SAE and one batch; steps.py runs many at once. Inputs $x$ and targets $y$ (= $x$, or another activation
for a transcoder) arrive scaled to a mean norm of $\sqrt d$. In the files of this folder $p = x W_{enc} + b_{enc}$,
$\hat y(f) = f W_{dec} + b_{dec}$ (plus $x W_{skip}^T$ if there is a skip), $w_i = \|W_{dec,i}\|$, means are over the
tokens of the batch, and $E(f) = \mathrm{mean} \|y - \hat y(f)\|^2$. The encoder reads $x$ and not $x - b_{dec}$: the
same functions, as $b_{enc}$ is free.
"""

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from icl_lib.training.kernels import over_tokens, product
from icl_lib.training.recipes import Recipe

EPS = 1e-6


class Weights(NamedTuple):
    """Trainable weights of one SAE, those its objective has; a leading axis when several are stacked."""

    W_enc: Float[Array, "*saes d_in d_sae"]  # topk, batchtopk: (d_sae, d_in), since few rows have a gradient
    W_dec: Float[Array, "*saes d_sae d_out"]
    b_enc: Float[Array, "*saes d_sae"]  # of the gate, if there is one
    b_mag: Float[Array, "*saes d_sae"] | None
    r_mag: Float[Array, "*saes d_sae"] | None
    b_dec: Float[Array, "*saes d_out"]
    log_threshold: Float[Array, "*saes d_sae"] | None = None
    W_skip: Float[Array, "*saes d_in d_out"] | None = None


class Batch(NamedTuple):
    """What the loss of one SAE is taken on."""

    x: Float[Array, "tokens d_in"]
    y: Float[Array, "tokens d_out"]
    sparsity: Float[Array, ""]  # lambda as it acts at this step, or k
    dead: Array | None = None  # (d_sae,) bool: the latents to revive; None revives none
    revive: Array | None = None  # () bool, whether any may be dead; None looks at `dead`
    key: PRNGKeyArray | None = None  # draws the dead latents that have their turn
    k_max: int = 0  # static bound of k
    sparse: bool = False  # topk, batchtopk: by pairs of token and latent rather than dense products


class Stats(NamedTuple):
    """What a batch says about an SAE: L0 per token, FVU about the mean of the batch, how often each latent fired."""

    l0: Float[Array, ""]
    fvu: Float[Array, ""]
    count: Float[Array, " d_sae"]  # tokens on which each latent fired
    least: Float[Array, ""]  # batchtopk: smallest feature that was kept
    err: Array | None = None  # (tokens, d_out) topk, batchtopk: what the reconstruction lacks, for the auxiliary loss


class Objective(eqx.Module):
    """What one SAE is trained for. A file of this folder with a final class of this kind is a new objective."""

    name: eqx.AbstractClassVar[str]  # in recipes and cards
    # fields of `Recipe`; a function is of the number of steps and the batch
    published: eqx.AbstractClassVar[Mapping[str, Any]]
    # the fields in `recipes.SPECIAL` that mean something to it; others are refused
    own: eqx.AbstractClassVar[tuple[str, ...]]
    top: ClassVar[bool] = False  # whether sparsity is a number of latents, k, and W_enc lies latent by latent
    # a loss of dead latents on the error
    auxiliary: ClassVar[Callable[[Weights, Batch, Array, Recipe], Array] | None] = None

    def init(
        self, x: Float[Array, "tokens d_in"], y: Float[Array, "tokens d_out"], d_sae: int, recipe: Recipe, *,
        key: PRNGKeyArray,
    ) -> Weights:  # fmt: skip
        r"""Start of training from a sample of (scaled) activations.

        Decoder rows are random directions of norm 1 (`unit_norm`) or 0.1, and the encoder is the transpose. $b_{dec}$
        is the mean target, $b_{enc} = -\bar x W_{enc}$. A transcoder whose widths differ gets an independent encoder of
        the same norm.
        """
        d_in, d_out = x.shape[1], y.shape[1]
        enc_key, dec_key = jax.random.split(key)
        scale = 1.0 if recipe.unit_norm else 0.1
        W_dec = scale * unit_rows(jax.random.normal(dec_key, (d_sae, d_out)))
        rows = W_dec if d_in == d_out else scale * unit_rows(jax.random.normal(enc_key, (d_sae, d_in)))
        dtype = jnp.dtype(recipe.dtype)
        return Weights(
            (rows if self.top else rows.T).astype(dtype), W_dec.astype(dtype), b_enc=-(rows @ jnp.mean(x, axis=0)),
            b_mag=None, r_mag=None, b_dec=jnp.mean(y, axis=0),
            W_skip=jnp.zeros((d_in, d_out), dtype) if recipe.skip else None,
        )  # fmt: skip

    @abc.abstractmethod
    def loss(self, weights: Weights, batch: Batch, recipe: Recipe) -> tuple[Float[Array, ""], Stats]:
        """The loss but for `auxiliary`, and the batch's statistics."""

    @abc.abstractmethod
    def fold(self, weights: Weights, norm_in: Array, norm_out: Array, least: Array, sparsity: float) -> dict[str, Any]:
        """Fields of an `SAE` of raw activations. `least` is the running mean of the smallest feature kept."""

    def gradient(self, weights: Weights, batch: Batch, recipe: Recipe) -> tuple[Float[Array, ""], Stats, Weights]:
        """Loss, statistics and gradients, with those of the auxiliary loss where `batch.revive` is true.

        That branch is around a gradient of its own: inside a loss, the branch not taken would give a gradient of zeros
        to add, and around the whole gradient it would keep that from running beside the rest.
        """
        (loss, stats), grads = jax.value_and_grad(lambda w: self.loss(w, batch, recipe), has_aux=True)(weights)
        if self.auxiliary is not None and recipe.k_aux:

            def add(loss, grads):
                more, slope = jax.value_and_grad(self.auxiliary)(weights, batch, stats.err, recipe)
                return loss + more, jax.tree.map(jnp.add, grads, slope)

            loss, grads = jax.lax.cond(batch.revive, add, lambda *same: same, loss, grads)
        return loss, stats._replace(err=None), grads


def unit_rows(W: Float[Array, "rows d"]) -> Float[Array, "rows d"]:
    """Each row at norm 1, in float32."""
    W = W.astype(jnp.float32)
    return W / (jnp.linalg.norm(W, axis=1, keepdims=True) + 1e-12)


def row_norms(W: Float[Array, "rows d"]) -> Float[Array, " rows"]:
    """Norm of each row, in float32."""
    return jnp.linalg.norm(W.astype(jnp.float32), axis=1)


def target_norm(y: Float[Array, "tokens d_out"]) -> Float[Array, " tokens"]:
    """Norm of each target about the mean of the batch, never 0."""
    return jnp.linalg.norm(y - jnp.mean(y, axis=0, keepdims=True), axis=1) + EPS


def missing(weights: Weights, batch: Batch) -> Float[Array, "tokens d_out"]:
    """What is left for the latents to write: the target less `b_dec` and what the skip matrix gives."""
    target = batch.y - weights.b_dec[None]
    return target if weights.W_skip is None else target - product(batch.x, weights.W_skip)


def mean_square(err: Float[Array, "tokens d_out"]) -> Float[Array, ""]:
    """E: the squared error of a token, mean over tokens."""
    return jnp.mean(jnp.sum(err**2, axis=1))


def statistics(count: Float[Array, " d_sae"], err: Array, y: Array) -> Stats:
    """`Stats` of a batch from how often each latent is on and the error."""
    fvu = jnp.sum(err**2) / jnp.sum(target_norm(y) ** 2)
    return Stats(jnp.sum(count) / len(y), fvu, count, jnp.float32(jnp.nan))


def times_on(f: Float[Array, "tokens d_sae"]) -> Float[Array, " d_sae"]:
    """On how many tokens each latent is on."""
    return over_tokens((f > 0).astype(jnp.float32))


def draw_dead(dead: Array, n: int, *, key: PRNGKeyArray) -> tuple[Array, Array]:
    """`n` latents, the dead first, in random order so that stubborn ones keep none waiting, and which are dead."""
    rank, latents = jax.lax.top_k(jnp.where(dead, jax.random.uniform(key, dead.shape), -1.0), n)
    return latents, rank >= 0


def fold_linear(
    weights: Weights, norm_in: Array, norm_out: Array, *, norms: Array | None = None, gated: bool = False
) -> tuple[dict[str, Any], Float[Array, " d_sae"]]:
    """The fields that all SAEs have, on raw activations, and by what a latent's value grows. Latents end in units of
    the norm that they write; `norms` gives other units. The paths of a gate are left as they are."""
    gain_in = math.sqrt(weights.W_enc.shape[0]) / norm_in
    gain_out = math.sqrt(weights.W_dec.shape[1]) / norm_out
    W_dec = weights.W_dec / gain_out
    norms = jnp.linalg.norm(W_dec, axis=1) + 1e-12 if norms is None else norms / gain_out
    scale = jnp.ones(len(W_dec)) if gated else norms
    fields = {
        "W_enc": weights.W_enc * gain_in * scale[None],
        "b_enc": weights.b_enc * scale,
        "W_dec": W_dec / norms[:, None],
        "b_dec": weights.b_dec / gain_out,
    }
    if weights.W_skip is not None:
        fields["W_skip"] = weights.W_skip * (gain_in / gain_out)
    return fields, norms


def fold_gated(weights: Weights, norm_in: Array, norm_out: Array) -> dict[str, Any]:
    """Fields of a gated SAE: the norms of decoder rows go to the magnitude, and the gate stays."""
    fields, norms = fold_linear(weights, norm_in, norm_out, gated=True)
    magnitude = {"r_mag": weights.r_mag + jnp.log(norms), "b_mag": weights.b_mag * norms}
    return fields | magnitude | {"architecture": "gated"}
