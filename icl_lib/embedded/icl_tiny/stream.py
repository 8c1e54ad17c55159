"""The embedded language as an endless corpus for the suite job.

The same rows as `language.corpus`, block after block.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from icl_lib.embedded.icl_tiny.language import Language, build_tokenizer, corpus

_BLOCK = 256  # rows generated at a time, from a seed of their own


class LanguageCorpus:
    """A source of contexts like `icl_lib.text.corpus.TextCorpus`.

    Nothing of it need be stored, it is made as it is read.
    """

    def __init__(self, seq: int, *, seed: int = 0):
        self.seq, self.seed = seq, seed
        self._language = Language()
        self._tokenizer = build_tokenizer(self._language)
        self._block, self._row, self._rows = -1, _BLOCK, np.zeros((0, seq), np.int32)

    def batch(self, n: int) -> Int[np.ndarray, "n seq"]:
        """The next `n` rows of this process; processes take the blocks in turn."""
        parts: list[np.ndarray] = []
        while n > 0:
            if self._row >= _BLOCK:
                self._open(self._block + 1, 0)
            parts.append(self._rows[self._row : self._row + n])
            self._row += len(parts[-1])
            n -= len(parts[-1])
        return np.concatenate(parts)

    def state_dict(self) -> dict[str, Any]:
        return {"block": self._block, "row": self._row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["block"] < 0:
            self._block, self._row = -1, _BLOCK
        else:
            self._open(int(state["block"]), int(state["row"]))

    def describe(self) -> dict[str, Any]:
        return {"corpus": "embedded language", "seq": self.seq, "seed": self.seed, "shards": jax.process_count()}

    def _open(self, block: int, row: int) -> None:
        number = block * jax.process_count() + jax.process_index()
        seed = (self.seed + 1 << 32) + number  # far from the small seeds of the corpora for pretraining and testing
        self._rows = corpus(self._language, self._tokenizer, n_rows=_BLOCK, seq=self.seq, seed=seed)
        self._block, self._row = block, row
