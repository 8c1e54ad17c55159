"""Plain text by its name in a card: an embedded model's own language, a data set of the hub, or files."""

import contextlib
import dataclasses
import random
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from icl_lib.embedded.catalogue import CATALOGUE, Entry
from icl_lib.files.paths import resolve


@runtime_checkable
class Rows(Protocol):
    """Rows of tokens (n, seq), BOS in front of each. The same call gives the same rows."""

    def held_out(self, n: int) -> Int[np.ndarray, "n seq"]:
        """Rows on which model and SAEs are judged."""

    def training(self, n: int, seed: int) -> Int[np.ndarray, "n seq"]:
        """Rows that SAEs may be trained on: none of those held out."""

    def plain(self, n: int) -> Int[np.ndarray, "m seq"]:
        """Of `n` rows held out, or as many as there are, those that are no prompts."""

    def stretches(self, n: int, seed: int) -> Int[np.ndarray, "m short"]:
        """Text to look at for what latents fire on, without prompts: about `n` rows or more."""


@dataclasses.dataclass(frozen=True)
class LanguageRows:
    """Rows of an embedded model's language, each corpus drawn from a seed of its own."""

    entry: Entry
    tokenizer: Any
    seq: int
    bos_id: int | None

    def held_out(self, n: int) -> Int[np.ndarray, "n seq"]:
        return self.training(n, self.entry.part("retrain").HELD_OUT_SEED)

    def training(self, n: int, seed: int) -> Int[np.ndarray, "n seq"]:
        return self.entry.part("retrain").suite_corpus(self.seq, n, seed)

    def plain(self, n: int) -> Int[np.ndarray, "m seq"]:
        rows = self.held_out(n)
        opening = self.tokenizer("Follow", add_special_tokens=False)["input_ids"][0]  # how the language's prompts begin
        return rows[rows[:, 1] != opening]

    def stretches(self, n: int, seed: int) -> Int[np.ndarray, "m short"]:
        from icl_lib.text.tokens import token_windows

        text = self.entry.part("language").Language().text(random.Random(seed), 10 * n)
        return token_windows([text], self.tokenizer, 32, self.bos_id)


@dataclasses.dataclass(frozen=True)
class TextRows:
    """Rows of a text that is read: the first `kept` are held out, the following ones are for training, whatever the
    seed.
    """

    corpus: Any
    kept: int

    def held_out(self, n: int) -> Int[np.ndarray, "n seq"]:
        return self._after(0, n)

    def training(self, n: int, seed: int) -> Int[np.ndarray, "n seq"]:
        return self._after(self.kept, n)

    def plain(self, n: int) -> Int[np.ndarray, "m seq"]:
        from icl_lib.text.corpus import CorpusEnded

        rows = [self.held_out(1)]
        with contextlib.suppress(CorpusEnded):  # a short text gives what it has
            while len(rows) < n:
                rows.append(self.corpus.batch(1))
        return np.concatenate(rows)

    def stretches(self, n: int, seed: int) -> Int[np.ndarray, "m short"]:
        return self.held_out(n)

    def _after(self, skipped: int, n: int) -> Int[np.ndarray, "n seq"]:
        from icl_lib.text.corpus import rewind

        rewind(self.corpus)
        if skipped:
            self.corpus.batch(skipped)
        return self.corpus.batch(n)


def open_corpus(text: str, tokenizer: Any, seq: int, *, bos_id: int | None, kept: int = 1000) -> Rows:
    """The text that a card names, as rows of `seq` tokens of the tokenizer.

    `text` is the name of an embedded model, whose language is made as it is read, or a hub id, file or folder, of
    whose first `kept` rows none is given out for training. Raises `CorpusError` for a text that cannot be read,
    `ValueError` for the language of another tokenizer.
    """
    if text in CATALOGUE:
        words = CATALOGUE[text].part("language").Language().vocabulary()
        if len(tokenizer) != len(words):
            raise ValueError(
                f"the text {text!r} is in the {len(words)} tokens of that model, and this tokenizer has "
                f"{len(tokenizer)}: name a text for this model, a hub id or a file"
            )
        return LanguageRows(CATALOGUE[text], tokenizer, seq, bos_id)
    from icl_lib.text.corpus import TextCorpus, open_text

    return TextRows(TextCorpus(open_text(resolve(text)), tokenizer, seq, bos_id=bos_id, name=text), kept)


def endless_language(text: str, seq: int, *, seed: int) -> Any:
    """The language of the embedded model that `text` names, as a corpus without end; None for any other text."""
    return CATALOGUE[text].part("stream").LanguageCorpus(seq, seed=seed) if text in CATALOGUE else None
