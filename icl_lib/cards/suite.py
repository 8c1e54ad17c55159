"""The card of a suite of SAEs: a model, a text, and the SAEs to train."""

from pathlib import Path

import pydantic
from jax.sharding import Mesh

from icl_lib.cards.card import CardError, read_card
from icl_lib.models import Site
from icl_lib.training import JobSettings, Member, Recipe, make_recipe
from icl_lib.training.recipes import OBJECTIVES


class SuiteCard(pydantic.BaseModel):
    """The keys of a card, each held to its type; any other key is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    model: str  # folder or hub id
    revision: str | None = None  # of the model on the hub
    dtype: str = "float32"  # of the model and of the activation buffer
    text: str  # hub id of a data set, a file or folder of text, or the name of an embedded model, for its language
    subset: str | None = None  # of a data set on the hub
    text_revision: str | None = None  # of a data set on the hub: a commit, so that it stays the text it is
    text_column: str = "text"
    epochs: int = 1  # times that the text may be read
    context: int  # tokens of a context, BOS included
    run_dir: str  # where checkpoints and SAEs go, from the repository root
    seed: int = 0

    sparsity: dict[str, list[float]]  # for each kind of site ("resid_pre") the values of lambda, or of k
    d_sae: list[int]  # widths; every site, layer, width and sparsity is one SAE
    layers: list[int] | None = None  # all by default
    recipe: str  # name of a published one
    steps: int  # optimiser steps
    batch_size: int  # rows in a step
    changes: dict[str, float | int | bool | str] = {}  # to the fields of the recipe
    shard: str = "latent"  # over several devices: "latent" divides each SAE, "sae" gives each device some
    devices_per_model: pydantic.PositiveInt = 1  # that one copy of the model is divided among, where one cannot hold it

    # these, too, mean what they do in `JobSettings`
    contexts: int = JobSettings.contexts
    passes: int = JobSettings.passes
    steps_per_pass: int = JobSettings.steps_per_pass
    held_out: int = 64
    save_every: int = JobSettings.save_every
    keep: int = JobSettings.keep


def read_suite_card(path: str | Path) -> SuiteCard:
    """The checked card. Raises `CardError` that lists everything wrong with it."""
    try:
        card = SuiteCard.model_validate(read_card(path))
    except pydantic.ValidationError as err:
        known = ", ".join(SuiteCard.model_fields)
        lines = [f"  - `{'.'.join(map(str, e['loc']))}`: {e['msg']}, got {e['input']!r}" for e in err.errors()]
        raise CardError(f"{path}:\n" + "\n".join(lines) + f"\n  the keys of a suite's card are {known}") from None
    if card.recipe not in OBJECTIVES:
        raise CardError(f"{path}:\n  - `recipe`: must be one of {', '.join(OBJECTIVES)}, got {card.recipe!r}")
    return card


def members(card: SuiteCard, n_layers: int) -> list[Member]:
    """One SAE for every kind of site, layer, width and sparsity."""
    layers = range(n_layers) if card.layers is None else card.layers
    return [
        Member(Site(kind, layer), width, value)
        for kind, values in card.sparsity.items()
        for layer in layers
        for width in card.d_sae
        for value in values
    ]


def recipe(card: SuiteCard) -> Recipe:
    """The published recipe with the card's changes."""
    return make_recipe(card.recipe, n_steps=card.steps, batch_size=card.batch_size, **card.changes)


def job_settings(card: SuiteCard, mesh: Mesh | None = None) -> JobSettings:
    """How the job of the card goes about its work, on the devices of `mesh`."""
    same = ("seed", "contexts", "passes", "steps_per_pass", "held_out", "save_every", "keep", "shard")
    metadata = {"model_name": card.model, "dataset": card.text, "context_size": card.context}
    return JobSettings(**{name: getattr(card, name) for name in same}, mesh=mesh, metadata=metadata)
