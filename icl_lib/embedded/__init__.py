"""The embedded models: what comes with the repository and works without a network."""

from icl_lib.embedded.catalogue import CATALOGUE, Bar, Entry, check_claims, entry
from icl_lib.embedded.text import Rows, endless_language, open_corpus

__all__ = ["CATALOGUE", "Bar", "Entry", "Rows", "check_claims", "endless_language", "entry", "open_corpus"]
