r"""Add vectors to the residual stream of whole prompts by a tap, or take a latent's direction away at all arrows.

Source: ICL-SFC, App. F.1.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from icl_lib.models import Site, Transformer, run_with_cache
from icl_lib.models.batches import map_tasks
from icl_lib.models.cost import turn
from icl_lib.models.sites import check_sites
from icl_lib.saes import SAE
from icl_lib.tasks import Prompts, Role
from icl_lib.vectors.insert import answers, check_width, latent_directions, positions, target_nll


@eqx.filter_jit
def _steer(model, tokens, site, vector, mask):
    def tap(here, x):
        return jnp.where(mask[..., None], x + vector.astype(x.dtype)[None, None], x) if here == site else x

    return model(tokens, tap=tap)


def steer(
    model: Transformer,
    tokens: Int[Array, "batch seq"],
    site: Site | str,
    vector: Float[Array, " d_model"],
    mask: Bool[Array, "batch seq"],
) -> Float[Array, "batch seq d_vocab"]:
    """Logits with `vector` added to the activation at `site` wherever `mask` is True.

    Raises `ValueError` on a layer that the model does not have.
    """
    (site,) = check_sites(model.config, site)
    return _steer(model, jnp.asarray(tokens), site, vector, jnp.asarray(mask))


@eqx.filter_jit
def _steer_arrows(model, tokens, arrows, answer, vectors, layer: int, chunk: tuple[int, int]):
    """NLL and accuracy (*task, n, b) with each vector added at all arrows."""

    def one_task(tokens, arrows, answer):
        targets, valid, predictor = answer
        _, cache = run_with_cache(model, tokens, [Site("resid_pre", layer)])
        clean = cache[Site("resid_pre", layer)]

        def one(vector):
            steered = jnp.where(arrows[..., None], clean + vector.astype(clean.dtype)[None, None], clean)
            logits = model.run_from(layer, steered)
            right = (jnp.argmax(logits[:, :-1], axis=-1) == tokens[:, 1:]) & arrows[:, :-1]
            accuracy = right.sum(axis=-1).astype(jnp.float32) / arrows[:, :-1].sum(axis=-1).astype(jnp.float32)
            return target_nll(logits, predictor, targets, valid), accuracy

        return jax.lax.map(one, vectors, batch_size=chunk[1])

    return map_tasks(one_task, tokens, arrows, answer, lead=tokens.shape[:-2])


def negative_steering(
    model: Transformer, sae: SAE, prompts: Prompts, layer: int, latents: Int[Array, "*grid"],
    scale: Float[Array, "*grid"] | float, n_first: int = 2,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:  # fmt: skip
    r"""Take a latent away where the task is at work: $-s\,W_{dec}[f]/|W_{dec}[f]|$ at **all** arrows of the prompts.

    Returns the NLL of the query's answer (nats) and the accuracy, the fraction of arrows whose most likely next token
    is the true one; both (*task, *grid, b). Raises `ValueError` as `cut` does, and on an unknown latent or an SAE of
    another width.

    Source: ICL-SFC, App. F.1.
    """
    model.config.check_layer(layer)
    check_width(model, sae)
    positions(prompts, "query_arrow")
    targets, valid, position = answers(prompts, n_first)
    arrows = np.asarray(prompts.mask(Role.ARROW, "last")) & (np.asarray(prompts.pair) >= 0)
    vectors = -latent_directions(sae, latents, scale)
    as_int = lambda x: jnp.asarray(x, jnp.int32)
    answer = (as_int(targets), jnp.asarray(valid), as_int(position - 1))
    flat = vectors.reshape(-1, vectors.shape[-1])
    chunk = turn(model.config, *prompts.tokens.shape[-2:], 1, max(1, len(flat)))
    out = _steer_arrows(model, as_int(prompts.tokens), jnp.asarray(arrows), answer, flat, layer, chunk)
    lead = (*prompts.tokens.shape[:-2], *vectors.shape[:-1])
    return jax.tree.map(lambda x: x.reshape(*lead, x.shape[-1]), out)
