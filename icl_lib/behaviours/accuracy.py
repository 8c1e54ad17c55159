"""The first thing to look at after loading a model: how well it does each task in context, beside published figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pandas as pd

from icl_lib.models.cost import fitting, logits_bytes
from icl_lib.tasks.prompts import PAPER_TEMPLATE, make_prompts
from icl_lib.tasks.tables import read_table
from icl_lib.tasks.tasks import Task
from icl_lib.tasks.template import Role, Template
from icl_lib.text.tokens import batches

# Published tables by the name of the model on the hub.
REFERENCES = {"gemma-2b-it": Path(__file__).parent / "gemma_2b_it_accuracy.tsv"}


@eqx.filter_jit
def _guesses(model, tokens):
    """The most probable token after every token."""
    return jnp.argmax(model(tokens), axis=-1).astype(jnp.int32)


def _same_start(tokenizer, guesses: np.ndarray, targets: np.ndarray, n: int = 3) -> np.ndarray:
    """Whether two tokens are equal in their first `n` characters, blanks before them left out. A token that is no text
    of its own, a blank or a part of a character, is equal to itself only."""
    ids = np.unique([guesses, targets])
    texts = tokenizer.batch_decode([[int(i)] for i in ids])
    starts = {int(i): text.strip()[:n] for i, text in zip(ids, texts, strict=True)}
    alike = lambda a, b: a == b or (starts[a] == starts[b] != "" and "\ufffd" not in starts[a])
    return np.array([alike(int(a), int(b)) for a, b in zip(guesses, targets, strict=True)], bool)


def accuracy_table(
    model, tokenizer, tasks: Mapping[str, Task], *, n_pairs: Sequence[int] = (12, 24), n_prompts: int = 16,
    seed: int = 0, pool: str | None = None, template: Template = PAPER_TEMPLATE,
) -> pd.DataFrame:  # fmt: skip
    """Accuracy by task: columns `task`, `group`, `pairs` and one `acc@k` for each k of `n_pairs`.

    acc@k is the share of arrows, over all k arrows of prompts of k pairs, the first included, after which the most
    probable token and the first token of the output are equal in their first three characters. A task with fewer than k
    pairs in the pool has NaN there. Raises `ValueError` if a prompt is longer than the model's context.

    Source: ICL-SFC, the measure of its published experiments.
    """
    options = {"n_prompts": n_prompts, "seed": seed, "pool": pool, "template": template}
    accuracy = lambda task, k: _accuracy(model, tokenizer, task, k, options)
    table = {"task": list(tasks), "group": [t.group for t in tasks.values()]}
    table |= {"pairs": [len(t.pairs) for t in tasks.values()]}
    return pd.DataFrame(table | {f"acc@{k}": [accuracy(task, k) for task in tasks.values()] for k in n_pairs})


def _accuracy(model, tokenizer, task: Task, k: int, options: Mapping) -> float:
    pool, n_prompts, config = options["pool"], options["n_prompts"], model.config
    if len({x for x, _ in (task.pairs if pool is None else task.pool(pool))}) < k:
        return float("nan")
    prompts = make_prompts(task, tokenizer, n_shots=k - 1, n_ctx=config.n_ctx, **options)
    seq = prompts.tokens.shape[1]
    wide = min(-(-seq // 64) * 64, config.n_ctx)  # a few widths in all, so that not every task compiles its own program
    rows = fitting(logits_bytes(config, wide))
    guesses = [_guesses(model, some) for some, _ in batches(prompts.tokens, prompts.real, rows, wide)]
    guesses = np.concatenate(guesses)[:n_prompts, :seq]
    at = np.asarray(prompts.mask(Role.OUTPUT, "first") & (prompts.pair >= 0))[:, 1:]
    return float(_same_start(tokenizer, guesses[:, :-1][at], np.asarray(prompts.tokens)[:, 1:][at]).mean())


def published_accuracy(model: str | Path) -> pd.DataFrame | None:
    """The published `task`, `acc@12` and `acc@24` of the model of that hub id or folder name; None if there are none.

    There are some for Gemma-1 2B-it (`google/gemma-2b-it`), from the plot data that ICL-SFC's published experiments
    keep, on the tasks of `load_tasks("paper")`.
    """
    file = REFERENCES.get(Path(model).name)
    if file is None:
        return None
    table = pd.DataFrame(read_table(file, columns=("task", "acc@12", "acc@24")))
    return table.astype({"acc@12": float, "acc@24": float})
