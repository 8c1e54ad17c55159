"""Rows of tokens: windows cut from texts, batches of one shape, and which tokens count."""

from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def token_mask(tokens: np.ndarray | Array, config) -> np.ndarray | Array:
    """True where a token is neither BOS nor padding: the tokens that SAEs are trained and judged on.

    It knows both by the model's ids, which is right for text. Prompts know better, since a tokenizer may pad with
    another id or begin with none: whatever counts tokens takes a `mask`, and for prompts that is `prompts.real`.
    """
    real = tokens != config.pad_id
    return real if config.bos_id is None else real & (tokens != config.bos_id)


def check_tokens(tokens: np.ndarray | Array, config) -> None:
    """Raises `ValueError` on a token id that the model does not have; under `jit` it would silently give NaN."""
    low, high = int(np.min(tokens)), int(np.max(tokens))
    if low < 0 or high >= config.d_vocab:
        raise ValueError(
            f"token ids must be in 0..{config.d_vocab - 1}, got {low}..{high}: were they made with another model's "
            "tokenizer?"
        )


def batches(
    tokens: np.ndarray | Array, mask: np.ndarray | Array, batch_size: int, width: int | None = None
) -> Iterator[tuple[Array, np.ndarray]]:
    """Batches of tokens and mask of one shape, so that the model is compiled once.

    The last one is filled up with masked rows, and with `width` every row with masked tokens up to so many.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    size = max(1, min(batch_size, len(tokens)))
    for i in range(0, len(tokens), size):
        rows, keep = tokens[i : i + size], mask[i : i + size]
        fill = ((0, size - len(rows)), (0, 0 if width is None else width - rows.shape[1]))
        yield jnp.asarray(np.pad(rows, fill)), np.pad(keep, fill)


def one_bos(tokens: np.ndarray, bos_id: int | None) -> np.ndarray:
    """The tokens of documents that follow a BOS, less every BOS right after another, whoever brought it."""
    if bos_id is None:
        return tokens
    is_bos = tokens == bos_id
    return tokens[~(is_bos & np.append(True, is_bos[:-1])[: len(tokens)])]


def pack(tokens: np.ndarray, seq: int, bos_id: int | None, most: int) -> tuple[Int[np.ndarray, "n seq"], int]:
    """Up to `most` contexts of `seq` tokens, each begun with BOS, and how many of the tokens went into them.

    A BOS of the tokens that falls on the start of a context is left out there.
    """
    front = [] if bos_id is None else [bos_id]
    body, starts, at = seq - len(front), [], 0
    while len(starts) < most:
        at += int(bos_id is not None and at < len(tokens) and tokens[at] == bos_id)
        if at + body > len(tokens):
            break
        starts.append(at)
        at += body
    rows = tokens[np.add.outer(np.asarray(starts, np.int64), np.arange(body))]
    return np.concatenate([np.full((len(rows), len(front)), bos_id or 0), rows], axis=1, dtype=np.int32), at


def token_windows(texts: Iterable[str], tokenizer, length: int, bos_id: int | None) -> Int[np.ndarray, "n length"]:
    """Windows of `length` tokens, each begun with BOS, cut from the texts one after another; the rest is left out.

    Raises `ValueError` if the texts do not fill one window.
    """
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    windows, _ = pack(one_bos(np.asarray(ids, np.int32), bos_id), length, bos_id, len(ids))
    if len(windows) == 0:
        raise ValueError(
            f"the texts have {len(ids)} tokens, too few for one window of {length}: give more text or shorter windows"
        )
    return windows
