"""Pairs as they stand in files, tables or JSON, and what is said where a file repeats or contradicts itself."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

Pairs = tuple[tuple[str, str], ...]

WORDS = Path(__file__).parent / "words"
_NAMED = 5  # inputs with several outputs that a warning names


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Rows of a tab-separated UTF-8 file with a header line, as dictionaries; "nouns" is the embedded table of nouns.

    Raises `ValueError` with file, line number and expected columns where a line does not have them, all non-empty,
    or where the header is not `columns`.
    """
    file = WORDS / f"{path}.tsv" if isinstance(path, str) and (WORDS / f"{path}.tsv").is_file() else Path(path)
    header, *lines = file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    names = header.split("\t")
    if columns is not None and names != list(columns):
        raise ValueError(f"{file}, line 1: expected the header {' <tab> '.join(columns)}, got {header!r}")
    rows = []
    for number, line in enumerate(lines, start=2):
        cells = line.split("\t")
        if len(cells) != len(names) or not all(cell.strip() for cell in cells):
            raise ValueError(
                f"{file}, line {number}: expected {len(names)} non-empty columns separated by tabs "
                f"({', '.join(names)}), got {len(cells)}: {line!r}"
            )
        rows.append(dict(zip(names, cells, strict=True)))
    return rows


def read_pairs(file: Path, warn: bool) -> Pairs:
    """The pairs of a task file, each once: of a JSON object every key with its last output, as readers of JSON have it.

    With `warn`, pairs that stand there again and inputs with several outputs are told in a warning.
    """
    if file.suffix == ".json":
        pairs, is_object = _read_json(file)
    else:
        rows = read_table(file, columns=("input", "output"))
        pairs, is_object = tuple((row["input"], row["output"]) for row in rows), False
    once, outputs = dict.fromkeys(pairs), {}
    for x, y in once:
        outputs.setdefault(x, []).append(y)
    several = [f"{x!r} ({', '.join(map(repr, ys))})" for x, ys in outputs.items() if len(ys) > 1]
    told = [f"{len(pairs) - len(once)} of {len(pairs)} pairs repeat another and are left out"] * (
        len(once) < len(pairs)
    )
    if several:
        use = "the last one counts" if is_object else "a prompt shows one of them"
        named = "; ".join(several[:_NAMED]) + "; ..." * (len(several) > _NAMED)
        told.append(f"{len(several)} inputs have several outputs, of which {use}: {named}")
    if told and warn:
        warnings.warn(f"{file}: {', and '.join(told)}", stacklevel=5)
    return tuple(dict(pairs).items() if is_object else once)


def _read_json(file: Path) -> tuple[Pairs, bool]:
    """All pairs of a JSON object input -> output, or of a list of {input, output}, and whether it is an object."""
    wanted = "a JSON object of input strings to output strings, or a list of {'input': str, 'output': str}"
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=tuple)  # repeated keys are seen so
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON, line {error.lineno}: {error.msg}; expected {wanted}") from error
    is_object = isinstance(data, tuple)
    try:
        pairs = data if is_object else tuple((dict(entry)["input"], dict(entry)["output"]) for entry in data)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: expected {wanted}; got {type(data).__name__} with another content") from error
    for pair in pairs:
        if not all(isinstance(side, str) for side in pair):
            raise ValueError(f"{file}: expected {wanted}; got the pair {pair!r}")
    return pairs, is_object
