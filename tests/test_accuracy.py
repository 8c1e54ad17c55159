"""The accuracy table: against a loop, its rule of three characters, and the published values."""

import itertools
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl_lib.behaviours import accuracy_table, published_accuracy
from icl_lib.behaviours.accuracy import _same_start
from icl_lib.files.paths import root
from icl_lib.models import ModelConfig, load_model, load_tokenizer, tiny_config
from icl_lib.tasks import Role, Task, load_tasks, make_prompts
from tests.tokenizer_files import tokenizer

TASKS = {name: load_tasks("embedded")[name] for name in ("country_capital", "en_fr", "next_item")}


@pytest.fixture(scope="module")
def embedded():
    folder = root() / "assets" / "icl-tiny"
    return load_model(folder), load_tokenizer(folder)


def test_table_against_a_loop(embedded):
    model, words = embedded
    table = accuracy_table(model, words, TASKS, n_pairs=(3, 12), n_prompts=4, seed=1)
    assert list(table.columns) == ["task", "group", "pairs", "acc@3", "acc@12"] and table["task"].tolist() == list(
        TASKS
    )
    forward = eqx.filter_jit(lambda model, tokens: model(tokens))
    for (name, task), k in itertools.product(TASKS.items(), (3, 12)):
        prompts = make_prompts(task, words, n_prompts=4, n_shots=k - 1, seed=1)
        best = np.asarray(forward(model, prompts.tokens).argmax(axis=-1))
        tokens, roles, pair = (np.asarray(x) for x in (prompts.tokens, prompts.roles, prompts.pair))
        hits = []
        for b, i in itertools.product(range(4), range(k)):
            arrow = max(np.flatnonzero((roles[b] == Role.ARROW) & (pair[b] == i)))
            hits.append(words.decode([best[b, arrow]])[:3] == words.decode([tokens[b, arrow + 1]])[:3])
        assert len(hits) == 4 * k
        assert table.set_index("task").loc[name, f"acc@{k}"] == pytest.approx(np.mean(hits))


def test_three_characters_are_enough_and_parts_of_characters_are_not():
    bytes_ = tokenizer("small_gpt2")
    ids = lambda text: np.asarray(bytes_(text, add_special_tokens=False)["input_ids"])
    assert _same_start(bytes_, ids("a"), ids(" a")[-1:]).all()  # a blank before does not count
    first, second = ids("日"), ids("é")  # their bytes all decode to the replacement character
    assert not _same_start(bytes_, first[:1], second[:1]).any() and _same_start(bytes_, first, first).all()

    vocabulary = ["medical", "medicine", "mad", " ", "\n", "me", "me "]
    fake = types.SimpleNamespace(batch_decode=lambda rows: ["".join(vocabulary[i] for i in row) for row in rows])
    same = lambda a, b: bool(_same_start(fake, np.array([a]), np.array([b]))[0])
    assert same(0, 1) and same(5, 6) and not same(0, 2) and not same(0, 5) and not same(3, 4) and same(3, 3)


class Constant(eqx.Module):
    """A model that always expects one token."""

    token: jax.Array
    config: ModelConfig = eqx.field(static=True)

    def __call__(self, tokens):
        one = jax.nn.one_hot(self.token, self.config.d_vocab)
        return jnp.broadcast_to(one[None, None], (*tokens.shape, self.config.d_vocab))


def test_a_constant_guess_is_as_good_as_its_frequency_at_all_arrows():
    words = tokenizer("icl_tiny")
    task = load_tasks("embedded")["noun_category"]
    word = task.pairs[0][1]
    config = tiny_config(d_vocab=len(words), n_ctx=200)
    model = Constant(jnp.asarray(words.convert_tokens_to_ids(word)), config)
    found = accuracy_table(model, words, {"t": task}, n_pairs=(20,), n_prompts=30)["acc@20"][0]
    texts = make_prompts(task, words, n_prompts=30, n_shots=19, seed=0).texts
    outputs = [line.split(" -> ")[1] for text in texts for line in text.split("\n")[1:]]
    assert len(outputs) == 600 and 0 < found < 1
    assert found == pytest.approx(np.mean([y[:3] == word[:3] for y in outputs]))


def test_too_few_pairs_and_too_long_prompts(embedded):
    model, words = embedded
    few = Task("few", TASKS["en_fr"].pairs[:8], "", "test")
    table = accuracy_table(model, words, {"few": few, "en_fr": TASKS["en_fr"]}, n_pairs=(3, 12), n_prompts=2)
    assert table["acc@12"].isna().tolist() == [True, False] and not table["acc@3"].isna().any()
    with pytest.raises(
        ValueError,
        match=r"task 'country_capital' with 40 pairs are \d+ tokens long, more than the model's context of 80",
    ):
        accuracy_table(model, words, TASKS, n_pairs=(40,), n_prompts=2)


def test_published_values_are_of_the_paper_tasks():
    table = published_accuracy("google/gemma-2b-it").set_index("task")
    assert len(table) == 23 and table.index.is_unique and ((table > 0) & (table < 1)).all(axis=None)
    assert table.loc["algo_first"].tolist() == [0.95, 0.95] and table.loc["country_capital", "acc@12"] == 0.69
    assert published_accuracy("/models/gemma-2b-it").equals(table.reset_index())
    assert published_accuracy("google/gemma-2b") is None and published_accuracy("assets/icl-tiny") is None
