r"""icl-sfc: the objective and the start of the paper's own gated SAEs.

With $h = x W_{enc}$, gate pre-activation $\pi = h + b_{gate}$ and target $y$ (= $x$, or another activation for a
transcoder)

$$ f = 1[\pi > 0]\,\mathrm{ReLU}(h e^{r} + b_{mag}), \qquad
   R(\hat y) = \mathrm{mean}_{tokens} \frac{\|\hat y - y\|^2}{\|y - \bar y\|}, $$
$$ L = R(f W_{dec} + b_{dec}) + 2 \lambda\, \mathrm{mean}_{tokens} \sum_i \mathrm{ReLU}(\pi_i)\,\|W_{dec,i}\|
     + R(\mathrm{ReLU}(\pi) W_{dec} + b_{dec}) + \tfrac14 L_{ghost}. $$

$\bar y$ is the mean of the batch. The norm of a decoder row is free, since the penalty weighs by it, and the decoder is
not held constant in the gate's reconstruction. Inputs and targets arrive scaled to a mean norm of $\sqrt d$.

Source: Kharlapenko et al. (2025), App. B, and their trainer, whose values `make_recipe("icl-sfc")` gives. Their $R$ is
a mean over the d components of the target, with a $\lambda$ d times smaller, and their loss is that times 100:
`loss_scale` s multiplies L by s / d, which matters for clipping alone, as Adam does not see it. What differs:

- the magnitude's scale is $e^r$ (Gated SAEs, Eq. 7), theirs $\mathrm{softplus}(r)$: the same functions, other steps;
- a latent that fires on less than 5 in a million tokens is dead as one is that has not fired for 2,000 steps
  (`dead_rate`). The rate is a running mean over 2,000 steps here, theirs that of the last 2,000;
- ghost gradients see a part of the batch and of the dead latents at a time, in turns;
- they replace a NaN in an update by 0. We stop with the step and the site, since what gave one gives more;
- for runs of some thousand steps `recipes.SHORT_RUN` takes `centred_start`, a `period` of the run's own length (theirs,
  of 100,000 steps or more, would leave the learning rate as it is), no `loss_scale` and no `dead_rate`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from icl_lib.training.kernels import matmul
from icl_lib.training.objectives import base

GHOST_COEFFICIENT = 0.25
# Ghost gradients look at this part of batch and dictionary, in turns: cheap, and no dead latent is left out.
GHOST_BATCH, GHOST_LATENTS = 4, 8


class IclSfc(base.Objective):
    """The gated SAEs of Kharlapenko et al., by `matmul`: by `product` the committed suite would have other bits."""

    name = "icl-sfc"
    # Kharlapenko et al. (2025), App. B (learning rate, betas), and their trainer; what is left out is above
    published = dict(
        learning_rate=1e-3, beta1=0.0, beta2=0.99, warmup=128, decay="cosine", norm_decay=0.99, dead_after=2000,
        dead_rate=5e-6, period=lambda steps, batch: max(100_000, 2 * steps), loss_scale=100.0,
    )  # fmt: skip
    own = ("resample_every", "centred_start", "loss_scale")

    def init(self, x, y, d_sae, recipe, *, key):
        r"""As published: orthogonal encoder, its transpose with rows of norm 1 as decoder, biases 0, scale softplus(0).

        With `centred_start` no latent is born dead: encoder columns have norm 1 too, $b_{dec}$ is the mean target, and
        gate and magnitude biases are $-\bar x W_{enc}$, so that every latent fires on about half of the tokens at
        first. A transcoder between widths gets an independent orthogonal decoder. Matrices are in `recipe.dtype`.
        """
        d_in, d_out, dtype = x.shape[1], y.shape[1], jnp.dtype(recipe.dtype)
        enc_key, dec_key = jax.random.split(key)
        W_enc = _orthogonal(enc_key, d_in, d_sae)
        columns = _unit_columns(W_enc)
        W_dec = columns.T if d_in == d_out else _unit_columns(_orthogonal(dec_key, d_out, d_sae)).T
        if not recipe.centred_start:
            zeros, scale = jnp.zeros(d_sae), jnp.full(d_sae, math.log(math.log(2)))
            return base.Weights(W_enc.astype(dtype), W_dec.astype(dtype), zeros, zeros, scale, jnp.zeros(d_out))
        bias = -(jnp.mean(x, axis=0) @ columns)
        # a dense start overshoots by the number of latents in the same direction, d_sae / d / 2 when half of them fire
        W_dec = W_dec * min(1.0, d_out / d_sae)
        scale, b_dec = jnp.zeros(d_sae), jnp.mean(y, axis=0)
        return base.Weights(columns.astype(dtype), W_dec.astype(dtype), bias, bias, scale, b_dec)

    def loss(self, weights, batch, recipe):
        r"""The loss $L$ above, times `loss_scale` / d_out if that is given. `batch.dead` turns ghost gradients on."""
        x, y, dead = batch.x, batch.y, batch.dead
        h = matmul(x, weights.W_enc)  # computed once: gate and magnitude share it
        pi = h + weights.b_enc[None]
        open_gate = jax.nn.relu(pi)
        f = jnp.where(pi > 0, jax.nn.relu(h * jnp.exp(weights.r_mag)[None] + weights.b_mag[None]), 0)
        scale = base.target_norm(y)
        target = y - weights.b_dec[None]
        err = target - matmul(f, weights.W_dec)
        gate_err = target - matmul(open_gate, weights.W_dec)
        reconstruction = jnp.mean(jnp.sum(err**2, axis=1) / scale)
        gate_reconstruction = jnp.mean(jnp.sum(gate_err**2, axis=1) / scale)
        penalty = 2 * batch.sparsity * jnp.dot(jnp.mean(open_gate, axis=0), base.row_norms(weights.W_dec))
        total = reconstruction + penalty + gate_reconstruction
        if dead is not None:
            revive = jnp.any(dead) if batch.revive is None else batch.revive
            total = total + _ghost(weights, x, err, scale, dead, revive, batch.key)
        total = total * (recipe.loss_scale / y.shape[1]) if recipe.loss_scale else total
        count = jnp.sum((f > 0).astype(jnp.float32), axis=0)
        fvu = jnp.sum(err**2) / jnp.sum(scale**2)
        return total, base.Stats(jnp.sum(count) / len(x), fvu, count, jnp.float32(jnp.nan))

    def fold(self, weights, norm_in, norm_out, least, sparsity):
        return base.fold_gated(weights, norm_in, norm_out)


def _orthogonal(key, d: int, d_sae: int) -> Float[Array, "d d_sae"]:
    return jax.nn.initializers.orthogonal()(key, (d, d_sae))


def _unit_columns(W: Float[Array, "d d_sae"]) -> Float[Array, "d d_sae"]:
    return W / jnp.linalg.norm(W, axis=0, keepdims=True)


def _ghost(weights, x, err, scale, dead, revive, key):
    """Ghost loss of a part of the dead latents on a part of the batch, skipped by `cond` where `revive` is false."""
    n = math.ceil(x.shape[0] / GHOST_BATCH)
    err = jax.lax.stop_gradient(err[:n])
    latents, is_dead = base.draw_dead(dead, math.ceil(dead.shape[0] / GHOST_LATENTS), key=key)
    fraction = jnp.mean(dead.astype(jnp.float32))
    ghost = lambda p: GHOST_COEFFICIENT * fraction * ghost_loss(p, x[:n], err, scale[:n], latents, is_dead)
    return jax.lax.cond(revive, ghost, lambda p: jnp.zeros(()), weights)


def ghost_loss(
    weights: base.Weights, x: Float[Array, "tokens d_in"], err: Float[Array, "tokens d_out"],
    scale: Float[Array, " tokens"], latents: Int[Array, " k"], dead: Array,
) -> Float[Array, ""]:  # fmt: skip
    r"""How well dead latents would explain the error of the living ones.

    $g = \mathrm{softplus}(\pi) W_{dec}$ over the dead among `latents`, rescaled per token to half of the error's norm,
    is compared with the error; the loss is scaled to the size of the reconstruction loss. Neither scale carries a
    gradient. Source: Jermyn and Templeton, "Ghost grads", Transformer Circuits updates (January 2024); softplus for exp
    as in ICL-SFC.
    """
    pi = matmul(x, weights.W_enc[:, latents]) + weights.b_enc[latents][None]
    g = matmul(jnp.where(dead[None], jax.nn.softplus(pi), 0), weights.W_dec[latents])
    norm = jnp.linalg.norm(jax.lax.stop_gradient(g), axis=1, keepdims=True)
    half = jnp.linalg.norm(err, axis=1, keepdims=True) / (2 * norm + base.EPS)
    ghost = jnp.mean(jnp.sum((g * half - err) ** 2, axis=1) / scale)
    reconstruction = jnp.mean(jnp.sum(err**2, axis=1) / scale)
    return ghost * jax.lax.stop_gradient(reconstruction / (ghost + base.EPS))
