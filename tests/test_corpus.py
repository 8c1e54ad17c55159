"""Text as packed contexts: what is in them, that a saved state goes on with the next token, shards, and texts that
cannot serve.
"""

import json

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from icl_lib.embedded.icl_tiny.language import BOS
from icl_lib.embedded.icl_tiny.stream import LanguageCorpus
from icl_lib.text.corpus import CorpusEnded, CorpusError, TextCorpus, open_text, rewind

WORDS = [f"w{i}" for i in range(50)]


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: i + 3 for i, word in enumerate(words)} | {"<pad>": 0, "<eos>": 1, "<bos>": 2}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(WORDS)


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
    """The contexts by the definition: tokens in order, a BOS after each document, rows behind a BOS, no BOS twice."""
    rows, row = [], [2]
    for token in [token for text in texts for token in [*(int(w[1:]) + 3 for w in text.split()), 2]]:
        row += [token] * (token != 2 or row[-1] != 2)
        if len(row) == seq:
            rows, row = [*rows, row], [2]
    return np.array(rows, np.int32)


def test_contexts_are_the_text_in_order(folder, tokenizer):
    corpus = TextCorpus(open_text(folder), tokenizer, 16, bos_id=2)
    expected = packed([t for shard in range(3) for t in documents(40, shard)], 16)
    rows = np.concatenate([corpus.batch(7) for _ in range(len(expected) // 7)])
    np.testing.assert_array_equal(rows, expected[: len(rows)])
    with pytest.raises(
        CorpusEnded, match=rf"ended after {len(rows)} contexts of 16 tokens.*are needed next \(read 1 time\)"
    ):
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
        second.load_state_dict(json.loads(json.dumps(second.state_dict())))  # nothing was read in between
        np.testing.assert_array_equal(second.batch(5), rows[5 * cut : 5 * cut + 5])
        rewind(second)
        np.testing.assert_array_equal(second.batch(5), rows[:5])


def test_processes_share_the_documents(folder, tokenizer, monkeypatch):
    seen = []
    for process in range(2):
        monkeypatch.setattr("jax.process_count", lambda: 2)
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        corpus = TextCorpus(open_text(folder), tokenizer, 601, bos_id=2)
        tokens = corpus.batch(1)[0, 1:]  # in one context every BOS is the end of a document
        text = " ".join("|" if t == 2 else WORDS[t - 3] for t in tokens)
        seen.append({d.strip() for d in text.split("|")[:-1]})
    everything = {t for shard in range(3) for t in documents(40, shard)}
    assert seen[0] and seen[1] and seen[0] | seen[1] <= everything
    assert {t for t in seen[0] & seen[1] if len(t) > 20} == set()


def test_text_that_cannot_serve(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "body": "w1 w2"}\n')
    with pytest.raises(
        CorpusError, match=r"no column of text named 'text'; its columns are id \(int\), body \(str\): pass text_column"
    ):
        TextCorpus(open_text(tmp_path / "a.jsonl"), tokenizer, 8, bos_id=2, name="a.jsonl")
    assert TextCorpus(open_text(tmp_path / "a.jsonl"), tokenizer, 3, bos_id=2, text_column="body").batch(
        1
    ).tolist() == [[2, 4, 5]]
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(CorpusError, match="is empty: there is no text"):
        open_text(tmp_path / "empty.jsonl")
    (tmp_path / "blank.txt").write_text("\n\n\n\n")
    with pytest.raises(CorpusError, match="ended after 0 contexts|is empty"):
        TextCorpus(open_text(tmp_path / "blank.txt"), tokenizer, 8, bos_id=2).batch(1)
    (tmp_path / "null.jsonl").write_text('{"text": null}\n{"text": ""}\n')
    with pytest.raises(
        CorpusError, match="null.jsonl is empty: there is no text in column 'text' of its first 1000 documents"
    ):
        TextCorpus(open_text(tmp_path / "null.jsonl"), tokenizer, 8, bos_id=2, name="null.jsonl")
    with pytest.raises(CorpusError, match=r"one kind \(.txt, .json, .jsonl, .parquet\); found: .jsonl, .txt"):
        open_text(tmp_path)
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    with pytest.raises(
        CorpusError, match="ended after 0 contexts of 64 tokens and 4 tokens more, but 1 contexts are needed"
    ):
        TextCorpus(open_text(tmp_path / "short.txt"), tokenizer, 64, bos_id=2).batch(1)
    with pytest.raises(CorpusError, match="BOS and at least one token"):
        TextCorpus(open_text(tmp_path / "short.txt"), tokenizer, 1, bos_id=2)


def test_documents_without_text_are_left_out(tmp_path, tokenizer):
    lines = [None, "", "w1 w2", None, "w3", *documents(100), None]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    rows = TextCorpus(open_text(tmp_path / "a.jsonl"), tokenizer, 8, bos_id=2).batch(100)
    np.testing.assert_array_equal(rows, packed([line for line in lines if line], 8)[:100])


def good(n: int = 20) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents(n))


@pytest.mark.parametrize(
    "kind, content, message",
    [
        ("jsonl", good() + '{"text": "w1\n', "b.jsonl cannot be read: JSON parse error"),
        (
            "jsonl",
            '{"body": "w1"}\n',
            "b.jsonl cannot be read: .*column names don't match|b.jsonl has no column of text named 'text'",
        ),
        ("json", '[{"text": "w1"}, {"te', "b.json cannot be read: "),
        ("txt", b"w1 caf\xe9", "b.txt cannot be read: 'utf-8' codec can't decode byte 0xe9"),
        ("parquet", b"garbage" * 99, "b.parquet cannot be read( as .parquet)?: .*not a parquet file"),
    ],
    ids=["broken", "column", "cut", "latin", "garbage"],
)
def test_a_broken_file_is_named(tmp_path, tokenizer, kind, content, message):
    """Whether it is the only file, so that it is met at once, or the second one of three, met after some reading."""
    alone, folder = tmp_path / "alone", tmp_path / "folder"
    for path in (alone, folder):
        path.mkdir()
        (path / f"b.{kind}").write_bytes(content if isinstance(content, bytes) else content.encode())
    for name in "ac":
        if kind == "parquet":
            Dataset.from_dict({"text": documents(20)}).to_parquet(str(folder / f"{name}.parquet"))
        else:
            (folder / f"{name}.{kind}").write_text("w1 w2\n\nw3" if kind == "txt" else good())
    for path in (alone, folder):
        with pytest.raises(CorpusError, match=message) as caught:
            corpus = TextCorpus(open_text(path), tokenizer, 8, bos_id=2)
            while True:
                corpus.batch(1)
        assert str(path / f"b.{kind}") in str(caught.value)


def test_a_document_that_is_not_text(tmp_path, tokenizer):
    """(In a file after the first one, `datasets` makes text of it: "5".)"""
    path = tmp_path / "b.jsonl"
    for value, message in (("5", "int, 5: correct it or leave it out"), ('["w1"]', r"list, \['w1'\]: correct it")):
        path.write_text(good(100) + f'{{"text": {value}}}\n')
        corpus = TextCorpus(open_text(path), tokenizer, 8, bos_id=2)
        with pytest.raises(CorpusError, match=f"b.jsonl has a document whose 'text' is not text but {message}"):
            while True:
                corpus.batch(1)


def test_a_broken_file_is_named_in_the_share_of_a_process(tmp_path, tokenizer, monkeypatch):
    for name in "abcd":
        (tmp_path / f"{name}.jsonl").write_text(good() + '{"text": "w1\n' * (name == "d"))
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    corpus = TextCorpus(open_text(tmp_path), tokenizer, 8, bos_id=2)
    with pytest.raises(CorpusError, match="d.jsonl cannot be read"):
        while True:
            corpus.batch(1)


def test_a_description_tells_texts_and_tokenizers_apart(folder, tokenizer):
    make = lambda path, tokenizer=tokenizer, **kw: TextCorpus(
        open_text(path), tokenizer, 16, bos_id=2, name="text", **kw
    )
    corpus, files = make(folder), sorted(folder.iterdir())
    description = corpus.describe()
    assert json.loads(json.dumps(description)) == description == make(files[0], epochs=2).describe(), (
        "the same first documents"
    )
    np.testing.assert_array_equal(corpus.batch(3), packed(documents(40), 16)[:3], "describing reads nothing")
    assert corpus.describe() == description
    differing = lambda other: {k for k, v in other.describe().items() if v != description[k]}
    assert differing(make(files[1])) == {"text"}
    assert differing(make(folder, make_tokenizer(WORDS[::-1]))) == {"tokenizer"}
    padded = make_tokenizer(WORDS)
    padded(["w1", "w2 w3"], padding=True, truncation=True, max_length=4)  # which the tokenizer keeps as its own setting
    assert differing(make(folder, padded)) == set()


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
    unread = LanguageCorpus(24, seed=3)
    for _ in range(2):
        rewind(unread)
        np.testing.assert_array_equal(unread.batch(300), rows[:300])
    fresh = LanguageCorpus(24, seed=3)
    fresh.load_state_dict(LanguageCorpus(24, seed=3).state_dict())
    np.testing.assert_array_equal(fresh.batch(2), rows[:2])


@pytest.mark.parametrize("bring", ["nothing", "<bos> ", "<bos> <bos> "])
def test_no_bos_follows_another_whoever_brings_it(tmp_path, bring):
    """Documents of one to five words in contexts of 32; a document of blanks has no token."""
    tokenizer = make_tokenizer(["<bos>", *WORDS])
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(1000)]
    own = "" if bring == "nothing" else bring
    lines = [json.dumps({"text": text}) for i in texts for text in [own + i] + ["   "] * (len(i) % 7 == 0)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    make = lambda: TextCorpus(open_text(tmp_path), tokenizer, 32, bos_id=bos)
    corpus, rows = make(), []
    for _ in range(8):  # a state at every kind of place
        rows.append(corpus.batch(9))
        state, corpus = json.loads(json.dumps(corpus.state_dict())), make()
        corpus.load_state_dict(state)
    rows = np.concatenate(rows)
    assert (rows[:, 0] == bos).all() and not ((rows[:, 1:] == bos) & (rows[:, :-1] == bos)).any()
    np.testing.assert_array_equal(make().batch(72), rows)
    words = tokenizer(" ".join(texts), add_special_tokens=False)["input_ids"]
    flat = rows[rows != bos]
    assert flat.tolist() == words[: len(flat)], "no word is lost"
    assert (rows[:, 1:] == bos).sum() > 400, "documents are still told apart"


def test_what_the_hub_leaves_in_a_folder_is_no_text(folder, tokenizer):
    rows = TextCorpus(open_text(folder), tokenizer, 16, bos_id=2).batch(20)
    hidden = folder / ".cache" / "huggingface" / "download"
    hidden.mkdir(parents=True)
    for name in ("0.jsonl", "0.json", "0.txt"):
        (hidden / name).write_text('{"etag": "w1"}\n')
    (folder / "dataset_infos.json").write_text("{}")
    np.testing.assert_array_equal(TextCorpus(open_text(folder), tokenizer, 16, bos_id=2).batch(20), rows)


@pytest.mark.parametrize("name", ["./text", "~/text", "/no/such/text", "a/b/text", "text/of.txt"])
def test_a_missing_text_is_never_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    with pytest.raises(CorpusError, match=f"no folder '{name}' here, where /.* pass a text file or a folder of them"):
        open_text(name)
