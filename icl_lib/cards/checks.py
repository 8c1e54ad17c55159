"""What of a card can be held to its model and tasks before anything is loaded: layers, prompts, source of the tasks.

No network is asked. The sizes of the cards' models are part of the package, those of a folder are read from its
`config.json`; of any other hub id nothing is known before the download, and its layers are checked when it is loaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icl_lib.cards.card import Card, CardError, check_card
from icl_lib.files.names import did_you_mean, located
from icl_lib.files.paths import resolve
from icl_lib.models import ModelConfig, load_config
from icl_lib.models.families import known_config
from icl_lib.saes.formats.suites import has_layer, layers_of
from icl_lib.tasks.tasks import URLS, task_files

LAYER_KEYS = ("layer_executor", "layer_detector", "sae_layers", "circuit_layers")
SHOT_KEYS = ("n_shots", "max_shots", "circuit_shots")
SOURCES = ("embedded", *URLS)
_LEAST_PAIR = 4  # tokens: input, arrow, output, newline


def defaults_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """The card with the defaults for what it does not set."""
    return Card().model_dump() | dict(card)


def config_of(model: str) -> ModelConfig | None:
    """The config of a known model or folder; None for any other hub id. Raises `CardError` on a folder without one."""
    folder = located(model, "model")
    if not folder.is_dir():
        return known_config(model)
    try:
        return load_config(folder)
    except (OSError, ValueError) as err:
        raise CardError(f"`model`: {err}") from err


def full_card(path: str | Path) -> dict[str, Any]:
    """The values of a card, defaults among them, that model and tasks are known to serve. Raises `CardError`."""
    card = check_card(path).model_dump()
    check_against_model(card, str(path))
    return card


def check_against_model(card: Mapping[str, Any], source: str) -> None:
    """Raises `CardError` listing what model or tasks of a checked card cannot serve; `source` is the card's file."""
    card = defaults_of(card)
    config = config_of(card["model"])
    problems = _tasks(card["tasks"]) + _saes(card)
    problems += [] if config is None else _layers(card, config) + _prompts(card, config)
    detector, executor = card["layer_detector"], card["layer_executor"]
    if detector >= executor:
        wanted = f"`layer_detector` ({detector}) must be below `layer_executor` ({executor})"
        problems.append(f"{wanted}: detectors act on later layers")
    if problems:
        raise CardError(f"{source}:\n" + "\n".join(f"  - {p}" for p in problems))


def _saes(card: Mapping[str, Any]) -> list[str]:
    """Names of SAEs with a range of layers that is not one, or that none of the card's layers is in."""
    problems = []
    for pattern in card["saes"]:
        try:
            none = has_layer(pattern) and not layers_of(pattern, card["sae_layers"])
            problems += [f"`saes`: {pattern} is of none of the `sae_layers` {card['sae_layers']}"] if none else []
        except ValueError as err:
            problems.append(f"`saes`: {err}")
    return problems


def _layers(card: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """Layers that the model does not have."""
    problems = []
    for key in LAYER_KEYS:
        layers = card[key] if isinstance(card[key], list) else [card[key]]
        problems += [
            f"`{key}` names layer {layer}, but {card['model']} has the layers 0 to {config.n_layers - 1}"
            for layer in layers
            if not 0 <= layer < config.n_layers
        ]
    return problems


def _prompts(card: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """Prompts that even with words of one token are longer than the model's context."""
    most = config.n_ctx // _LEAST_PAIR - 1
    return [
        f"`{key}`: {card[key]} examples are at least {_LEAST_PAIR * (card[key] + 1)} tokens, and the context of "
        f"{card['model']} has {config.n_ctx}: at most {most}"
        for key in SHOT_KEYS
        if card[key] > most
    ]


def _tasks(tasks: str) -> list[str]:
    """A source that is neither a name nor a folder with files of tasks."""
    folder = Path(resolve(tasks))
    if tasks in SOURCES or task_files(folder):
        return []
    if folder.is_dir():
        return [f"`tasks`: {folder} holds no .json or .tsv file of pairs"]
    near = did_you_mean(tasks, SOURCES)
    return [f"`tasks`: no source {tasks!r}; {near}There are {', '.join(SOURCES)}, or a folder of .json or .tsv files"]
