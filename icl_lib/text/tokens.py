"""Rows of tokens: windows cut from texts, batches of one shape, and which tokens count."""

import math
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def token_mask(tokens: np.ndarray | Array, config) -> np.ndarray | Array:
    """True where a token is neither BOS nor padding: the tokens that SAEs are trained and judged on."""
    real = tokens != config.pad_id
    return real if config.bos_id is None else real & (tokens != config.bos_id)


def check_tokens(tokens: np.ndarray | Array, config) -> None:
    """Raises `ValueError` on a token id that the model does not have; under `jit` it would silently give NaN."""
    low, high = int(np.min(tokens)), int(np.max(tokens))
    if low < 0 or high >= config.d_vocab:
        raise ValueError(
            f"token ids must be in 0..{config.d_vocab - 1}, got {low}..{high}: were they made with another model's tokenizer?"
        )


def batches(tokens: np.ndarray, mask: np.ndarray, batch_size: int) -> Iterator[tuple[Array, np.ndarray]]:
    """Batches of tokens and mask of one shape, so that the model is compiled once; the last is filled up with masked rows."""
    size = min(batch_size, len(tokens))
    for i in range(math.ceil(len(tokens) / size)):
        rows, keep = tokens[i * size : (i + 1) * size], mask[i * size : (i + 1) * size]
        fill = ((0, size - len(rows)), (0, 0))
        yield jnp.asarray(np.pad(rows, fill)), np.pad(keep, fill)


def token_windows(texts: Iterable[str], tokenizer, length: int, bos_id: int) -> Int[np.ndarray, "n length"]:
    """Windows of `length` tokens, each begun with BOS, cut from the texts one after another; the rest is left out.

    Raises `ValueError` if the texts do not fill one window.
    """
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    n = len(ids) // (length - 1)
    if n == 0:
        raise ValueError(
            f"the texts have {len(ids)} tokens, too few for one window of {length}: give more text or shorter windows"
        )
    body = np.asarray(ids[: n * (length - 1)], np.int32).reshape(n, length - 1)
    return np.concatenate([np.full((n, 1), bos_id, np.int32), body], axis=1)
