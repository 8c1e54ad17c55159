"""Text as tokens: documents packed into contexts, windows, and which of their tokens count."""

from icl_lib.text.corpus import Corpus, CorpusEnded, CorpusError, TextCorpus, open_text, rewind
from icl_lib.text.tokens import check_tokens, token_mask, token_windows

__all__ = [
    "Corpus", "CorpusEnded", "CorpusError", "TextCorpus", "check_tokens", "open_text", "rewind", "token_mask",
    "token_windows",
]  # fmt: skip
