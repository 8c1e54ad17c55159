"""Experiment cards: one flat YAML file per run, held to one model.

`Card` says of every key what it means, what it may be and what it is by default. A notebook declares the keys that it
uses in the cell tagged `parameters`, with the same names, types, defaults and meanings (tests/test_notebooks.py holds
them to it). `check_card` reports every unknown key (with the nearest valid name), every wrong type and every
impossible value before anything is loaded.

    python -m icl_lib.commands.check params/tiny.yaml
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic
import yaml
from pydantic import AfterValidator, BeforeValidator, Field

from icl_lib.files.paths import resolve, root

LOCAL = ("assets/", "runs/", "params/", "data/", "./", "../", "/", "~")  # a hub id never starts like this


class CardError(ValueError):
    """A card that cannot be run, or a notebook whose parameters cannot be read; the message lists every problem."""


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _there(name: str) -> str:
    if name.startswith(LOCAL) and not Path(resolve(name)).exists():
        raise ValueError(f"{name} does not exist (looked for {resolve(name)}); give a folder or a hub id")
    return name


def _there_or_made_later(name: str) -> str:
    """SAEs below runs/ are made by the run itself, and a pattern names many: both are looked for when loaded."""
    return name if name.startswith("runs/") or "{" in name else _there(name)


def _different(values: list) -> list:
    if any(values.count(value) > 1 for value in values):
        raise ValueError(f"{values!r} holds a value twice")
    return values


Text = Annotated[str, AfterValidator(_not_blank)]
Source = Annotated[Text, AfterValidator(_there)]  # a name, a hub id, or a file or folder that is there
SAEName = Annotated[Text, AfterValidator(_there_or_made_later)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]  # layers, seeds and shots count from 0
Rate = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]
Length = Annotated[float, Field(ge=-1)]  # of a direction; -1 lets the run choose
Different = AfterValidator(_different)
Some = Field(min_length=1)
OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)  # a text: a list of one


class Card(pydantic.BaseModel):
    """The keys of a card with their meanings, bounds and defaults; the defaults are the embedded model's own card."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    card: Text = Field("tiny", description="name of the experiment card")
    model: Source = Field("icl-tiny", description="name of an embedded model, hub id or folder of the model")
    saes: Annotated[list[SAEName], OneOrMore, Some, Different] = Field(
        ["icl-tiny"], description="name or folder of the SAE suite, or folders and hub paths with {layer} in them"
    )
    sae_layers: Annotated[list[Index], Some, Different] = Field(
        [0, 1, 2, 3, 4, 5], description="layers whose SAEs are loaded, counted as their files do"
    )
    sae_variant: Literal["", "paper"] = Field(
        "", description='"paper" reads the ICL-SFC authors\' SAEs as in their experiments; empty: as trained'
    )
    text: Source = Field(
        "icl-tiny", description="plain text: an embedded model's, a data set's hub id, a file or folder"
    )
    tasks: Source = Field("embedded", description="embedded, paper, function_vectors, or a folder of task files")
    prefix: Text = Field("Follow the pattern:\n", description="opens a prompt; chat models may want a turn opened")
    run_dir: Text = Field("runs/tiny", description="where results go, from the repository root")
    seed: Index = Field(0, description="seed of prompts, corpora, training and random draws")

    n_shots: Index = Field(12, description="examples in a prompt")
    list_shots: Index = Field(
        12, description="at most so many where inputs are lists of words (algo_first and the like)"
    )
    n_prompts: Count = Field(16, description="prompts per task")
    max_shots: Index = Field(12, description="examples in the longest prompts of notebook 00")

    sweep_widths: Annotated[list[Count], Different] = Field(
        [256, 512, 1024], description="widths of SAEs trained in 01, tried in 03 and 04; [] trains none"
    )
    sweep_sparsity: Annotated[list[Amount], Different] = Field(
        [0.02, 0.05, 0.12, 0.3], description="their sparsity penalties, each at every width"
    )
    sweep_steps: Count = Field(600, description="their training steps")
    quality_rows: Count = Field(48, description="rows of fresh text on which the model runs with each SAE in place")
    rate_rows: Count = Field(400, description="rows on which firing rates are counted")

    layer_executor: Index = Field(4, description="layer (resid_pre) whose latents are looked for at the arrow")
    layer_detector: Index = Field(3, description="layer (resid_pre) whose latents are looked for at the outputs")

    tvc_l1: Annotated[list[Amount], Some, Different] = Field(
        [0.0003, 0.001, 0.003, 0.01, 0.03], description="L1 penalties swept, nats per unit of activation"
    )
    tvc_lr: Rate = Field(10.0, description="learning rate of Adam, in units of activation per step")
    tvc_patience: Count = Field(50, description="steps without a smaller L0 before it stops")
    tvc_steps: Count = Field(150, description="most steps")
    tvc_prompts: Count = Field(12, description="prompts per task on which a vector is cleaned")
    detector_l1: Amount = Field(
        0.003, description="L1 penalty of the cleaning of detectors, nats per unit of activation"
    )
    detector_lr: Rate = Field(0.3, description="its learning rate")
    detector_patience: Count = Field(50, description="its steps without a smaller L0 before it stops")
    detector_steps: Count = Field(100, description="its most steps")

    scale_executor: Length = Field(-1.0, description="length of an executor's direction; -1: the best of a sweep")
    scale_detector: Length = Field(-1.0, description="the same for detectors")
    latent_scales: Annotated[list[Amount], Different] = Field(
        [], description="lengths of which each latent takes its best (paper, Gemma-2); []: one for all"
    )

    effect_prompts: Count = Field(24, description="prompts per task from which nodes are found")
    circuit_prompts: Count = Field(8, description="prompts per task on which circuits are tested")
    circuit_shots: Index = Field(8, description="examples in the prompts of circuits")
    circuit_list_shots: Index = Field(8, description="at most so many of them where inputs are lists of words")
    circuit_layers: Annotated[list[Index], Some, Different] = Field(
        [2, 3, 4, 5], description="layers whose latents may be ablated"
    )


def type_name(annotation: Any) -> str:
    """A field's type as a parameters cell writes it, without its bounds: `list[float]`."""
    if get_origin(annotation) is Annotated:
        return type_name(get_args(annotation)[0])
    if get_origin(annotation) is list:
        return f"list[{type_name(get_args(annotation)[0])}]"
    return type(get_args(annotation)[0]).__name__ if get_origin(annotation) is Literal else annotation.__name__


def notebook_files(folder: Path | None = None) -> list[Path]:
    """The numbered notebooks, in order."""
    return sorted((folder or root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def parameters(notebook: Path) -> dict[str, dict[str, str]]:
    """What a notebook's parameters cell declares, as papermill reads it: name -> type, default and meaning as text.
    Raises `CardError` for a file that is not a notebook."""
    import papermill  # slow to import, and only needed here

    try:
        return dict(papermill.inspect_notebook(str(notebook)))
    except Exception as err:  # of JSON, of nbformat, or papermill's own: they have no common class
        raise CardError(f"{notebook} is not a readable notebook ({err}): make it anew: jupytext --to ipynb") from err


def for_notebook(card: Mapping[str, Any], notebook: Path) -> dict[str, Any]:
    """The part of a card that one notebook declares; papermill warns about every other key."""
    return {key: card[key] for key in parameters(notebook) if key in card}


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice, of which plain YAML silently keeps the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        if twice := sorted({str(k) for k in keys if keys.count(k) > 1}):
            raise CardError(f"{', '.join(twice)} is set more than once; keep one line")
        return super().construct_mapping(node, deep)


def read_card(path: str | Path) -> dict[str, Any]:
    """The keys and values of a card file, unchecked. Raises `CardError` if it is not one flat mapping."""
    path = Path(path).expanduser()
    if not path.is_file():
        cards = ", ".join(sorted(p.name for p in (root() / "params").glob("*.yaml")))
        raise CardError(f"no card at {path}; cards in this repository: {cards}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except CardError as err:
        raise CardError(f"{path}: {err}") from None
    except yaml.YAMLError as err:
        raise CardError(f"{path} is not YAML: {err}") from err
    if not isinstance(values, dict) or any(not isinstance(k, str) for k in values):
        raise CardError(f"{path} must hold lines `key: value`, got {type(values).__name__}")
    return values


def check_card(path: str | Path) -> Card:
    """The card of a file. Raises `CardError` listing everything wrong with it."""
    return check_values(read_card(path), str(path))


def check_values(values: Mapping[str, Any], source: str) -> Card:
    """The card with these values of the file `source`. Raises `CardError` with all unknown keys and wrong values."""
    problems = {}
    if "run_dir" not in values:  # without it a card would write over the results of another one
        where = f"runs/{Path(source).stem}"
        problems["run_dir"] = f"`run_dir` is missing: every card says where its results go, for example {where}"
    try:
        card = Card.model_validate(dict(values))
    except pydantic.ValidationError as err:
        for error in err.errors():
            problems.setdefault(error["loc"][0], _problem(error, values))
    if problems:
        raise CardError(f"{source}:\n" + "\n".join(f"  - {p}" for p in problems.values()))
    return card


def _problem(error: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """One of pydantic's errors in our words: what was expected, what came, what to do."""
    key, got, context = error["loc"][0], error["input"], error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Card.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(sorted(Card.model_fields))}"
        return f"no notebook declares `{key}`; {hint}"
    field = Card.model_fields[key]
    said = {
        "value_error": str(context.get("error")),
        "too_short": f"the list is empty; give at least one value, the default is {field.default!r}",
        "greater_than": f"{got} is impossible: it must be above {context.get('gt', 0):g}",
        "greater_than_equal": f"{got} is impossible: it must be {context.get('ge', 0):g} or more",
        "finite_number": f"{got} is not a finite number",
        "literal_error": f"{got!r} is none of {', '.join(map(repr, get_args(field.annotation)))}",
    }
    expected = f"expected {type_name(field.annotation)} ({field.description}), got {values[key]!r}{_yaml_hint(got)}"
    return f"`{key}`: {said.get(error['type'], expected)}"


def _yaml_hint(value: Any) -> str:
    """Why a number in the file may have arrived as text: YAML 1.1 wants a point before, and a sign after, the `e`."""
    try:
        float(value if isinstance(value, str) else "no number")
    except ValueError:
        return ""
    mantissa, _, exponent = value.lower().partition("e")
    sign = "" if exponent[:1] in ("", "+", "-") else "+"
    better = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}{exponent}" if exponent else mantissa
    return f"; YAML reads {value} as text, write {better} without quotes"
