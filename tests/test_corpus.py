"""Text as packed contexts: what is in them, that a saved state goes on with the next token, shards, and texts that cannot serve."""

import json

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from icl_lib.saes.corpus import CorpusError, TextCorpus, open_text
from icl_lib.tiny.language import BOS
from icl_lib.tiny.stream import LanguageCorpus

WORDS = [f"w{i}" for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i + 3 for i, word in enumerate(WORDS)} | {"<pad>": 0, "<eos>": 1, "<bos>": 2}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", pad_token="<pad>")


def documents(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(n)]


@pytest.fixture
def folder(tmp_path):
    """Three files of forty documents each, all different."""
    for shard in range(3):
        lines = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents(40, shard))]
        (tmp_path / f"{shard}.jsonl").write_text("".join(lines))
    return tmp_path


def packed(texts: list[str], seq: int) -> np.ndarray:
    """The contexts by the definition: every token in order, a BOS after each document, cut into rows behind a BOS."""
    flat = [token for text in texts for token in [*(int(w[1:]) + 3 for w in text.split()), 2]]
    n = len(flat) // (seq - 1)
    return np.array([[2, *flat[i * (seq - 1) : (i + 1) * (seq - 1)]] for i in range(n)], np.int32)


def test_contexts_are_the_text_in_order(folder, tokenizer):
    corpus = TextCorpus(open_text(folder), tokenizer, 16, bos_id=2)
    expected = packed([t for shard in range(3) for t in documents(40, shard)], 16)
    rows = np.concatenate([corpus.batch(7) for _ in range(len(expected) // 7)])
    np.testing.assert_array_equal(rows, expected[: len(rows)])
    with pytest.raises(CorpusError, match=rf"ended after {len(rows)} contexts of 16 tokens.*read 1 time\).*more epochs"):
        corpus.batch(7)


def test_a_model_without_bos_sees_plain_text(folder, tokenizer):
    rows = TextCorpus(open_text(folder), tokenizer, 16, bos_id=None).batch(20)
    flat = [int(w[1:]) + 3 for t in documents(40, 0) for w in t.split()]
    np.testing.assert_array_equal(rows.ravel()[:300], flat[:300])


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "txt"])
def test_state_goes_on_with_the_next_context(tmp_path, tokenizer, kind):
    texts = documents(150)
    path = tmp_path / f"text.{kind}"
    if kind == "json":  # one array of objects
        path.write_text(json.dumps([{"id": i, "text": t} for i, t in enumerate(texts)]))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    elif kind == "parquet":
        Dataset.from_dict({"text": texts}).to_parquet(str(path))
    else:
        path.write_text("\n\n".join(texts))

    def make():
        return TextCorpus(open_text(path), tokenizer, 8, bos_id=2, epochs=2)

    whole = make()
    rows = np.concatenate([whole.batch(5) for _ in range(130)])
    n = len(packed(texts, 8))
    assert len(rows) > n, "the second epoch is reached"
    np.testing.assert_array_equal(rows[:n], packed(texts, 8))
    for cut in (0, 1, 60, 100, 129):
        first, second = make(), make()
        for _ in range(cut):
            first.batch(5)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        np.testing.assert_array_equal(second.batch(5), rows[5 * cut : 5 * cut + 5])


def test_processes_share_the_documents(folder, tokenizer, monkeypatch):
    seen = []
    for process in range(2):
        monkeypatch.setattr("jax.process_count", lambda: 2)
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        corpus = TextCorpus(open_text(folder), tokenizer, 4, bos_id=2)
        tokens = np.concatenate([corpus.batch(1)[0, 1:] for _ in range(200)])
        text = " ".join("|" if t == 2 else WORDS[t - 3] for t in tokens)
        seen.append({d.strip() for d in text.split("|")[:-1]})
    everything = {t for shard in range(3) for t in documents(40, shard)}
    assert seen[0] and seen[1] and seen[0] | seen[1] <= everything
    assert {t for t in seen[0] & seen[1] if len(t) > 20} == set()


def test_text_that_cannot_serve(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "body": "w1 w2"}\n')
    with pytest.raises(CorpusError, match=r"no column of text named 'text'; its columns are id \(int\), body \(str\): pass text_column"):
        TextCorpus(open_text(tmp_path / "a.jsonl"), tokenizer, 8, bos_id=2, name="a.jsonl")
    assert TextCorpus(open_text(tmp_path / "a.jsonl"), tokenizer, 3, bos_id=2, text_column="body").batch(1).tolist() == [[2, 4, 5]]
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(CorpusError, match="is empty: there is no text"):
        open_text(tmp_path / "empty.jsonl")
    (tmp_path / "blank.txt").write_text("\n\n\n\n")
    with pytest.raises(CorpusError, match="ended after 0 contexts|is empty"):
        TextCorpus(open_text(tmp_path / "blank.txt"), tokenizer, 8, bos_id=2).batch(1)
    with pytest.raises(CorpusError, match=r"one kind \(.txt, .json, .jsonl, .parquet\); found: .jsonl, .txt"):
        open_text(tmp_path)
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    with pytest.raises(CorpusError, match="ended after 0 contexts of 64 tokens and 4 tokens more, but 1 contexts are needed"):
        TextCorpus(open_text(tmp_path / "short.txt"), tokenizer, 64, bos_id=2).batch(1)
    with pytest.raises(CorpusError, match="BOS and at least one token"):
        TextCorpus(open_text(tmp_path / "short.txt"), tokenizer, 1, bos_id=2)


def test_a_hub_that_cannot_be_reached_names_the_way_out(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(CorpusError, match=r"no text at 'HuggingFaceFW/fineweb'.*pass a folder of .txt"):
        open_text("HuggingFaceFW/fineweb", subset="sample-10BT")


def test_embedded_language_is_a_corpus_too():
    whole, parts = LanguageCorpus(24, seed=3), LanguageCorpus(24, seed=3)
    rows = whole.batch(600)
    assert rows.shape == (600, 24) and (rows[:, 0] == BOS).all()
    again = [parts.batch(250)]
    other = LanguageCorpus(24, seed=3)
    other.load_state_dict(json.loads(json.dumps(parts.state_dict())))
    again.append(other.batch(350))
    np.testing.assert_array_equal(np.concatenate(again), rows)
    assert (LanguageCorpus(24, seed=4).batch(600) != rows).any()
    fresh = LanguageCorpus(24, seed=3)
    fresh.load_state_dict(LanguageCorpus(24, seed=3).state_dict())
    np.testing.assert_array_equal(fresh.batch(2), rows[:2])
