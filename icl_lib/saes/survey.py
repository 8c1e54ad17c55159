"""The health of dictionaries beyond one number each: how often latents fire, how alike they are, which SAEs to keep."""

from collections.abc import Hashable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from icl_lib.files.processes import to_host
from icl_lib.models import Transformer
from icl_lib.models.sites import activations_at
from icl_lib.saes.activations import Mask, Rows, rows_that_count
from icl_lib.saes.sae import SAE
from icl_lib.text.tokens import batches

_BLOCK = 1024  # decoder rows compared with all others at a time


def firing_rates(
    model: Transformer, suite: Mapping[Hashable, SAE], tokens: Rows, mask: Mask | None = None, *, batch_size: int = 32
) -> dict[Hashable, np.ndarray]:
    """Part of the tokens on which each latent fires, (d_sae,) for each SAE; see `rows_that_count` for tokens and mask.
    Activations stay on the device, so that it may be counted on as many tokens as wanted."""
    tokens, mask = rows_that_count(model, tokens, mask)
    fired = [jnp.zeros(sae.d_sae) for sae in suite.values()]
    for rows, keep in batches(tokens, mask, batch_size):
        fired = _count(model, tuple(suite.values()), rows, jnp.asarray(keep), fired)
    return {key: to_host(n) / mask.sum() for key, n in zip(suite, fired, strict=True)}


@eqx.filter_jit
def _count(model, saes: tuple[SAE, ...], tokens: Array, mask: Array, fired: list[Array]) -> list[Array]:
    cache = activations_at(model, tokens, [sae.site_in for sae in saes])
    on = [(sae.encode(cache[sae.site_in]) > 0) & mask[..., None] for sae in saes]
    return [n + jnp.sum(x, axis=(0, 1), dtype=jnp.float32) for n, x in zip(fired, on, strict=True)]


def rate_histogram(rates: np.ndarray, n_bins: int = 50, lowest: float = 1e-6) -> tuple[np.ndarray, np.ndarray, int]:
    """Latents by decades of firing rate: counts (n_bins,), edges (n_bins + 1,) in log10, and how many never fire.

    The first bin also takes those that are rarer than `lowest`; NaN, the rate of nothing, is in none. The usual picture
    (Bricken et al., 2023): a healthy dictionary has one hump, and what lies far below it is "ultralow density".
    """
    rates = np.asarray(rates)
    if n_bins < 1 or not 0 < lowest < 1 or rates.ndim != 1 or ((rates < 0) | (rates > 1)).any():
        got = f"{rates.shape}, {n_bins}, {lowest}"
        raise ValueError(f"rates (d_sae,) from 0 to 1, at least one bin and 0 < lowest < 1 are needed, got {got}")
    alive = rates[rates > 0]
    counts, edges = np.histogram(np.log10(np.maximum(alive, lowest)), bins=np.linspace(np.log10(lowest), 0, n_bins + 1))
    return counts, edges, int((rates == 0).sum())


@jax.jit
def decoder_cosine(W_dec: Float[Array, "d_sae d_out"]) -> Float[Array, " d_sae"]:
    """For each latent the largest cosine between its decoder row and another's: near 1, the two write the same.

    NaN for a row of zeros, which has no direction and is no other row's neighbour, and for a latent without another. A
    block of rows at a time, so that d_sae x d_sae numbers are never held.
    """
    d_sae = W_dec.shape[0]
    W = W_dec.astype(jnp.float32)
    norm = jnp.linalg.norm(W, axis=1, keepdims=True)
    W, none = W / (norm + 1e-12), norm[:, 0] == 0
    n_blocks = -(-d_sae // _BLOCK)
    index = jnp.arange(n_blocks * _BLOCK, dtype=jnp.int32).reshape(n_blocks, -1) % d_sae

    def block(rows):
        own = rows[:, None] == jnp.arange(d_sae, dtype=jnp.int32)[None]
        return jnp.max(jnp.where(own | none[None], -jnp.inf, W[rows] @ W.T), axis=1)

    largest = jax.lax.map(block, index).ravel()[:d_sae]
    return jnp.where(none | jnp.isinf(largest), jnp.nan, largest)


def undominated(*costs: np.ndarray) -> np.ndarray:
    """Which of n candidates no other beats: (n,) booleans. Each of `costs` (L0, FVU) is (n,), lower is better. One
    candidate beats another that is at least as dear in every cost and dearer in one. NaN never lies on the front."""
    points = np.stack([np.asarray(c, np.float64) for c in costs], axis=1)
    no_worse = (points[:, None] <= points[None]).all(axis=2)
    better = (points[:, None] < points[None]).any(axis=2)
    return ~(no_worse & better).any(axis=0) & ~np.isnan(points).any(axis=1)
