r"""Activation mass: on which role of a prompt a latent is active.

$$\mathrm{mass}_r = \frac{\sum_{t: role(t) = r} f(x_t)}{\sum_{t: role(t) \ne OTHER} f(x_t)}$$

over all tokens of inputs and outputs, not only the last of each word. BOS and padding carry no role and do not count.

Source: ICL-SFC, Tables 1 and 2.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from icl_lib.models import Site, Transformer, record
from icl_lib.saes import SAE
from icl_lib.tasks import Prompts, Role


class RoleMass(eqx.Module):
    """Shares of activation; columns are roles by the value of `Role`, rows the distinct latents in ascending order.

    `total` is the summed activation behind each row; a latent that never fires has NaN shares. `mean` is the average of the
    rows that have any.
    """

    latents: Int[np.ndarray, " n"]
    mass: Float[np.ndarray, "n n_roles"]
    total: Float[np.ndarray, " n"]
    mean: Float[np.ndarray, " n_roles"]


@eqx.filter_jit
def _sums(model, sae, prompts, latents) -> Float[Array, "tasks n_roles"]:
    def task(args):
        tokens, roles, latent = args
        cache: dict[Site, Array] = {}
        model(tokens, tap=record([sae.site_in], cache))
        f = sae.encode(cache[sae.site_in].astype(sae.W_enc.dtype))[:, :, latent]
        indicator = jax.nn.one_hot(roles, len(Role), dtype=jnp.float32)
        return jnp.einsum("bs,bsr->r", f.astype(jnp.float32), indicator).at[Role.OTHER].set(0.0)

    return jax.lax.map(task, (jnp.asarray(prompts.tokens), jnp.asarray(prompts.roles), latents))


def activation_mass(model: Transformer, sae: SAE, prompts: Prompts, latents) -> RoleMass:
    """Mass by role of the latent of each task, `latents` (tasks,), on stacked prompts.

    Activations of tasks that share a latent are added before the shares are taken; the mean is over latents. Raises
    `ValueError` if the numbers of tasks differ, a latent does not exist, or the prompts are not stacked.
    """
    latents = np.asarray(latents, np.int32)
    if prompts.tokens.ndim != 3:
        raise ValueError(
            f"activation_mass takes stacked prompts (task, batch, seq), got tokens of shape {prompts.tokens.shape}: use stack_prompts"
        )
    if latents.shape != prompts.tokens.shape[:1]:
        raise ValueError(
            f"one latent per task is expected, {prompts.tokens.shape[0]} in all, got latents of shape {latents.shape}"
        )
    check_latents(sae, latents)
    sums = np.asarray(_sums(model, sae, prompts, jnp.asarray(latents)))
    distinct, row = np.unique(latents, return_inverse=True)
    added = np.zeros((len(distinct), len(Role)), np.float32)
    np.add.at(added, row, sums)
    total = added.sum(axis=1)
    mass = np.where(total[:, None] > 0, added / np.where(total > 0, total, 1)[:, None], np.nan).astype(np.float32)
    mean = mass[total > 0].mean(axis=0) if (total > 0).any() else np.full(len(Role), np.nan, np.float32)
    return RoleMass(distinct, mass, total, mean)


def check_latents(sae: SAE, latents: Int[np.ndarray, "*n"]) -> None:
    """Raises `ValueError` where a latent number is outside of the dictionary; JAX would clip it silently."""
    wrong = sorted({int(i) for i in latents.ravel() if not 0 <= i < sae.d_sae})
    if wrong:
        raise ValueError(f"latents {wrong[:5]} do not exist: the SAE at {sae.site_in} has latents 0..{sae.d_sae - 1}")
