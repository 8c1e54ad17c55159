"""`python -m icl_lib.commands.train params/suites/gemma-1-2b.yaml`: train the suite of a card.

The same command goes on with it. A card of a suite names a model, a text and the SAEs; `SuiteCard` says what each key
means.
"""

import argparse
import sys
from pathlib import Path

import jax
import pandas as pd
from jax.sharding import AxisType, Mesh

from icl_lib.cards.card import CardError
from icl_lib.cards.suite import SuiteCard, job_settings, members, read_suite_card, recipe
from icl_lib.embedded import endless_language
from icl_lib.files.paths import resolve, run_folder
from icl_lib.models import load_config, load_model, load_tokenizer
from icl_lib.models.sharding import make_mesh
from icl_lib.runs import devices
from icl_lib.text.corpus import Corpus, TextCorpus, open_text
from icl_lib.training import TrainingError, train_suite
from icl_lib.training.plan import AXIS


def corpus(card: SuiteCard, bos_id: int | None) -> Corpus:
    """The text of the card, tokenised for its model."""
    if (language := endless_language(card.text, card.context, seed=card.seed)) is not None:
        return language
    stream = open_text(resolve(card.text), subset=card.subset, revision=card.text_revision)
    tokenizer = load_tokenizer(resolve(card.model), card.revision)
    which = ", ".join(filter(None, (card.subset, card.text_revision)))
    name = f"{card.text} ({which})" if which else card.text
    return TextCorpus(
        stream, tokenizer, card.context, bos_id=bos_id, text_column=card.text_column, epochs=card.epochs, name=name
    )


def meshes(card: SuiteCard) -> tuple[Mesh | None, Mesh | None]:
    """That of the language model and that of the SAEs, over the same devices in the same order.

    Both are None where there is one device. Raises `CardError` if the devices do not divide into copies of the
    model.
    """
    n, each = jax.device_count(), card.devices_per_model
    if jax.local_device_count() % each:
        raise CardError(
            f"`devices_per_model`: {each} does not divide the {jax.local_device_count()} "
            f"{jax.default_backend()} device(s) of a process"
        )
    if n == 1:
        return None, None
    of_model = make_mesh(data=n // each, model=each)
    return of_model, Mesh(of_model.devices.ravel(), (AXIS,), axis_types=(AxisType.Auto,))


def run(card: SuiteCard) -> Path:
    """Train the suite; on several devices each copy of the model has its share of the contexts.

    Gives the folder of the SAEs.
    """
    config = load_config(resolve(card.model), card.revision)
    suite, how = members(card, config.n_layers), recipe(card)
    for member in suite:
        config.check_layer(member.site.layer, "layer of the card")
    of_model, mesh = meshes(card)
    text = corpus(card, config.bos_id)
    model = load_model(resolve(card.model), card.revision, card.dtype, of_model)
    train_suite(model, text, suite, how, run_folder(card.run_dir), job_settings(card, mesh))
    return run_folder(card.run_dir) / "saes"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m icl_lib.commands.train", description="Train the suite of SAEs of a card, or go on with it."
    )
    parser.add_argument("card", type=Path, help="a card of a suite, such as params/suites/gemma-1-2b.yaml")
    try:
        card = read_suite_card(parser.parse_args().card)
        devices.setup(card.run_dir)
        print(f"wrote {run(card)}")
        if (table := run_folder(card.run_dir) / "quality.parquet").is_file():
            shown = "site d_sae sparsity l0 fvu ce_recovered_zero ce_recovered_mean dead dense".split()
            text = pd.read_parquet(table)[shown].round(3).to_string(index=False)
            print(f"quality on {card.held_out} contexts held out:\n{text}")
    except (TrainingError, ValueError, OSError) as err:
        print(err, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
