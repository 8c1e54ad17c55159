"""Names of latents: the words on which they fire, found by code."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from icl_lib.features.examples import top_examples
from icl_lib.models import Transformer
from icl_lib.saes import SAE

_WINDOWS = 12  # strongest windows of a latent that are looked at
_LONGEST = 12  # characters of a word in a name


def latent_names(
    model: Transformer,
    sae: SAE,
    tokenizer,
    tokens: Int[np.ndarray, "n_windows s"] | Int[Array, "n_windows s"],
    latents: Sequence[int] | Int[np.ndarray, " n"],
    *,
    valid: Bool[np.ndarray, "n_windows s"] | Bool[Array, "n_windows s"] | None = None,
    n_words: int = 2,
) -> list[str]:
    """A name for each latent: its number and the words on which it fires most, `"423 Spanish, French"`.

    The words are the tokens at the peaks of its strongest windows of `tokens`, by falling activation. A latent that
    fires on one token only, as executors do on the arrow, is told apart by what it writes: the tokens whose logits its
    decoder row raises most, read through the final norm and the unembedding, `"240 -> : perro, gato"`. One that never
    fires is called `"17 (silent)"`. Tokens where `valid` is false do not count; errors are those of `top_examples`.
    """
    latents = np.asarray(latents)
    if not latents.size:
        return []
    found = top_examples(model, sae, tokens, latents, k=min(_WINDOWS, len(tokens)), valid=valid)
    peaks = np.take_along_axis(found.tokens, found.activation.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    rows = sae.W_dec[jnp.asarray(latents)].astype(jnp.float32)
    matrix = model.embed if model.unembed is None else model.unembed
    written = np.asarray(jnp.argsort(-(model.norm(rows) @ matrix.astype(jnp.float32).T), axis=-1)[:, :n_words])
    text = lambda token: tokenizer.decode([int(token)])
    word = lambda token: text(token).strip()[:_LONGEST] or text(token).replace("\n", "↵").replace(" ", "␣")
    names = []
    for latent, tops, peak, writes in zip(latents, peaks, found.peak, written, strict=True):
        fires = list(dict.fromkeys(word(token) for token in tops[peak > 0]))
        writes = ", ".join(map(word, writes)) if len(fires) == 1 else ""
        words = ", ".join(fires[:n_words]) or "(silent)"
        names.append(f"{latent} {words}" + (f" : {writes}" if writes else ""))
    return names
