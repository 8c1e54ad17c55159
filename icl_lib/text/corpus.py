"""Text for training SAEs: documents from a hub or from files, tokenised, packed into contexts, resumable to the token.

A corpus gives contexts of one length, (n, seq) int32, each with BOS in front; documents follow each other with a BOS
between them (a model without BOS: neither). No BOS follows another: not where a context starts between two documents,
nor where a document brings its own. BOS and padding are what `token_mask` leaves out of losses and statistics.
`state_dict` is JSON: a corpus that loads it goes on with the very context that would have come next.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import datasets
import jax
import numpy as np
import pyarrow
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError
from jaxtyping import Int

from icl_lib.files.hub import nothing_at, only_here
from icl_lib.files.names import did_you_mean
from icl_lib.files.paths import data_files, resolve
from icl_lib.text.tokens import one_bos, pack

# extension -> loader of `datasets`, and how it cuts a file into documents
_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "paragraph"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_DOCUMENTS = 64  # tokenised at a time: the tokenizer works on them in parallel
_KNOWN_BY = 8  # first documents that tell one text from another
_SEARCHED = 1000  # documents without text that may stand in front of the first one with text
# What `datasets` raises about files and hubs.
_UNREADABLE = (ValueError, OSError, pyarrow.ArrowException, DatasetsError)

logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # it logs every error that it also raises


class CorpusError(ValueError):
    """Text that cannot be read, has no text column, or is too short."""


class CorpusEnded(CorpusError):
    """All of the text has been given."""


@runtime_checkable
class Corpus(Protocol):
    """Where contexts come from. `describe` is held against a checkpoint's: other data cannot go on with it."""

    seq: int

    def batch(self, n: int) -> Int[np.ndarray, "n seq"]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def describe(self) -> dict[str, Any]: ...


def rewind(corpus: Corpus) -> None:
    """Back to the start: where a `TextCorpus` stood when it was made, another corpus when it was first given here."""
    start = vars(corpus).setdefault("_start", json.dumps(corpus.state_dict()))
    corpus.load_state_dict(json.loads(start))


def open_text(
    source: str | Path, *, subset: str | None = None, split: str = "train", revision: str | None = None
) -> datasets.IterableDataset:
    """A stream of documents: a hub id ("HuggingFaceFW/fineweb"), a file (.txt, .json, .jsonl, .parquet), a folder.

    A paragraph of a .txt file is a document. Only what is read is downloaded. Raises `CorpusError` if nothing is there.
    """
    path = Path(resolve(source)).expanduser()
    if not path.exists():
        if only_here(source, ends=tuple(_LOADERS)):
            raise CorpusError(nothing_at(source, f"a text file or a folder of them ({', '.join(_LOADERS)})"))
        return _from_hub(str(source), subset, split, revision)
    files = [path] if path.is_file() else data_files(path, _LOADERS)
    kinds = sorted({p.suffix for p in files})
    if len(kinds) != 1 or kinds[0] not in _LOADERS:
        found = ", ".join(kinds) or "none"
        raise CorpusError(f"{path} must be, or hold, text files of one kind ({', '.join(_LOADERS)}); found: {found}")
    if not any(p.stat().st_size for p in files):
        raise CorpusError(f"{path} is empty: there is no text to train on")
    loader, options = _LOADERS[kinds[0]]
    names = [str(p) for p in files]
    try:
        stream = datasets.load_dataset(loader, data_files=names, split="train", streaming=True, **options)
    except _UNREADABLE as err:  # the columns are those of the first file; an empty one has none but in parquet
        first = next(p for p in files if p.stat().st_size or p.suffix == ".parquet")
        raise CorpusError(f"{first} cannot be read as {kinds[0]}: {_brief(err)}") from err
    stream.files = names  # for `TextCorpus` to name one of them
    return stream


def _from_hub(name: str, subset: str | None, split: str, revision: str | None) -> datasets.IterableDataset:
    try:
        return datasets.load_dataset(name, name=subset, split=split, revision=revision, streaming=True)
    except (ConnectionError, OSError, ValueError, RuntimeError) as err:
        raise CorpusError(
            f"no text at {name!r}: {did_you_mean(name)}It is no file or folder here, and the hub says: {err}. Without "
            "a network, pass a folder of .txt, .json, .jsonl or .parquet files"
        ) from err


class TextCorpus:
    """Documents of a `datasets` stream as packed contexts, for this process its share of them.

    Documents that are null or empty are left out. Raises `CorpusError` at once if there is no document or no column
    `text_column`; from `batch` if a file or a document cannot be read, and, as `CorpusEnded`, when the text has been
    read `epochs` times.
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
        self._bos = bos_id  # at the front of a context, and between documents
        self.seq, self.text_column, self.epochs, self.name = seq, text_column, epochs, name
        self._tokenizer, self._files = tokenizer, getattr(stream, "files", [])
        self._known_by = {"tokenizer": _tokenizer_hash(tokenizer), "text": _hash(self._first_texts(stream))}
        self._stream = split_dataset_by_node(stream, jax.process_index(), jax.process_count()).repeat(epochs)
        self._documents = self._open()
        self._loaded: dict[str, Any] | None = None  # state of the stream until the first document after it
        self._given = 0
        self._rest = np.zeros(0, np.int32)  # tokens that were read but not yet given
        self._start = json.dumps(self.state_dict())  # for `rewind`

    def batch(self, n: int) -> Int[np.ndarray, "n seq"]:
        """The next `n` contexts. Raises `CorpusEnded` where less text is left."""
        body = self.seq - (self._bos is not None)
        tokens, (rows, used) = self._rest, pack(self._rest, self.seq, self._bos, n)
        while len(rows) < n:
            tokens = self._read_on(tokens, used + (n - len(rows)) * body, n)
            rows, used = pack(tokens, self.seq, self._bos, n)
        self._rest = tokens[used:]
        self._given += n
        return rows

    def _read_on(self, tokens: np.ndarray, need: int, n: int) -> np.ndarray:
        """The tokens and those of the next documents, `need` in all at least. Raises `CorpusEnded`."""
        parts, have = [tokens], len(tokens)
        while have < need:
            more = self._tokens()
            if more is None:
                raise CorpusEnded(
                    f"{self.name} ended after {self._given} contexts of {self.seq} tokens and {have} tokens more, but "
                    f"{n} contexts are needed next (read {self.epochs} time{'s' * (self.epochs != 1)})"
                )
            parts.append(more)
            have += len(more)
        return np.concatenate(parts)

    def state_dict(self) -> dict[str, Any]:
        """Where the next context starts: the stream's own state and the tokens that wait."""
        return {"stream": self._loaded or self._stream.state_dict(), "given": self._given, "rest": self._rest.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._loaded = dict(state["stream"])
        self._stream.load_state_dict(self._loaded)
        self._documents = self._open()
        self._given, self._rest = int(state["given"]), np.asarray(state["rest"], np.int32)

    def describe(self) -> dict[str, Any]:
        """What its contexts depend on, text and tokenizer by hashes; not `epochs`, so that a job may have more."""
        plain = {"corpus": self.name, "seq": self.seq, "text_column": self.text_column, "shards": jax.process_count()}
        return plain | self._known_by

    def _first_texts(self, stream: datasets.IterableDataset) -> list[str]:
        """The first documents that have text; reading them moves nothing but `stream`'s own iterator."""
        found = (text for text in itertools.islice(self._read(stream, self._files), _SEARCHED) if text)
        texts = list(itertools.islice(found, _KNOWN_BY))
        if not texts:
            raise CorpusError(
                f"{self.name} is empty: there is no text in column {self.text_column!r} of its first "
                f"{_SEARCHED} documents"
            )
        return texts

    def _open(self) -> Iterator[str | None]:
        """The documents of this process from where its stream stands."""
        n = jax.process_count()
        return self._read(self._stream, self._files if len(self._files) % n else self._files[jax.process_index() :: n])

    def _read(self, stream: datasets.IterableDataset, files: Sequence[str]) -> Iterator[str | None]:
        """The text of each document of a stream over `files`, None where there is none."""
        documents = iter(stream)
        where = lambda: _file_of(stream.state_dict(), files) or self.name
        while True:
            try:
                document = next(documents)
            except StopIteration:
                return
            except _UNREADABLE as err:
                raise CorpusError(f"{where()} cannot be read: {_brief(err)}") from err
            yield self._text(document, where)

    def _text(self, document: Mapping[str, Any], where: Callable[[], str]) -> str | None:
        column = self.text_column
        if column not in document:
            columns = ", ".join(f"{k} ({type(v).__name__})" for k, v in document.items())
            raise CorpusError(
                f"{where()} has no column of text named {column!r}; its columns are {columns}: pass text_column"
            )
        text = document[column]
        if not isinstance(text, str | None):
            raise CorpusError(
                f"{where()} has a document whose {column!r} is not text but {type(text).__name__}, "
                f"{_brief(repr(text))}: correct it or leave it out, or pass text_column"
            )
        return text

    def _tokens(self) -> np.ndarray | None:
        """Tokens of the next documents, a BOS after each; None where there are no more."""
        texts = list(itertools.islice(self._documents, _DOCUMENTS))
        if not texts:
            return None
        self._loaded = None
        texts = [text for text in texts if text]
        ids = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        after = [] if self._bos is None else [self._bos]
        return one_bos(np.asarray([token for document in ids for token in (*document, *after)], np.int32), self._bos)


def _file_of(state: Any, files: Sequence[str]) -> str | None:
    """Which of the files of a stream is being read, by the stream's state."""
    while isinstance(state, Mapping) and "shard_idx" not in state:
        state = state.get("examples_iterable")
    return files[state["shard_idx"]] if state and state["shard_idx"] < len(files) else None


def _tokenizer_hash(tokenizer) -> str:
    """Of all that decides which tokens a text has. Truncation and padding, which any call may set, are not among it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _hash(tokenizer.get_vocab())
    return _hash(json.loads(backend.to_str()) | {"truncation": None, "padding": None})


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _brief(what: object) -> str:
    """On one line, and not the whole of a document."""
    text = " ".join(str(what).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."
