"""Text for training SAEs: documents from a hub or from files, tokenised, packed into contexts, resumable to the token.

A corpus gives contexts of one length, (n, seq) int32, each with BOS in front; documents follow each other with a BOS between
them (a model without BOS: neither). BOS and padding are what `token_mask` leaves out of losses and statistics. `state_dict` is JSON: a corpus that loads
it goes on with the very context that would have come next.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import datasets
import jax
import numpy as np
from datasets.distributed import split_dataset_by_node
from jaxtyping import Int

# extension -> loader of `datasets`, and how it cuts a file into documents
_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "paragraph"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_DOCUMENTS = 64  # tokenised at a time: the tokenizer works on them in parallel


class CorpusError(ValueError):
    """Text that cannot be read, has no text column, or is too short."""


@runtime_checkable
class Corpus(Protocol):
    """Where contexts come from. `describe` is held against a checkpoint's: data of another kind cannot go on with it."""

    seq: int

    def batch(self, n: int) -> Int[np.ndarray, "n seq"]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def describe(self) -> dict[str, Any]: ...


def open_text(
    source: str | Path, *, subset: str | None = None, split: str = "train", revision: str | None = None
) -> datasets.IterableDataset:
    """A stream of documents: a hub id ("HuggingFaceFW/fineweb"), a file (.txt, .json, .jsonl, .parquet) or a folder of such.

    A paragraph of a .txt file is a document. Nothing is downloaded but what is read. Raises `CorpusError` if nothing is there.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return _from_hub(str(source), subset, split, revision)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _LOADERS)
    kinds = sorted({p.suffix for p in files})
    if len(kinds) != 1 or kinds[0] not in _LOADERS:
        found = ", ".join(kinds) or "none"
        raise CorpusError(f"{path} must be, or hold, text files of one kind ({', '.join(_LOADERS)}); found: {found}")
    if not any(p.stat().st_size for p in files):
        raise CorpusError(f"{path} is empty: there is no text to train on")
    loader, options = _LOADERS[kinds[0]]
    return datasets.load_dataset(loader, data_files=[str(p) for p in files], split="train", streaming=True, **options)


def _from_hub(name: str, subset: str | None, split: str, revision: str | None) -> datasets.IterableDataset:
    try:
        return datasets.load_dataset(name, name=subset, split=split, revision=revision, streaming=True)
    except (ConnectionError, OSError, ValueError, RuntimeError) as err:
        raise CorpusError(
            f"no text at {name!r}: it is no file or folder here, and the hub says: {err}. Without a network, "
            "pass a folder of .txt, .json, .jsonl or .parquet files"
        ) from err


class TextCorpus:
    """Documents of a `datasets` stream as packed contexts, for this process its share of them.

    Raises `CorpusError` at once if there is no document or no column `text_column`, and from `batch` when the text has
    been read `epochs` times.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        tokenizer,
        seq: int,
        *,
        bos_id: int | None,
        text_column: str = "text",
        epochs: int = 1,
        name: str = "text",
    ):
        if seq < 2:
            raise CorpusError(f"a context is BOS and at least one token, got seq = {seq}")
        self._front = [] if bos_id is None else [bos_id]  # of a context, and between documents
        self.seq, self.text_column, self.epochs, self.name = seq, text_column, epochs, name
        self._tokenizer = tokenizer
        self._check_columns(stream)
        self._stream = split_dataset_by_node(stream, jax.process_index(), jax.process_count()).repeat(epochs)
        self._documents = iter(self._stream)
        self._given = 0
        self._rest = np.zeros(0, np.int32)  # tokens that were read but not yet given

    def batch(self, n: int) -> Int[np.ndarray, "n seq"]:
        """The next `n` contexts. Raises `CorpusError` where less text is left."""
        need = n * (self.seq - len(self._front))
        parts, have = [self._rest], len(self._rest)
        while have < need:
            more = self._read()
            if more is None:
                raise CorpusError(
                    f"{self.name} ended after {self._given} contexts of {self.seq} tokens and {have} tokens more, but {n} contexts are "
                    f"needed next (read {self.epochs} time{'s' * (self.epochs != 1)}): give more text, more epochs or fewer steps"
                )
            parts.append(more)
            have += len(more)
        tokens = np.concatenate(parts)
        self._rest = tokens[need:]
        self._given += n
        return np.concatenate([np.tile(np.asarray(self._front, np.int32), (n, 1)), tokens[:need].reshape(n, -1)], axis=1)

    def state_dict(self) -> dict[str, Any]:
        """Where the next context starts: the stream's own state and the tokens that wait."""
        return {"stream": self._stream.state_dict(), "given": self._given, "rest": self._rest.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._stream.load_state_dict(dict(state["stream"]))
        self._documents = iter(self._stream)
        self._given, self._rest = int(state["given"]), np.asarray(state["rest"], np.int32)

    def describe(self) -> dict[str, Any]:
        return {"corpus": self.name, "seq": self.seq, "text_column": self.text_column, "epochs": self.epochs, "shards": jax.process_count()}

    def _check_columns(self, stream: datasets.IterableDataset) -> None:
        try:
            first = next(iter(stream), None)
        except StopIteration:  # a JSON file without a line
            first = None
        if first is None:
            raise CorpusError(f"{self.name} is empty: there is no document to train on")
        if not isinstance(first.get(self.text_column), str):
            columns = ", ".join(f"{k} ({type(v).__name__})" for k, v in first.items())
            raise CorpusError(f"{self.name} has no column of text named {self.text_column!r}; its columns are {columns}: pass text_column")

    def _read(self) -> np.ndarray | None:
        """Tokens of the next documents, a BOS after each; None where there are no more."""
        texts = [d[self.text_column] for d in itertools.islice(self._documents, _DOCUMENTS)]
        if not texts:
            return None
        ids = self._tokenizer([t for t in texts if t], add_special_tokens=False, verbose=False)["input_ids"] if any(texts) else []
        flat = [token for document in ids for token in (*document, *self._front)]
        return np.asarray(flat, np.int32)
