"""Tasks: named lists of input-output pairs, embedded, downloaded with their hashes checked, or read from a folder."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pooch

from icl_lib.files.hub import nothing_at, only_here
from icl_lib.files.names import did_you_mean
from icl_lib.files.paths import data_files, resolve
from icl_lib.tasks.tables import Pairs, read_pairs, read_table

REGISTRY = Path(__file__).parent / "registry.tsv"
DATA_VARIABLE = "ICL_LIB_TASK_DATA"
POOLS = ("extraction", "optimisation", "evaluation")

# Pinned commits of the published pairs, and the folder of each below ICL_LIB_TASK_DATA.
URLS = {
    "paper": "https://raw.githubusercontent.com/roeehendel/icl_task_vectors/1da0db608c69662cecc1ee7352b84531c1acc435/data/",
    "function_vectors": (
        "https://raw.githubusercontent.com/ericwtodd/function_vectors/fb9eac7b6dc707ea1475a717379916007fe448d5/dataset_files/"
    ),
}
FOLDERS = {"paper": "icl_task_vectors", "function_vectors": "function_vectors"}

# Embedded tasks: group, then the (table, input column, output column) whose rows are joined.
_TABLES = {
    "country_capital": ("knowledge", [("countries", "country", "capital")]),
    "country_currency": ("knowledge", [("countries", "country", "currency")]),
    "location_continent": ("knowledge", [("countries", "country", "continent"), ("countries", "capital", "continent")]),
    "location_language": ("knowledge", [("countries", "country", "language"), ("countries", "capital", "language")]),
    "location_country": ("knowledge", [("countries", "capital", "country")]),
    "person_profession": ("knowledge", [("people", "person", "profession")]),
    "person_language": ("knowledge", [("people", "person", "language")]),
    "person_country": ("knowledge", [("people", "person", "country")]),
    "antonyms": ("linguistic", [("adjectives", "word", "antonym")]),
    "singular_plural": ("linguistic", [("nouns", "singular", "plural")]),
    "plural_singular": ("linguistic", [("nouns", "plural", "singular")]),
    "present_gerund": ("linguistic", [("verbs", "verb", "gerund")]),
    "present_past": ("linguistic", [("verbs", "verb", "past")]),
    "present_perfect": ("linguistic", [("verbs", "verb", "participle")]),
    "en_es": ("translation", [("nouns", "singular", "spanish"), ("adjectives", "word", "spanish")]),
    "en_fr": ("translation", [("nouns", "singular", "french"), ("adjectives", "word", "french")]),
    "en_it": ("translation", [("nouns", "singular", "italian"), ("adjectives", "word", "italian")]),
    "es_en": ("translation", [("nouns", "spanish", "singular"), ("adjectives", "spanish", "word")]),
    "fr_en": ("translation", [("nouns", "french", "singular"), ("adjectives", "french", "word")]),
    "it_en": ("translation", [("nouns", "italian", "singular"), ("adjectives", "italian", "word")]),
    "es_fr": ("translation", [("nouns", "spanish", "french"), ("adjectives", "spanish", "french")]),
    "fr_it": ("translation", [("nouns", "french", "italian"), ("adjectives", "french", "italian")]),
    "it_es": ("translation", [("nouns", "italian", "spanish"), ("adjectives", "italian", "spanish")]),
    "next_item": ("algorithmic", [("items", "item", "next")]),
    "previous_item": ("algorithmic", [("items", "next", "item")]),
    "item_kind": ("algorithmic", [("items", "item", "kind")]),
    "noun_category": ("knowledge", [("nouns", "singular", "category"), ("nouns", "plural", "category")]),
}


class UnknownTask(KeyError):
    """A task name that is not there; the message names the nearest one that is."""

    def __str__(self) -> str:
        return self.args[0]  # KeyError would print the repr, quotes and all


class Tasks(dict):
    """Tasks by name: a `dict` that says of a name that it lacks which is the nearest (`UnknownTask`)."""

    def __missing__(self, name: str) -> Any:
        near = did_you_mean(name, self, cutoff=0.0)
        raise UnknownTask(f"no task {name!r}: {near}The {len(self)} tasks are {', '.join(self)}")


class TaskDataError(FileNotFoundError):
    """Task files that could not be fetched or found; the message says how to give a local copy."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Input-output pairs with a name, a group ("knowledge", "linguistic", "translation", "algorithmic") and a source.

    Raises `ValueError` if there is no pair, or a pair has an empty side.
    """

    name: str
    pairs: Pairs
    group: str
    source: str

    def __post_init__(self):
        if not self.pairs:
            raise ValueError(f"task {self.name!r} from {self.source} has no pairs")
        for x, y in self.pairs:
            if not x.strip() or not y.strip():
                raise ValueError(f"task {self.name!r} from {self.source} has a pair with an empty side: {(x, y)!r}")

    def pool(self, use: str, *, seed: int = 0) -> Pairs:
        """The pairs for one use: "extraction" (40 %), "optimisation" (30 %) or "evaluation" (30 %) of the inputs.

        The three are disjoint by input string. Inputs are ranked by a hash of the string and the seed, so a pool
        does not change with the order of the file. Raises `ValueError` on another name, or an empty pool.
        """
        if use not in POOLS:
            raise ValueError(f"pools are {', '.join(POOLS)}; got {use!r}")
        inputs = sorted({x for x, _ in self.pairs}, key=lambda x: hashlib.sha256(f"{seed}\n{x}".encode()).digest())
        cuts = [0, round(0.4 * len(inputs)), round(0.7 * len(inputs)), len(inputs)]
        part = POOLS.index(use)
        chosen = set(inputs[cuts[part] : cuts[part + 1]])
        if not chosen:
            raise ValueError(f"the {use} pool of task {self.name!r} is empty: it has only {len(inputs)} inputs")
        return tuple(pair for pair in self.pairs if pair[0] in chosen)

    def shots(self, n: int, n_of_lists: int) -> int:
        """Examples to show in a prompt: `n`, but at most `n_of_lists` if every input is a list of words (algo_first).

        Such pairs are about twice as long as others; the sparse-feature-circuit work shows 16 of them for 31, 8 for 12.
        """
        return min(n, n_of_lists) if all(", " in x for x, _ in self.pairs) else n


def load_tasks(source: str | Path) -> dict[str, Task]:
    """Tasks by name, in order: "embedded", "paper", "function_vectors", or a folder of .json and .tsv files.

    - "embedded": 28 tasks over our own word tables.
    - "paper": 20 files of Hendel et al. (2023), "In-Context Learning Creates Task Vectors", less the header line that
      four translation files carry as their first pair, and the three word-list tasks of the sparse-feature-circuit
      work: 23 tasks.
    - "function_vectors": 53 tasks of Todd et al. (2024), "Function Vectors in Large Language Models".
    - a folder: JSON (an object input -> output, or a list of {"input", "output"}) and TSV (header `input`, `output`),
      named after the file, grouped by its subfolder.

    A pair that a file repeats is read once (product-company.json has 20 such, antonyms.json 12); of a key that a JSON
    object repeats the last output counts; otherwise an input may have several outputs (instruments of a person). A
    warning tells of these in files of a folder; the published files are as they are.

    Published files are downloaded once, their SHA-256 checked. With the environment variable ICL_LIB_TASK_DATA set to a
    folder holding `icl_task_vectors/` or `function_vectors/`, they are read from there instead. Raises `TaskDataError`
    when they cannot be had, `ValueError` on a malformed file, `FileNotFoundError` on an unknown source.
    """
    if source == "embedded":
        return _embedded()
    if source == "paper":
        tasks = _published("paper")
        tasks.update(_word_list_tasks([x for x, _ in tasks["en_es"].pairs]))
        return tasks
    if source == "function_vectors":
        return _published("function_vectors")
    folder = Path(resolve(source)).expanduser()
    if not folder.is_dir():
        names = ("embedded", *URLS)
        wanted = f"{', '.join(map(repr, names))}, or an existing folder of .json and .tsv files"
        if only_here(source, parts=1):
            raise FileNotFoundError(nothing_at(source, wanted))
        raise FileNotFoundError(f"no task source {str(source)!r}: {did_you_mean(source, names)}Give {wanted}")
    files = task_files(folder)
    if not files:
        raise FileNotFoundError(f"folder {folder} holds no .json or .tsv file to read a task from")
    return _from_files(files, folder, source=str(Path(source)))


def task_files(folder: Path) -> list[Path]:
    """The files of a folder that are read as tasks, in order."""
    return data_files(folder, (".json", ".tsv"))


def select_tasks(tasks: Mapping[str, Task], names: Iterable[str]) -> dict[str, Task]:
    """The named tasks, in the order of the names. Raises `UnknownTask` (a `KeyError`) that names the nearest one."""
    tasks = Tasks(tasks)
    return Tasks((name, tasks[name]) for name in names)


def _embedded() -> dict[str, Task]:
    """The 28 tasks over our word tables. Inputs are shared, so that a zero-shot prompt does not tell the task."""
    tables = {table: read_table(table) for table in ("countries", "people", "nouns", "adjectives", "verbs", "items")}
    tasks = {
        name: Task(name, tuple((row[x], row[y]) for table, x, y in parts for row in tables[table]), group, "embedded")
        for name, (group, parts) in _TABLES.items()
    }
    foreign = tuple(
        (row[language.lower()], language)
        for language in ("Spanish", "French", "Italian")
        for row in tables["nouns"] + tables["adjectives"]
    )
    return Tasks(tasks, word_language=Task("word_language", foreign, "knowledge", "embedded"))


def _word_list_tasks(words: list[str], n_pairs: int = 300) -> dict[str, Task]:
    """Pick the last, first or second of four comma-separated words: one random stream over the three tasks.

    The length is drawn although it is always four: the published generator draws it, and the stream must agree.
    """
    rng = Random(0)
    tasks = {}
    for name, position in (("algo_last", -1), ("algo_first", 0), ("algo_second", 1)):
        lists = [rng.sample(words, rng.randint(4, 4)) for _ in range(n_pairs)]
        pairs = {", ".join(chosen): chosen[position] for chosen in lists}
        tasks[name] = Task(name, tuple(pairs.items()), "algorithmic", "paper")
    return tasks


def _published(source: str) -> dict[str, Task]:
    """Tasks of one published collection, from the local copy if ICL_LIB_TASK_DATA is set, else through the cache."""
    hashes = {row["path"]: row["sha256"] for row in read_table(REGISTRY) if row["source"] == source}
    local = os.environ.get(DATA_VARIABLE)
    if local:
        folder = Path(local) / FOLDERS[source]
        files = [folder / path for path in hashes]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise TaskDataError(
                f"{len(missing)} of {len(files)} files of {source!r} are not under {folder}, the first being "
                f"{missing[0]}; {DATA_VARIABLE} must name the folder that holds {FOLDERS[source]}/"
            )
        return _from_files(files, folder, source)
    cache = pooch.create(pooch.os_cache("icl_lib") / FOLDERS[source], URLS[source], registry=hashes)
    try:
        files = [Path(cache.fetch(path)) for path in hashes]
    except OSError as error:
        raise TaskDataError(
            f"the tasks {source!r} could not be downloaded from {URLS[source]} ({type(error).__name__}). Offline, set "
            f"the environment variable {DATA_VARIABLE} to a folder with a copy of them in {FOLDERS[source]}/, or use "
            "load_tasks('embedded')"
        ) from error
    return _from_files(files, Path(cache.path), source)


def _from_files(files: Iterable[Path], folder: Path, source: str) -> dict[str, Task]:
    """One task per file, named after it, grouped by its subfolder. Raises `ValueError` if two files share a name."""
    tasks = Tasks()
    for file in files:
        name = file.stem
        if name in tasks:
            raise ValueError(f"two files in {folder} make a task named {name!r}; {file} is the second: rename it")
        pairs = read_pairs(file, warn=source not in URLS)
        if "_".join(pairs[0] if pairs and source == "paper" else ()) == name:
            pairs = pairs[1:]  # en_fr.json and its like: the header ("en", "fr") of the list that it was made of
        tasks[name] = Task(name, pairs, "/".join(file.relative_to(folder).parts[:-1]), source)
    return tasks
