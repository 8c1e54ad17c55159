"""Every kind of tokenizer through the same role code, with words of any script and other templates."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from icl_lib.models import Site, Transformer, run_with_cache, tiny_config
from icl_lib.tasks import Role, Task, Template, load_tasks, make_prompts
from icl_lib.tasks.template import Span, tokenise
from icl_lib.vectors import task_vector
from icl_lib.vectors.insert import cut
from tests.tokenizer_files import CHAT, NAMES, tokenizer

ACCENTS, CJK, RTL = "éèñçüßøıŁ", "日本語中文한국어かな、。", "שלוםمرحباالعربية"
MARKS = "\u0301\u0308\u0323\u0338"  # combine with the letter before
EMOJI = ["🙂", "👩\u200d🔬", "🇫🇷", "𐍈", "❤\ufe0f"]
PIECES = [
    *"abcXYZ09 .,;:'\"()<>-|",
    "->",
    "=>",
    "\u00a0",
    *ACCENTS,
    *CJK,
    *RTL,
    *MARKS,
    *EMOJI,
    "New York",
    "antonyms",
    "<0x0A>",
]
words = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join).filter(str.strip)
pairs = st.lists(st.tuples(words, words), min_size=1, max_size=4, unique_by=lambda pair: pair[0])

HENDEL = Template(prefix="", pair="example:{x}->{y}")
TODD = Template(prefix="", pair="Q: {x}\nA: {y}", newline="\n\n")
GEMMA_2 = Template(prefix="<start_of_turn>user\nFollow the pattern:\n")
PHI_3 = Template(prefix="<|user|>\nFollow the pattern:\n")
# A tokenizer that makes one <unk> of all unknown neighbours needs known marks between them; its vocabulary has no line
# end and no ">".
UNKNOWING = Template(prefix="Follow the pattern, ", pair="{x} , {y}", newline=" ; ")


def template_of(name):
    return UNKNOWING if name == "sentencepiece_test" else Template()


LENGTH = 640  # of all prompts here, so that array operations compile once


def checked(name, pairs, template):
    """Prompts of the pairs, the last one the query, with every property that no tokenizer may break."""
    tok = tokenizer(name)
    rest = pairs[:-1]
    task = Task("t", tuple(pairs), "", "test")
    prompts = make_prompts(
        task,
        tok,
        n_prompts=2,
        n_shots=len(rest),
        seed=0,
        pool=rest or None,
        query_pool=pairs[-1:],
        template=template,
        length=LENGTH,
    )
    for row, text in enumerate(prompts.texts):
        ids, roles, pair = (np.asarray(a[row]).tolist() for a in (prompts.tokens, prompts.roles, prompts.pair))
        encoded = tok(text, add_special_tokens=False, return_offsets_mapping=True)
        own = tok.bos_token_id is not None and tok.bos_token_id != tok.eos_token_id
        n = own + len(encoded["input_ids"])
        pad = next(i for i in (tok.pad_token_id, tok.eos_token_id, 0) if i is not None)
        # the very tokens of the text, with BOS where there is one, and padding; nothing else
        assert ids == [tok.bos_token_id] * own + encoded["input_ids"] + [pad] * (len(ids) - n)
        assert roles[:own] + roles[n:] == [Role.OTHER] * (own + len(ids) - n)
        # one run of tokens per part, in order; only line ends, and a prefix that is empty, may have none
        runs = [key for key, _ in itertools.groupby(zip(roles[own:n], pair[own:n], strict=True))]
        wanted = [(span.role, span.pair) for span in template.layout([*rest, pairs[-1]])]
        assert [run for run in runs if run[0] not in (Role.NEWLINE, Role.PROMPT)] == [
            w for w in wanted if w[0] not in (Role.NEWLINE, Role.PROMPT)
        ]
        assert [w for w in wanted if w in runs] == runs
        # the answer: all that comes after the last arrow
        arrow = int(prompts.query_arrow[row])
        assert roles[arrow] == Role.ARROW and pair[arrow] == len(rest)
        assert np.flatnonzero(prompts.answer[row]).tolist() == list(range(arrow + 1, n))
        assert prompts.mask(Role.ARROW, "last")[row].sum() == prompts.mask(Role.ARROW, "first")[row].sum() == len(pairs)
    return prompts


def arrow_texts(name, prompts, row):
    """What the tokens of each arrow of a prompt cover in its text, by the tokenizer's own offsets."""
    tok, text = tokenizer(name), prompts.texts[row]
    offsets = tok(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    first = int(tok.bos_token_id is not None and tok.bos_token_id != tok.eos_token_id)
    roles, pair = np.asarray(prompts.roles[row])[first:], np.asarray(prompts.pair[row])[first:]
    found = []
    for i in range(pair.max() + 1):
        mine = [offsets[j] for j in np.flatnonzero((roles == Role.ARROW) & (pair == i))]
        found.append(text[mine[0][0] : mine[-1][1]].strip())
    return found


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(pairs=pairs)
def test_roles_survive_any_words(name, pairs):
    template = template_of(name)
    prompts = checked(name, pairs, template)
    for row in range(2):
        assert arrow_texts(name, prompts, row) == [template.separator.strip()] * len(pairs)


@pytest.mark.parametrize(
    "template", [HENDEL, TODD, GEMMA_2, PHI_3, Template(dummy=None, pair="{x} => {y}", newline=" ; ")]
)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "sentencepiece_test"])
def test_other_templates(name, template):
    """The formats of the other papers and of the chat models, with several-token separators."""
    for task in ("country_capital", "en_fr", "person_profession"):
        pairs = load_tasks("embedded")[task].pairs[:5]
        prompts = checked(name, list(pairs), template)
        wanted = template.separator.strip()
        if name == "small_wordpiece":
            continue  # it drops the line end in "\nA:"
        for row in range(2):
            assert arrow_texts(name, prompts, row) == [wanted] * 5


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sentencepiece_test"])
def test_every_pair_of_the_tasks(name):
    """No pair of a task is lost to a tokenizer in the paper's template."""
    suite = load_tasks("embedded").values()
    layouts = [Template().layout(task.pairs[i : i + 20]) for task in suite for i in range(0, len(task.pairs), 20)]
    for layout, row in zip(layouts, tokenise(layouts, tokenizer(name)), strict=True):
        kept = {(role, pair) for _, role, pair in row}
        assert {(span.role, span.pair) for span in layout} - kept <= {(Role.NEWLINE, i) for i in range(20)}


def test_special_tokens_of_the_prefix():
    for name, special, template in (
        ("small_gemma", CHAT[0], GEMMA_2),
        ("small_qwen", CHAT[0], GEMMA_2),
        ("small_qwen", CHAT[2], PHI_3),
    ):
        tok = tokenizer(name)
        prompts = checked(name, [("a", "b"), ("c", "d")], template)
        at = np.flatnonzero(np.asarray(prompts.tokens[0]) == tok.convert_tokens_to_ids(special))
        assert at.tolist() == [0 if tok.bos_token_id is None else 1]
        assert prompts.roles[0, at[0]] == Role.PROMPT


def test_a_prefix_that_brings_its_own_bos_gets_no_second_one():
    tok = tokenizer("small_gemma")
    task = Task("t", (("a", "b"),), "", "test")
    plain = make_prompts(task, tok, n_prompts=1, n_shots=0, seed=0)
    given_bos = make_prompts(
        task, tok, n_prompts=1, n_shots=0, seed=0, template=Template(prefix="<bos>Follow the pattern:\n")
    )
    assert plain.tokens.tolist() == given_bos.tokens.tolist() and plain.roles.tolist() == given_bos.roles.tolist()
    assert plain.tokens[0, 0] == tok.bos_token_id and plain.tokens[0, 1] != tok.bos_token_id


def test_line_end_merged_with_a_mark_belongs_to_the_word():
    """Qwen's ".\\n" is one token: it is the output's, and the pair has no newline token."""
    tok = tokenizer("small_qwen")
    (row,) = tokenise([Template().layout([("a", "b."), ("c", "d")])], tok)
    text = tok.convert_ids_to_tokens([t for t, _, pair in row if pair == 0])
    assert text[-1] == ".Ċ" and [role for _, role, pair in row if pair == 0][-1] == Role.OUTPUT
    assert (Role.NEWLINE, 0) not in {(role, pair) for _, role, pair in row}


def test_bytes_of_unknown_neighbours_are_told_apart():
    tok = tokenizer("small_unigram")  # 日, the line end and 本 are unknown, and come as seven bytes with one place
    (row,) = tokenise([Template().layout([("a", "日"), ("本", "b")])], tok)
    roles = [(role, pair) for _, role, pair in row]
    blank = tok.convert_ids_to_tokens([t for t, role, pair in row if (role, pair) == (Role.OUTPUT, 0)])
    assert [t for t in blank if t != "▁"] == ["<0xE6>", "<0x97>", "<0xA5>"]
    assert roles.count((Role.NEWLINE, 0)) == 1 and roles.count((Role.INPUT, 1)) == 3


@pytest.mark.parametrize(
    "name, pair, xy, message",
    [
        (
            "small_qwen",
            "{x}->{y}",
            ("a-", "b"),
            r"the token '.*->' of TokenizersBackend spans INPUT and ARROW in '.*a-->b'",
        ),
        ("small_wordpiece", "{x}\n{y}", ("a", "b"), r"TokenizersBackend gives no token for the ARROW '\\n' of pair 0"),
    ],
)
def test_merged_or_dropped_arrow_is_an_error(name, pair, xy, message):
    tok = tokenizer(name)
    if name == "small_qwen":  # a vocabulary that merges the arrow with a hyphen before it
        tok = type(tok)(tokenizer_object=merging())
    with pytest.raises(ValueError, match=message):
        tokenise([Template(pair=pair).layout([xy])], tok)


def merging():
    from tokenizers import Tokenizer, models

    vocab = {c: i for i, c in enumerate("ab->:\n FolwtheparnFX")} | {"--": 40, "-->": 41}
    return Tokenizer(models.BPE(vocab, [("-", "-"), ("--", ">")]))


def test_template_parts_and_errors():
    assert Template().parts == ("", " -> ", "") and Template().separator == " -> "
    assert TODD.layout([("a", "b"), ("c", "d")]) == [
        Span("Q: ", Role.PROMPT, -1),
        Span("a", Role.INPUT, 0),
        Span("\nA: ", Role.ARROW, 0),
        Span("b", Role.OUTPUT, 0),
        Span("\n\nQ: ", Role.NEWLINE, 0),
        Span("c", Role.INPUT, 1),
        Span("\nA: ", Role.ARROW, 1),
        Span("d", Role.OUTPUT, 1),
    ]
    text = lambda template, pairs: "".join(span.text for span in template.layout(pairs))
    assert text(HENDEL, [("a", "b"), ("c", "d")]) == "example:a->b\nexample:c->d"
    braces = Template(prefix="", pair="{{{x}}} -> [{y}]", newline="\n")
    assert braces.parts == ("{", "} -> [", "]") and text(braces, [("a", "b"), ("c", "d")]) == "{a} -> [b]\n{c} -> [d"
    for bad in (
        "{x} ->",
        "-> {y}",
        "{y} -> {x}",
        "{x} -> {y} {x}",
        "{x} -> {y} {z}",
        "{x!r} -> {y}",
        "{x:>9} -> {y}",
        "x -> y",
    ):
        with pytest.raises(ValueError, match=r"a text with one \{x\} and then one \{y\}"):
            Template(pair=bad)
    with pytest.raises(ValueError, match="cannot be read"):
        Template(pair="{x} -> {y")
    with pytest.raises(ValueError, match="newline of a template needs a character other than a space"):
        Template(newline=" ")


def test_vectors_are_read_and_cut_at_the_last_token_of_an_arrow(getkey):
    """The small unigram tokenizer needs three tokens for " ->"; only ">" has seen the whole of it."""
    tok = tokenizer("small_unigram")
    model = Transformer.init(tiny_config(d_vocab=len(tok), n_ctx=LENGTH), key=getkey())
    prompts = checked("small_unigram", [("a", "b"), ("cd", "e"), ("f", "gh")], Template())
    ids, roles = np.asarray(prompts.tokens), np.asarray(prompts.roles)
    assert (roles == Role.ARROW).sum() == 2 * 3 * 3
    last = np.asarray(prompts.mask(Role.ARROW, "last"))
    assert set(tok.convert_ids_to_tokens(ids[last].tolist())) == {">"} and last.sum() == 6
    _, cache = run_with_cache(model, prompts.tokens, [Site("resid_pre", 1)])
    ours = task_vector(model, prompts, [1])
    np.testing.assert_allclose(
        np.asarray(ours).ravel(), np.asarray(cache[Site("resid_pre", 1)])[last].mean(axis=0), rtol=1e-4, atol=1e-6
    )
    where = np.asarray(cut(model, prompts, 1).past.length)
    assert (
        where.tolist() == prompts.query_arrow.tolist() and (ids[[0, 1], where] == tok.convert_tokens_to_ids(">")).all()
    )
