"""Maximally activating examples: the windows of a text in which a latent fires most, all latents in one pass.

Source: ICL-SFC, Fig. 4.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from icl_lib.models import Site, Transformer, record
from icl_lib.saes import SAE
from icl_lib.vectors.insert import check_latents


class Examples(eqx.Module):
    """The k windows with the largest activation of each latent, strongest first.

    `window` is the row in the corpus. Where fewer than k windows activate a latent the rest have activation 0.
    """

    latents: Int[np.ndarray, " n"]
    window: Int[np.ndarray, "n k"]
    tokens: Int[np.ndarray, "n k s"]
    activation: Float[np.ndarray, "n k s"]

    @property
    def peak(self) -> Float[np.ndarray, "n k"]:
        """Largest activation in each window."""
        return self.activation.max(axis=-1)


@eqx.filter_jit
def _scan(model, sae, latents, batches, valid, k: int):
    """Running top k over batches (n_batches, b, s): window numbers (n, k) and activations (n, k, s)."""
    n_batches, b, s = batches.shape

    def step(carry, batch):
        tokens, valid, start = batch
        cache: dict[Site, Array] = {}
        model(tokens, tap=record([sae.site_in], cache))
        f = sae.encode(cache[sae.site_in].astype(sae.W_enc.dtype))[:, :, latents].astype(jnp.float32)
        f = jnp.where(valid[:, :, None], f, 0.0).transpose(2, 0, 1)
        number = jnp.broadcast_to((start + jnp.arange(b, dtype=jnp.int32))[None], (len(latents), b))
        # A window that only fills the last batch up must lose against any real one.
        peak = jnp.where(valid.any(axis=1)[None], f.max(axis=-1), -0.5)
        peaks, numbers, rows = (jnp.concatenate(pair, axis=1) for pair in zip(carry, (peak, number, f), strict=True))
        best, place = jax.lax.top_k(peaks, k)
        return (
            best,
            jnp.take_along_axis(numbers, place, axis=1),
            jnp.take_along_axis(rows, place[:, :, None], axis=1),
        ), None

    n = len(latents)
    empty = (jnp.full((n, k), -1.0), jnp.zeros((n, k), jnp.int32), jnp.zeros((n, k, s)))
    starts = jnp.arange(n_batches, dtype=jnp.int32) * b
    (_, number, activation), _ = jax.lax.scan(step, empty, (batches, valid, starts))
    return number, activation


def top_examples(
    model: Transformer,
    sae: SAE,
    tokens: Int[np.ndarray, "n_windows s"] | Int[Array, "n_windows s"],
    latents: Sequence[int] | Int[np.ndarray, " n"],
    *,
    k: int = 10,
    batch: int = 32,
    valid: Bool[np.ndarray, "n_windows s"] | Bool[Array, "n_windows s"] | None = None,
) -> Examples:
    """The k windows that activate each latent most; all latents in one compiled pass over the corpus.

    Tokens where `valid` is false count as inactive; by default those are BOS and padding by their ids; give
    `prompts.real` for prompts. Raises `ValueError` if a latent does not exist, the corpus has fewer than k windows, or
    these are longer than the model's context.
    """
    latents, tokens = np.asarray(latents, np.int32), np.asarray(tokens, np.int32)
    check_latents(sae, latents)
    if len(tokens) < k:
        raise ValueError(
            f"the corpus has {len(tokens)} windows, fewer than the {k} examples asked for: give more text or a "
            "smaller k"
        )
    if valid is None:
        valid = (tokens != model.config.bos_id) & (tokens != model.config.pad_id)
    fill = -len(tokens) % batch
    batches = np.pad(tokens, ((0, fill), (0, 0)), constant_values=model.config.pad_id).reshape(
        -1, batch, tokens.shape[1]
    )
    mask = np.pad(valid, ((0, fill), (0, 0))).reshape(batches.shape)
    number, activation = _scan(model, sae, jnp.asarray(latents), jnp.asarray(batches), jnp.asarray(mask), k)
    number = np.asarray(number)
    return Examples(latents, number, tokens[number], np.asarray(activation))
