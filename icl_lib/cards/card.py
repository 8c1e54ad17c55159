"""Experiment cards: one flat YAML file per run, held to what the notebooks declare.

A notebook declares the keys it uses in the cell tagged `parameters`, one `name: type = default  # meaning` a line. A card may
set any declared key. `check_card` reports every key no notebook declares (with the nearest valid name), every wrong type
and every impossible value before anything is loaded.

    python -m icl_lib.commands.check params/tiny.yaml
"""

import ast
import difflib
import json
import math
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml

from icl_lib.files.paths import resolve, root

REQUIRED = ("run_dir",)  # without it a card would write over the results of another one
_SCALARS = {"int": int, "float": float, "str": str, "bool": bool}
_MAY_BE_ZERO = (
    "layer",
    "seed",
    "shots",
)  # a layer index, a seed or a number of shots counts from 0; sizes count from 1
_CHOICES = {"sae_variant": ("", "paper")}
_MAY_BE_EMPTY = ("sweep_", "latent_scales")  # no values, no sweep; any other list needs a value
LOCAL = ("assets/", "runs/", "params/", "data/", "./", "../", "/", "~")  # a hub id never starts like this


class CardError(ValueError):
    """A card, or a notebook's parameters cell, that cannot be run; the message lists every problem found."""


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell, and the notebooks that declare it."""

    name: str
    annotation: str
    default: Any
    help: str
    notebooks: tuple[str, ...]

    @property
    def type(self) -> Any:
        """The Python type behind the annotation."""
        return _type(ast.parse(self.annotation, mode="eval").body)


def _type(node: ast.expr) -> Any:
    """A type from an annotation's syntax tree; nothing of the notebook is executed. papermill cannot read `str | None`."""
    match node:
        case ast.Name(id=name) if name in _SCALARS:
            return _SCALARS[name]
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return list[_type(inner)]
    raise CardError(f"annotation `{ast.unparse(node)}` is not one of {', '.join(_SCALARS)} or list[...]")


def notebook_files(folder: Path | None = None) -> list[Path]:
    """The numbered notebooks, in order."""
    return sorted((folder or root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def declared(notebook: Path) -> dict[str, Parameter]:
    """The parameters one notebook declares.

    Raises `CardError` for a notebook that is not readable, and for a line that papermill would not understand.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError) as err:
        raise CardError(
            f"{notebook} is not a readable notebook ({err}); make it again: jupytext --update --to ipynb its .py"
        ) from err
    tagged = [c for c in cells if c["cell_type"] == "code" and "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) > 1:
        raise CardError(f"{notebook} has {len(tagged)} cells tagged `parameters`; papermill uses one")
    source = "".join(tagged[0]["source"]) if tagged else ""
    return {p.name: p for p in _parse(source, notebook)}


def _parse(source: str, notebook: Path) -> Iterable[Parameter]:
    """Parameters from the source of a cell."""
    comments = _comments(source)
    try:
        for node in ast.parse(source).body:
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value):
                raise ValueError(f"line {node.lineno} is not an annotated assignment")
            _type(node.annotation)
            value = ast.literal_eval(node.value)
            help_ = comments.get(node.lineno, "")
            yield Parameter(node.target.id, ast.unparse(node.annotation), value, help_, (notebook.stem,))
    except (ValueError, SyntaxError) as err:
        raise CardError(
            f"{notebook}: parameters cell: {err}; write `name: type = literal  # meaning`, one a line"
        ) from err


def _comments(source: str) -> dict[int, str]:
    """Line number -> text of the comment on it."""
    lines = iter(source.splitlines(keepends=True))
    try:
        tokens = list(tokenize.generate_tokens(lambda: next(lines, "")))
    except (tokenize.TokenError, SyntaxError):
        return {}  # ast reports the same fault with its line
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def all_declared(notebooks: Iterable[Path] | None = None) -> dict[str, Parameter]:
    """The parameters of all notebooks together. Raises `CardError` when two of them give one key different types."""
    merged: dict[str, Parameter] = {}
    for notebook in notebook_files() if notebooks is None else notebooks:
        for p in declared(notebook).values():
            first = merged.get(p.name, p)
            if first.annotation != p.annotation:
                raise CardError(
                    f"`{p.name}` is {first.annotation} in {first.notebooks[0]} and {p.annotation} in {notebook.stem}; agree on one"
                )
            names = tuple(dict.fromkeys(first.notebooks + p.notebooks))
            merged[p.name] = Parameter(first.name, first.annotation, first.default, first.help or p.help, names)
    if not merged:
        raise CardError("no notebook with a parameters cell was found in notebooks/")
    return merged


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice, of which plain YAML silently keeps the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        twice = sorted({str(k) for k in keys if keys.count(k) > 1})
        if twice:
            raise CardError(f"{', '.join(twice)} is set more than once; keep one line")
        return super().construct_mapping(node, deep)


def read_card(path: str | Path) -> dict[str, Any]:
    """The keys and values of a card file, unchecked. Raises `CardError` if it is not one flat mapping."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise CardError(
            f"no card at {path}; cards in this repository: {', '.join(sorted(p.name for p in (root() / 'params').glob('*.yaml')))}"
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except CardError as err:
        raise CardError(f"{path}: {err}") from None
    except yaml.YAMLError as err:
        raise CardError(f"{path} is not YAML: {err}") from err
    if not isinstance(values, dict) or any(not isinstance(k, str) for k in values):
        raise CardError(f"{path} must hold lines `key: value`, got {type(values).__name__}")
    return values


def check_card(path: str | Path, notebooks: Iterable[Path] | None = None) -> dict[str, Any]:
    """The checked values of a card. Raises `CardError` listing everything wrong with it."""
    values = read_card(path)
    return check_values(values, all_declared(notebooks), str(path))


def check_values(values: Mapping[str, Any], known: Mapping[str, Parameter], source: str) -> dict[str, Any]:
    """`values` in their declared types. Raises `CardError` listing unknown keys, wrong types and impossible values."""
    problems = [
        f"`{k}` is missing: every card says where its results go, for example runs/{Path(source).stem}"
        for k in REQUIRED
        if k not in values
    ]
    checked = {}
    for key, value in values.items():
        if key not in known:
            problems.append(_unknown(key, known))
            continue
        try:
            checked[key] = _validated(known[key], value)
        except ValueError as err:
            problems.append(f"`{key}`: {err}")
    if problems:
        raise CardError(f"{source}:\n" + "\n".join(f"  - {p}" for p in problems))
    return checked


def _unknown(key: str, known: Mapping[str, Parameter]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"no notebook declares `{key}`; {hint}"


def _validated(p: Parameter, value: Any) -> Any:
    """`value` in the type of `p`, or a `ValueError` in plain words. One text may stand for a list of one."""
    if p.type == list[str] and isinstance(value, str):
        value = [value]
    try:
        value = pydantic.TypeAdapter(p.type).validate_python(value, strict=True)
    except pydantic.ValidationError:
        raise ValueError(
            f"expected {p.annotation} ({p.help or 'see its notebook'}), got {value!r}{_yaml_hint(value)}"
        ) from None
    if isinstance(value, list):
        if not value and not p.name.startswith(_MAY_BE_EMPTY):
            raise ValueError(f"the list is empty; give at least one value, the default is {p.default!r}")
        if any(value.count(v) > 1 for v in value):
            raise ValueError(f"{value!r} holds a value twice")
    for v in value if isinstance(value, list) else [value]:
        _possible(p, v)
    return value


def _yaml_hint(value: Any) -> str:
    """Why a number in the file may have arrived as text: YAML 1.1 wants a point before, and a sign after, the `e`."""
    for v in value if isinstance(value, list) else [value]:
        if isinstance(v, str) and _is_number(v):
            mantissa, _, exponent = v.lower().partition("e")
            sign = "" if exponent[:1] in ("", "+", "-") else "+"
            better = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}{exponent}" if exponent else mantissa
            return f"; YAML reads {v} as text, write {better} without quotes"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _possible(p: Parameter, v: Any) -> None:
    """Raise `ValueError` for a value no run can have: negative sizes, infinite rates, files that are not there."""
    if isinstance(v, str):
        if not v.strip() and p.default != "":
            raise ValueError("is empty")
        if v not in _CHOICES.get(p.name, (v,)):
            raise ValueError(f"{v!r} is none of {', '.join(map(repr, _CHOICES[p.name]))}")
        # SAEs below runs/ are made by the run itself, and a pattern names many files: both are looked for when they are loaded
        later = p.name == "saes" and (v.startswith("runs/") or "{" in v)
        if (
            p.name in ("model", "saes", "tasks", "text")
            and v.startswith(LOCAL)
            and not later
            and not Path(resolve(v)).exists()
        ):
            raise ValueError(f"{v} does not exist (looked for {resolve(v)}); give a folder or a hub id")
    elif isinstance(v, float) and not math.isfinite(v):
        raise ValueError(f"{v} is not a finite number")
    elif isinstance(v, (int, float)) and not isinstance(v, bool):
        lowest = _lowest(p)
        if v < lowest or (p.name.endswith("lr") and v == 0):
            raise ValueError(
                f"{v} is impossible: it must be {'above 0' if p.name.endswith('lr') else f'{lowest} or more'}"
            )


def _lowest(p: Parameter) -> int | float:
    """The smallest number `p` may take. A default at or below the usual bound (0, or -1 for "choose") lowers it."""
    usual = 1 if "int" in p.annotation and not any(word in p.name for word in _MAY_BE_ZERO) else 0
    defaults = p.default if isinstance(p.default, list) else [p.default]
    return min([usual, *(d for d in defaults if isinstance(d, (int, float)))])


def for_notebook(card: Mapping[str, Any], notebook: Path) -> dict[str, Any]:
    """The part of a card that one notebook declares; papermill warns about every other key."""
    return {k: v for k, v in card.items() if k in declared(notebook)}
