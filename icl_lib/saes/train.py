"""`python -m icl_lib.saes.train params/suites/gemma-1-2b.yaml`: train the suite of a card; the same command goes on with it.

A card of a suite names a model, a text and the SAEs; `SuiteCard` says what each key means.
"""

import argparse
import sys
from pathlib import Path

import jax
import pandas as pd
import pydantic
from jax.sharding import AxisType, Mesh

from icl_lib.models import Site, load_config, load_model, load_tokenizer
from icl_lib.models.sharding import make_mesh
from icl_lib.runs import devices
from icl_lib.runs.params import CardError, read_card
from icl_lib.runs.paths import resolve, run_folder
from icl_lib.saes.corpus import Corpus, TextCorpus, open_text
from icl_lib.saes.jobs import train_suite
from icl_lib.saes.recipes import OBJECTIVES, Recipe, TrainingError, make_recipe
from icl_lib.saes.suite import AXIS, Member
from icl_lib.tiny.language import LANGUAGE


class SuiteCard(pydantic.BaseModel):
    """The keys of a card, each held to its type; any other key is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    model: str  # folder or hub id
    revision: str | None = None  # of the model on the hub
    dtype: str = "float32"  # of the model and of the activation buffer
    text: str  # hub id of a data set, a file or folder of text, or "embedded language"
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
    devices_per_model: pydantic.PositiveInt = 1  # that one copy of the language model is divided among, where one cannot hold it

    contexts: int = 32  # in a pass of the language model
    passes: int = 16  # that the activation buffer holds
    steps_per_pass: int = 4
    held_out: int = 64  # first contexts of the text, kept for the table of quality at the end; 0: none
    save_every: int = 1000  # steps
    keep: int = 2  # checkpoints


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


def corpus(card: SuiteCard, bos_id: int | None) -> Corpus:
    """The text of the card, tokenised for its model."""
    if card.text == LANGUAGE:
        from icl_lib.tiny.stream import LanguageCorpus

        return LanguageCorpus(card.context, seed=card.seed)
    stream = open_text(resolve(card.text), subset=card.subset, revision=card.text_revision)
    tokenizer = load_tokenizer(resolve(card.model), card.revision)
    which = ", ".join(filter(None, (card.subset, card.text_revision)))
    name = f"{card.text} ({which})" if which else card.text
    return TextCorpus(stream, tokenizer, card.context, bos_id=bos_id, text_column=card.text_column, epochs=card.epochs, name=name)


def meshes(card: SuiteCard) -> tuple[Mesh | None, Mesh | None]:
    """That of the language model and that of the SAEs, over the same devices in the same order; None where there is one device.

    Raises `CardError` if the devices do not divide into copies of the model.
    """
    n, each = jax.device_count(), card.devices_per_model
    if jax.local_device_count() % each:
        raise CardError(
            f"`devices_per_model`: {each} does not divide the {jax.local_device_count()} {jax.default_backend()} device(s) of a process"
        )
    if n == 1:
        return None, None
    of_model = make_mesh(data=n // each, model=each)
    return of_model, Mesh(of_model.devices.ravel(), (AXIS,), axis_types=(AxisType.Auto,))


def run(card: SuiteCard) -> Path:
    """Train the suite; on several devices each copy of the model has its share of the contexts. Gives the folder of the SAEs."""
    config = load_config(resolve(card.model), card.revision)
    suite, how = members(card, config.n_layers), recipe(card)
    for member in suite:
        config.check_layer(member.site.layer, "layer of the card")
    of_model, mesh = meshes(card)
    text = corpus(card, config.bos_id)
    model = load_model(resolve(card.model), card.revision, card.dtype, of_model)
    train_suite(
        model, text, suite, how, run_folder(card.run_dir), seed=card.seed, contexts=card.contexts, passes=card.passes,
        steps_per_pass=card.steps_per_pass, held_out=card.held_out, save_every=card.save_every, keep=card.keep, mesh=mesh, shard=card.shard,
        metadata={"model_name": card.model, "dataset": card.text, "context_size": card.context},
    )  # fmt: skip
    return run_folder(card.run_dir) / "saes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("card", type=Path)
    try:
        card = read_suite_card(parser.parse_args().card)
        devices.setup(card.run_dir)
        print(f"wrote {run(card)}")
        if (table := run_folder(card.run_dir) / "quality.parquet").is_file():
            shown = ["site", "d_sae", "sparsity", "l0", "fvu", "ce_recovered_zero", "ce_recovered_mean", "dead", "dense"]
            print(f"quality on {card.held_out} contexts held out:\n{pd.read_parquet(table)[shown].round(3).to_string(index=False)}")
    except (TrainingError, ValueError, OSError) as err:
        print(err, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
