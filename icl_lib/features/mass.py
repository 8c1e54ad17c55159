r"""Activation mass: on which group of tokens, such as which role of a prompt, a latent is active.

$$\mathrm{mass}_g = \frac{\sum_{t: group(t) = g} f(x_t)}{\sum_{t: group(t) \ne none} f(x_t)}$$

By default groups are roles, with all tokens of inputs and outputs, not only the last of each word. BOS and padding
carry no role and do not count.

Source: ICL-SFC, Tables 1 and 2.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from icl_lib.circuits import Groups
from icl_lib.models import Site, Transformer, record
from icl_lib.models.batches import check_stacked, map_tasks
from icl_lib.saes import SAE
from icl_lib.tasks import Prompts, Role
from icl_lib.vectors.insert import check_latents


class Mass(eqx.Module):
    """Shares of activation; columns are groups in their order, rows the distinct latents in ascending order.

    `total` is the summed activation behind each row; a latent that never fires has NaN shares. `mean` is the average of
    the rows that have any, NaN if none has.
    """

    latents: Int[np.ndarray, " n"]
    mass: Float[np.ndarray, "n n_groups"]
    total: Float[np.ndarray, " n"]
    mean: Float[np.ndarray, " n_groups"]


@eqx.filter_jit
def _sums(model, sae, tokens, groups, latents) -> Float[Array, "tasks n_groups"]:
    def task(tokens, groups, latent):
        cache: dict[Site, Array] = {}
        model(tokens, tap=record([sae.site_in], cache))
        f = sae.encode(cache[sae.site_in].astype(sae.W_enc.dtype))[:, :, latent]
        return jnp.einsum("bs,bsg->g", f.astype(jnp.float32), groups.indicator())

    return map_tasks(task, tokens, groups, latents, lead=tokens.shape[:1])


def activation_mass(model: Transformer, sae: SAE, prompts: Prompts, latents, groups: Groups | None = None) -> Mass:
    """Mass by group (default: the role of every token) of the latent of each task, `latents` (tasks,), on stacked
    prompts.

    Activations of tasks that share a latent are added before the shares are taken; the mean is over latents. Raises
    `ValueError` if the numbers of tasks differ, a latent does not exist, or the prompts are not stacked or too long.
    """
    n_tasks, latents = check_stacked(prompts, "activation_mass"), np.asarray(latents, np.int32)
    if latents.shape != (n_tasks,):
        raise ValueError(f"one latent per task is expected, {n_tasks} in all, got latents of shape {latents.shape}")
    check_latents(sae, latents)
    if groups is None:
        groups = Groups(jnp.asarray(prompts.roles), ("none", *(role.name for role in list(Role)[1:])))
    sums = np.asarray(_sums(model, sae, jnp.asarray(prompts.tokens), groups, jnp.asarray(latents)))
    distinct, row = np.unique(latents, return_inverse=True)
    added = np.zeros((len(distinct), groups.n), np.float32)
    np.add.at(added, row, sums)
    total = added.sum(axis=1)
    mass = np.where(total[:, None] > 0, added / np.where(total > 0, total, 1)[:, None], np.nan).astype(np.float32)
    mean = mass[total > 0].mean(axis=0) if (total > 0).any() else np.full(groups.n, np.nan, np.float32)
    return Mass(distinct, mass, total, mean)
