"""Prompts: roles of tokens, sampling, the dummy line, corruption, stacking, and the metrics read from logits."""

import os
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from icl_lib.models import Site, Transformer, tiny_config
from icl_lib.models.families import from_hf, to_hf
from icl_lib.saes.activations import harvest
from icl_lib.tasks import (
    Role,
    Task,
    Template,
    answer_accuracy,
    answer_nll,
    load_tasks,
    make_prompts,
    pair_accuracy,
    pair_logit,
    pair_logprob,
    stack_prompts,
    token_logprobs,
)

WORDS = [x for x, _ in load_tasks("embedded")["en_es"].pairs]
LISTS = tuple(
    (", ".join(words), words[-1]) for words in zip(WORDS, WORDS[10:], WORDS[20:], strict=False)
)  # inputs of five tokens
TASKS = load_tasks("embedded") | {"algo_last": Task("algo_last", LISTS, "algorithmic", "test")}
CORPUS = ["Follow the pattern:\nX -> Y\n"] + [f"{x} -> {y}\n" for task in TASKS.values() for x, y in task.pairs]


@pytest.fixture(scope="session")
def words():
    """A word-level tokenizer like that of the embedded model: words, punctuation, the arrow and the newline."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    pieces = Regex(r"->|\n|\w+|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.Split(Regex(" +"), "removed")]
    )
    special = ["<pad>", "<bos>", "<unk>"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>")


def byte_level(trim_offsets):
    """A small byte-level BPE in the manner of GPT-2, whose offsets leave out or keep the space before a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def pythia():
    """The Pythia tokenizer where there is a copy, else a small one of its kind. It has no BOS and no pad token."""
    data = Path(os.environ.get("ICL_LIB_TASK_DATA", Path(__file__).parents[2] / "shared" / "data"))
    file = data / "tokenizers" / "pythia_20B" / "tokenizer.json"
    if file.is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(file))
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(trim_offsets=True))


@pytest.fixture(scope="session")
def metaspace():
    """A BPE with the space as a mark before the word, as SentencePiece has it; offsets include the space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    newline = pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([newline, pre_tokenizers.Metaspace(prepend_scheme="never")])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>")


@pytest.fixture(params=["words", "pythia", "metaspace"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def decoded(tokenizer, prompts, row, chosen):
    ids = np.asarray(prompts.tokens[row])[np.asarray(chosen)]
    return tokenizer.decode(ids.tolist()).strip(" ")


def test_roles_partition_the_text(tokenizer):
    """Decoding the tokens of each role and pair gives back the very words, multi-word names included."""
    prompts = make_prompts(TASKS["location_country"], tokenizer, n_prompts=40, n_shots=3, seed=1)
    roles, pair = np.asarray(prompts.roles), np.asarray(prompts.pair)
    assert any("United Kingdom" in text for text in prompts.texts)
    for row, text in enumerate(prompts.texts):
        head, *lines = text.split("\n")
        assert len(lines) == 4
        for i, line in enumerate(lines):
            x, y = line.split(" -> ")
            for role, word in ((Role.INPUT, x), (Role.ARROW, "->"), (Role.OUTPUT, y)):
                assert decoded(tokenizer, prompts, row, (roles[row] == role) & (pair[row] == i)) == word
            n_newlines = ((roles[row] == Role.NEWLINE) & (pair[row] == i)).sum()
            assert n_newlines == (i < 3)  # none after the query
        instruction = decoded(tokenizer, prompts, row, roles[row] == Role.PROMPT)
        assert instruction.replace(" ", "").strip() == head.replace(" ", "")
    # Every token has one role, and the six masks cover the prompt once.
    assert (sum(np.asarray(prompts.mask(role), int) for role in Role) == 1).all()
    assert ((pair >= 0) == np.isin(roles, [Role.INPUT, Role.ARROW, Role.OUTPUT, Role.NEWLINE])).all()


def test_known_prompt_of_the_word_tokenizer(words):
    task = Task("t", (("South Africa", "Pretoria"), ("New Zealand", "Wellington")), "", "test")
    prompts = make_prompts(task, words, n_prompts=1, n_shots=1, seed=0, length=20)
    first, second = ("South Africa", "Pretoria"), ("New Zealand", "Wellington")
    if prompts.texts[0].endswith("Pretoria"):
        first, second = second, first
    assert prompts.texts == (f"Follow the pattern:\n{first[0]} -> {first[1]}\n{second[0]} -> {second[1]}",)
    names = words.convert_ids_to_tokens(prompts.tokens[0].tolist())
    body = [*first[0].split(), "->", first[1], "\n", *second[0].split(), "->", second[1]]
    assert names == ["<bos>", "Follow", "the", "pattern", ":", "\n", *body, "<pad>", "<pad>", "<pad>", "<pad>", "<pad>"]
    # BOS, instruction, input input arrow output newline, input input arrow output, padding
    assert prompts.roles[0].tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 3, 4, 5, 2, 2, 3, 4, 0, 0, 0, 0, 0]
    assert prompts.pair[0].tolist() == [-1] * 6 + [0] * 5 + [1] * 4 + [-1] * 5
    assert jnp.flatnonzero(prompts.answer[0]).tolist() == [14]
    assert prompts.query_arrow.tolist() == [13]
    assert jnp.flatnonzero(prompts.mask(Role.INPUT)[0]).tolist() == [6, 7, 11, 12]
    assert jnp.flatnonzero(prompts.mask(Role.INPUT, "last")[0]).tolist() == [7, 12]
    assert jnp.flatnonzero(prompts.mask(Role.INPUT, "first")[0]).tolist() == [6, 11]
    assert (prompts.task, prompts.n_shots) == ("t", 1)


def test_tokenizer_without_bos_and_pad(pythia):
    prompts = make_prompts(TASKS["person_country"], pythia, n_prompts=8, n_shots=2, seed=0)
    for row, text in enumerate(prompts.texts):
        ids = pythia(text, add_special_tokens=False)["input_ids"]
        assert prompts.tokens[row].tolist() == ids + [0] * (prompts.tokens.shape[1] - len(ids))
        assert prompts.roles[row].tolist()[0] == Role.PROMPT
        assert set(prompts.roles[row].tolist()[len(ids) :]) <= {0}


def test_offsets_with_and_without_the_space_agree():
    rows = []
    for trim in (True, False):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(trim))
        if not trim:  # the space is then part of the offsets, and still belongs to its word
            offsets = tokenizer("a -> b", return_offsets_mapping=True)["offset_mapping"]
            assert offsets[1][0] == 1
        rows.append(make_prompts(TASKS["en_fr"], tokenizer, n_prompts=6, n_shots=4, seed=0))
    assert rows[0].tokens.tolist() == rows[1].tokens.tolist()
    assert rows[0].roles.tolist() == rows[1].roles.tolist()
    assert rows[0].pair.tolist() == rows[1].pair.tolist()


def test_lone_space_belongs_to_the_word_it_precedes():
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"->|\n| |\w+|:"), "isolated")
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["<unk>"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    prompts = make_prompts(Task("t", (("a", "b"),), "", "test"), fast, n_prompts=1, n_shots=0, seed=0)
    # "a", " ", "->", " ", "b" after the instruction "Follow", " ", "the", " ", "pattern", ":", newline
    assert prompts.roles[0].tolist() == [1] * 7 + [2, 3, 3, 4, 4]


def test_sampling(words):
    task = TASKS["country_currency"]
    shots, queries = task.pool("extraction"), task.pool("evaluation")
    args = dict(n_prompts=30, n_shots=10, pool="extraction", query_pool="evaluation")
    prompts = make_prompts(task, words, seed=3, **args)
    assert prompts.texts == make_prompts(task, words, seed=3, **args).texts
    assert prompts.texts != make_prompts(task, words, seed=4, **args).texts
    for text in prompts.texts:
        *examples, query = [tuple(line.split(" -> ")) for line in text.split("\n")[1:]]
        assert len(set(examples)) == 10 and set(examples) <= set(shots) and query in queries
    # All 64 pairs in one prompt: each once, the query not among the examples.
    text = make_prompts(task, words, n_prompts=1, n_shots=63, seed=0).texts[0]
    assert sorted(text.split("\n")[1:]) == sorted(f"{x} -> {y}" for x, y in task.pairs)


def test_dummy_line(tokenizer):
    template = Template(dummy=("X", "Y"))
    prompts = make_prompts(TASKS["algo_last"], tokenizer, n_prompts=3, n_shots=1, seed=0, template=template)
    plain = make_prompts(TASKS["algo_last"], tokenizer, n_prompts=3, n_shots=1, seed=0)
    assert all(text.startswith("Follow the pattern:\nX -> Y\n") for text in prompts.texts)
    dummy = np.asarray(prompts.pair) == -2
    for row in range(3):
        assert decoded(tokenizer, prompts, row, dummy[row]).split() == ["X", "->", "Y"]
        roles = np.asarray(prompts.roles)[row][dummy[row]]
        assert (np.diff(roles) >= 0).all() and set(roles) == {Role.INPUT, Role.ARROW, Role.OUTPUT, Role.NEWLINE}
        position = int(prompts.dummy_output[row])
        assert tokenizer.decode([int(prompts.tokens[row, position])]).strip() == "Y"
    assert (np.asarray(prompts.query_arrow) == np.asarray(plain.query_arrow) + dummy.sum(axis=1)).all()
    with pytest.raises(ValueError, match="no dummy line"):
        plain.dummy_output  # noqa: B018


def test_query_arrow_precedes_the_answer(tokenizer):
    prompts = make_prompts(TASKS["en_it"], tokenizer, n_prompts=5, n_shots=2, seed=0)
    first_answer = np.asarray(prompts.answer).argmax(axis=1)
    assert (np.asarray(prompts.query_arrow) + 1 == first_answer).all()
    for row, text in enumerate(prompts.texts):
        assert decoded(tokenizer, prompts, row, prompts.answer[row]) == text.rsplit(" -> ", 1)[1]


def test_corrupt_prompts_change_the_shots_only(words):
    task = TASKS["en_es"]
    args = dict(n_prompts=6, n_shots=5, seed=0)
    clean, corrupt = make_prompts(task, words, **args), make_prompts(task, words, corrupt=True, **args)
    truth, outputs = dict(task.pairs), {y for _, y in task.pairs}
    for before, after in zip(clean.texts, corrupt.texts, strict=True):
        *old, old_query = before.split("\n")[1:]
        *new, new_query = after.split("\n")[1:]
        assert old_query == new_query
        assert [line.split(" -> ")[0] for line in old] == [line.split(" -> ")[0] for line in new]
        for line in new:
            x, y = line.split(" -> ")
            assert y != truth[x] and y in outputs
    with pytest.raises(ValueError, match="one output only, 'c'"):
        make_prompts(
            Task("t", (("a", "c"), ("b", "c")), "", "test"), words, n_prompts=1, n_shots=1, seed=0, corrupt=True
        )


def test_stacked_prompts(words):
    parts = [
        make_prompts(TASKS[name], words, n_prompts=3, n_shots=n, seed=0) for name, n in (("en_es", 2), ("algo_last", 4))
    ]
    stack = stack_prompts(parts)
    seq = max(p.tokens.shape[1] for p in parts)
    assert stack.tokens.shape == stack.roles.shape == stack.pair.shape == stack.answer.shape == (2, 3, seq)
    assert stack.task == ("en_es", "algo_last") and stack.n_shots == (2, 4) and stack.texts[1] == parts[1].texts
    for i, part in enumerate(parts):
        width = part.tokens.shape[1]
        assert stack.tokens[i, :, :width].tolist() == part.tokens.tolist()
        assert not stack.answer[i, :, width:].any() and set(stack.roles[i, :, width:].ravel().tolist()) <= {0}
        assert stack.query_arrow[i].tolist() == part.query_arrow.tolist()
    arrows = jax.vmap(lambda p: p.query_arrow)(stack)
    assert arrows.tolist() == stack.query_arrow.tolist()
    other = make_prompts(TASKS["en_es"], words, n_prompts=4, n_shots=2, seed=0)
    with pytest.raises(ValueError, match="one batch size, template and pad id"):
        stack_prompts([parts[0], other])
    with pytest.raises(ValueError, match="at least one"):
        stack_prompts([])


def test_other_texts_do_not_recompile(words):
    compiled = []

    @eqx.filter_jit
    def count(prompts):
        compiled.append(prompts.n_shots)
        return prompts.mask(Role.ARROW).sum()

    for name in ("en_es", "en_fr", "en_it"):
        assert count(make_prompts(TASKS[name], words, n_prompts=2, n_shots=3, seed=0, length=40)) == 8
    assert compiled == [3]


def test_clear_errors(words):
    task = TASKS["antonyms"]
    with pytest.raises(ValueError, match="has 13 pairs besides the query to draw 20 examples from"):
        make_prompts(task, words, n_prompts=1, n_shots=20, seed=0, pool="evaluation")
    with pytest.raises(ValueError, match="has 17 tokens, more than length=10"):
        make_prompts(task, words, n_prompts=1, n_shots=2, seed=0, length=10)
    with pytest.raises(ValueError, match="an empty pool"):
        make_prompts(task, words, n_prompts=1, n_shots=0, seed=0, pool=())
    with pytest.raises(ValueError, match="separator of a template needs a character other than a space"):
        Template(pair="{x} {y}")
    with pytest.raises(ValueError, match="scheme is 'all', 'first' or 'last', got 'middle'"):
        make_prompts(task, words, n_prompts=1, n_shots=0, seed=0).mask(Role.INPUT, "middle")

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow gives no character offsets"):
        make_prompts(task, Slow(), n_prompts=1, n_shots=0, seed=0)


def test_fused_separator_is_an_error():
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # keeps "hot->cold" in one piece
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["<unk>"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    task = Task("t", (("hot", "cold"),), "", "test")
    with pytest.raises(
        ValueError, match=r"the token 'hot->cold' of TokenizersBackend spans INPUT and ARROW and OUTPUT"
    ):
        make_prompts(task, fast, n_prompts=1, n_shots=0, seed=0, template=Template(pair="{x}->{y}"))


def test_other_templates(pythia):
    """The question-and-answer layout: a separator of two kinds of character, a prefix without newline."""
    template = Template(prefix="", pair="Q: {x}\nA: {y}", newline="\n\n")
    prompts = make_prompts(TASKS["antonyms"], pythia, n_prompts=2, n_shots=2, seed=0, template=template)
    for row, text in enumerate(prompts.texts):
        assert decoded(pythia, prompts, row, prompts.answer[row]) == text.rsplit("A: ", 1)[1]
        arrow = (np.asarray(prompts.roles[row]) == Role.ARROW) & (np.asarray(prompts.pair[row]) == 0)
        assert decoded(pythia, prompts, row, arrow) == "\nA:"


def reference_metrics(logits, prompts):
    """NLL of two tokens, accuracy and pair metric in numpy float64, one position at a time."""
    logits = np.asarray(logits, np.float64)
    tokens, roles, pair = (np.asarray(x) for x in (prompts.tokens, prompts.roles, prompts.pair))
    rows = []
    for b in range(len(tokens)):
        logp = logits[b] - np.log(np.exp(logits[b]).sum(axis=-1, keepdims=True))
        places = [s for s in range(tokens.shape[1]) if roles[b, s] == Role.OUTPUT and pair[b, s] == pair[b].max()]
        nll = -sum(logp[s - 1, tokens[b, s]] for s in places[:2])
        hit = logits[b, places[0] - 1].argmax() == tokens[b, places[0]]
        firsts = [
            min(s for s in range(tokens.shape[1]) if roles[b, s] == Role.OUTPUT and pair[b, s] == i)
            for i in range(1, pair[b].max() + 1)
        ]
        rows.append((nll, float(hit), np.mean([logp[s - 1, tokens[b, s]] for s in firsts])))
    return np.array(rows).T


def test_metrics_against_a_loop(metaspace, getkey):
    template = Template(dummy=("X", "Y"))
    prompts = make_prompts(TASKS["en_es"], metaspace, n_prompts=6, n_shots=3, seed=0, template=template)
    logits = jax.random.normal(getkey(), (*prompts.tokens.shape, len(metaspace)))
    # Make half of the answers right, so that accuracy is not all zeros.
    rows = jnp.arange(3)
    first = prompts.query_arrow[:3] + 1
    logits = logits.at[rows, first - 1, prompts.tokens[rows, first]].add(20.0)
    nll, hit, pairs = reference_metrics(logits, prompts)
    assert hit[:3].all() and not hit[3:].all()

    @eqx.filter_jit
    def measured(logits, prompts):
        return answer_nll(logits, prompts), answer_accuracy(logits, prompts), pair_logprob(logits, prompts)

    for ours, expected in zip(measured(logits, prompts), (nll, hit, pairs), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
    # A leading axis of tasks, given whole or mapped over.
    stack, both = stack_prompts([prompts, prompts]), jnp.stack([logits, logits])
    for ours, mapped, expected in zip(
        measured(both, stack), jax.vmap(measured)(both, stack), (nll, hit, pairs), strict=True
    ):
        np.testing.assert_allclose(ours[1], expected, rtol=1e-5)
        np.testing.assert_allclose(mapped[0], expected, rtol=1e-5)


def test_pair_accuracy_counts_the_pairs_whose_first_token_is_most_probable(words, getkey):
    prompts = make_prompts(TASKS["en_es"], words, n_prompts=2, n_shots=3, seed=0)
    logits = jax.random.normal(getkey(), (*prompts.tokens.shape, len(words)))
    at = np.asarray(prompts.mask(Role.OUTPUT, "first") & (prompts.pair > 0))
    places = [np.flatnonzero(row) for row in at]
    right = [(0, places[0][1]), (1, places[1][0]), (1, places[1][2])]  # one of three pairs, and two
    wrong = [(b, s) for b in (0, 1) for s in places[b] if (b, s) not in right]
    for b, s in right:
        logits = logits.at[b, s - 1, prompts.tokens[b, s]].add(20.0)
    for b, s in wrong:
        logits = logits.at[b, s - 1, (prompts.tokens[b, s] + 1) % len(words)].add(20.0)
    np.testing.assert_allclose(pair_accuracy(logits, prompts), [1 / 3, 2 / 3], rtol=1e-6)


def test_pair_logit_ignores_what_a_softmax_ignores_and_does_not_saturate(words, getkey):
    prompts = make_prompts(TASKS["en_es"], words, n_prompts=3, n_shots=3, seed=0)
    logits = jax.random.normal(getkey(), (*prompts.tokens.shape, len(words)))
    at = np.asarray(prompts.mask(Role.OUTPUT, "first") & (prompts.pair > 0))
    rows = [(b, s) for b, s in zip(*np.nonzero(at), strict=True)]
    expected = [
        np.mean([logits[b, s - 1, prompts.tokens[b, s]] - logits[b, s - 1].mean() for b, s in rows if b == i])
        for i in range(3)
    ]
    np.testing.assert_allclose(pair_logit(logits, prompts), expected, rtol=1e-5)
    shift = jax.random.normal(getkey(), (*prompts.tokens.shape, 1))
    np.testing.assert_allclose(pair_logit(logits + jnp.broadcast_to(shift, logits.shape), prompts), expected, rtol=1e-4)
    sure = 100 * jax.nn.one_hot(jnp.roll(prompts.tokens, -1, axis=1), len(words))
    slope = lambda metric: float(jnp.abs(jax.grad(lambda x: metric(x, prompts).sum())(sure)).max())
    assert slope(pair_logprob) < 1e-6 and slope(pair_logit) > 0.1


def test_token_logprobs_are_float32_and_normalised(getkey):
    logits = 30 * jax.random.normal(getkey(), (2, 5, 7), jnp.float32)
    every = jnp.stack([token_logprobs(logits, jnp.full((2, 5), v, jnp.int32)) for v in range(7)])
    assert every.shape == (7, 2, 4) and every.dtype == jnp.float32
    np.testing.assert_allclose(jnp.exp(every).sum(axis=0), np.ones((2, 4)), rtol=1e-5)
    half = token_logprobs(logits.astype(jnp.bfloat16), jnp.zeros((2, 5), jnp.int32))
    assert half.dtype == jnp.float32


def test_pair_metric_needs_examples(words):
    prompts = make_prompts(TASKS["en_es"], words, n_prompts=2, n_shots=0, seed=0)
    with pytest.raises(ValueError, match="n_shots >= 1"):
        pair_logprob(jnp.zeros((*prompts.tokens.shape, 10)), prompts)


def test_no_input_is_shown_twice_in_a_prompt(words):
    base = TASKS["antonyms"].pairs[:12]
    task = Task("t", base * 2, "", "test")
    several = Task("s", (*base, *((x, "Spain") for x, _ in base[:6])), "", "test")  # inputs with two outputs
    for t in (task, several):
        prompts = make_prompts(t, words, n_prompts=200, n_shots=4, seed=0)
        lines = [text.split("\n")[1:] for text in prompts.texts]
        assert all(len({line.split(" -> ")[0] for line in prompt}) == 5 for prompt in lines)
    shown = {line for prompt in lines for line in prompt}
    assert {f"{x} -> {y}" for x, y in several.pairs} == shown, "each of the outputs is shown in some prompt"
    with pytest.raises(ValueError, match="has 11 pairs besides the query to draw 12 examples from"):
        make_prompts(task, words, n_prompts=1, n_shots=12, seed=0)
    corrupt = make_prompts(several, words, n_prompts=50, n_shots=4, seed=0, corrupt=True)
    true = {f"{x} -> {y}" for x, y in several.pairs}
    assert not any(line in true for text in corrupt.texts for line in text.split("\n")[1:-1])


def test_prompts_longer_than_the_context_are_refused(words):
    args = dict(n_prompts=3, n_shots=2, seed=0)
    n = make_prompts(TASKS["antonyms"], words, **args).tokens.shape[1]
    assert make_prompts(TASKS["antonyms"], words, n_ctx=n, **args).tokens.shape == (3, n)
    with pytest.raises(
        ValueError, match=rf"'antonyms' with 3 pairs are {n} tokens .* context of {n - 1}: lower n_shots$"
    ):
        make_prompts(TASKS["antonyms"], words, n_ctx=n - 1, **args)
    with pytest.raises(ValueError, match=rf"{n + 2} tokens .* context of {n}: lower n_shots or length$"):
        make_prompts(TASKS["antonyms"], words, n_ctx=n, length=n + 2, **args)


def test_padding_counts_nowhere_without_a_padding_id(getkey):
    """A Llama whose config and tokenizer name no padding id, and a tokenizer whose end of text is another than the
    config's.
    """
    pieces = dict.fromkeys(["the", "<s>", "</s>", "<unk>", *"".join(CORPUS).replace("\n", " \n ").split(" ")])
    raw = to_hf(tiny_config("llama", d_vocab=len(pieces), n_ctx=80), "float32") | {"bos_token_id": 1, "eos_token_id": 2}
    config = from_hf({key: value for key, value in raw.items() if key != "pad_token_id"})
    model, site = Transformer.init(config, key=getkey()), Site("resid_post", 1)
    for end, n_default in (("</s>", True), ("<unk>", False)):
        backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
        )
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=end, unk_token="<unk>")
        prompts = make_prompts(TASKS["location_country"], fast, n_prompts=16, n_shots=3, seed=0, n_ctx=config.n_ctx)
        n = sum(len(fast(text, add_special_tokens=False)["input_ids"]) for text in prompts.texts)
        assert int(prompts.real.sum()) == n < prompts.tokens[:, 1:].size, "some prompts are padded"
        assert len(harvest(model, prompts.tokens, [site], prompts.real)[site]) == n
        assert (len(harvest(model, prompts.tokens, [site])[site]) == n) == n_default
        assert (prompts.pad_id == config.pad_id) == n_default


def test_a_prefix_may_bring_its_bos(words):
    plain = make_prompts(TASKS["antonyms"], words, n_prompts=3, n_shots=2, seed=0)
    for own in ("<bos>", "<bos><bos>", "<bos> <bos> "):
        template = Template(prefix=f"{own}Follow the pattern:\n")
        prompts = make_prompts(TASKS["antonyms"], words, n_prompts=3, n_shots=2, seed=0, template=template)
        assert prompts.tokens.tolist() == plain.tokens.tolist() and prompts.roles.tolist() == plain.roles.tolist()
