"""The front page and the documents around it: links, commands, snippets, numbers and verdicts are so."""

import ast
import contextlib
import io
import json
import re
import tomllib

import jax.numpy as jnp
import pytest
import yaml

from icl_lib.cards.card import notebook_files
from icl_lib.files.paths import root
from icl_lib.models import load_model, load_tokenizer
from icl_lib.tasks import load_tasks

PAGES = [root() / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((root() / "docs").glob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
README = PAGES[0].read_text("utf-8")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def _links(page):
    """(path, anchor) of every link and image of a page that leads into the repository, resolved."""
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text("utf-8"))):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


def _anchors(page):
    """What the forge makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text("utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_link_leads_somewhere(page):
    assert [str(path) for path, _ in _links(page) if not path.exists()] == []
    assert [anchor for path, anchor in _links(page) if anchor and anchor not in _anchors(path)] == []


def test_the_front_page_leads_to_every_page_and_notebook():
    linked = {path for path, _ in _links(PAGES[0])}
    assert {*PAGES[1:], *notebook_files(), root() / "LICENSE", root() / "CITATION.cff"} - linked == set()


@each_page
def test_commands_exist(page):
    """Targets of make, their cards, and modules with a `main()`."""
    text = page.read_text("utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", (root() / "Makefile").read_text("utf-8"), re.M))
    code = "\n".join(re.findall(r"`[^`\n]+`|^    .+$", text, re.M))
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", code)) - targets == set()
    cards = re.findall(r"CARD=([\w./-]+)", code)
    assert [c for c in cards if not (root() / c).is_file() and not (root() / "params" / f"{c}.yaml").is_file()] == []
    for name in set(re.findall(r"icl_lib\.commands\.(\w+)", text)):
        assert "def main(" in (root() / "icl_lib" / "commands" / f"{name}.py").read_text("utf-8"), name


@each_page
def test_named_files_exist(page):
    """Every path in backticks or in a command that starts at a folder of the repository (`runs/` is made by runs)."""
    folders = "|".join(p.name for p in root().iterdir() if p.is_dir() and p.name[0] != "." and p.name != "runs")
    named = set(
        re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]*\w", re.sub(r"\]\([^)]*\)", "", page.read_text("utf-8")))
    )
    assert [name for name in sorted(named) if not (root() / name).exists()] == []


@each_page
def test_snippets_run(page):
    """In order, in one namespace; what README says that they print is what they print, but for rounding."""
    names, printed, said = {}, io.StringIO(), ""
    for language, code in FENCED.findall(page.read_text("utf-8")):
        if language == "python":
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(page), "exec"), names)
        said += code if language == "text" else ""
    printed = printed.getvalue()
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", said)
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (printed, said)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.03), "the losses, and the latents by name"


def _ledger():
    return {e["key"]: e for e in json.loads((root() / "notebooks" / "ledger.json").read_text("utf-8"))}


def _claims():
    """The cells of every row of the table of claims."""
    table = re.search(r"<!-- claims.*?-->\n(.*?)<!-- /claims -->", README, re.S).group(1)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def _flat(value):
    """A ledger's value as numbers without sign; those of a text are read from it."""
    if isinstance(value, str):
        return [float(n) for n in NUMBER.findall(value)]
    return [abs(v) for v in value] if isinstance(value, list) else [] if value is None else [abs(value)]


def _is(shown, percent, value):
    """Whether a number as shown is the value, or the share in per cent, rounded to its digits."""
    half = 0.5 * 10.0 ** -len(shown.partition(".")[2]) + 1e-9
    return any(abs(float(shown) - v) <= half for v in ((value, 100 * value) if percent else (value,)))


each_claim = pytest.mark.parametrize("row", _claims(), ids=lambda row: row[-1])


@each_claim
def test_claims_are_those_of_the_ledger(row):
    notebook, _, ours, paper, bar, verdict, keys = row
    entries = [_ledger()[key] for key in re.findall(r"`([^`]+)`", keys)]
    assert {e["notebook"][:2] for e in entries} == {notebook}
    assert {e["holds"] for e in entries} == {verdict == "holds"} and verdict in ("holds", "**does not hold**")
    for cell, field in ((ours, "ours"), (paper, "published")):
        shown, values = NUMBER.findall(cell), [v for e in entries for v in _flat(e[field])]
        assert len(shown) == len(values), (cell, values)
        assert all(_is(s, "%" in cell, v) for s, v in zip(shown, values, strict=True)), (cell, values)
        assert all(e[field] in cell for e in entries if isinstance(e[field], str) and not _flat(e[field]))
    bars = [v for e in entries for v in _flat(e["criterion"])]
    assert all(any(_is(s, "%" in bar, v) for v in bars) for s in NUMBER.findall(bar)), (bar, bars)


def test_every_claim_that_fails_is_in_the_table():
    shown = {key for row in _claims() for key in re.findall(r"`([^`]+)`", row[-1])}
    assert {key for key, e in _ledger().items() if not e["holds"]} - shown == set()


def test_the_ledger_is_that_of_the_notebooks():
    entries = list(_ledger().values())
    assert {e["notebook"] for e in entries} == {path.stem for path in notebook_files()}
    held = sum(e["holds"] for e in entries)
    assert f"{held} of {len(entries)} criteria hold" in README


def test_times_are_those_that_were_measured():
    measured = (root() / "docs" / "speed.md").read_text("utf-8")
    assert [t for t in re.findall(r"\d+ min(?: \d+ s)?", README) if t not in measured] == []


def test_training_steps_are_as_fast_as_the_last_lines_of_the_benchmark():
    lines = [
        json.loads(x) for x in (root() / "benchmarks" / "results" / "sae_step.jsonl").read_text("utf-8").splitlines()
    ]
    last = {(f"{e['d_model']}, {e['d_sae']}, {e['batch']}", e["objective"]): e for e in lines}
    order = ("standard", "jumprelu", "gated", "topk", "batchtopk")
    rows = re.findall(
        r"^\| (\d+, \d+, \d+|\.\.\. share of .+?) \|(.+)\|$", (root() / "docs" / "speed.md").read_text("utf-8"), re.M
    )
    assert len(rows) == 4
    for shape, cells in rows:
        field, shape = ("limit_share", "2048, 16384, 1024") if shape.startswith("...") else ("ratio", shape)
        for objective, shown in zip(order, cells.split("|"), strict=True):
            assert _is(shown.strip(), False, last[shape, objective][field]), (shape, objective)


def test_the_citation():
    citation = yaml.safe_load((root() / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((root() / "pyproject.toml").read_text("utf-8"))["project"]
    assert {"cff-version", "message", "title", "type", "authors", "version", "license"} <= set(citation)
    assert citation["version"] == project["version"] and citation["license"] == project["license"]
    assert all(paper["title"] and paper["authors"] and paper["url"] in README for paper in citation["references"])


def test_the_opening_is_so():
    """The word that the model of the first sentence answers, and that it answers another without the examples."""
    model, tokenizer = load_model("icl-tiny"), load_tokenizer("icl-tiny")

    def answer(*lines):
        ids = tokenizer("\n".join(["Follow the pattern:", *lines]), add_special_tokens=False).input_ids
        return tokenizer.decode([int(model(jnp.asarray([[model.config.bos_id, *ids]]))[0, -1].argmax())]).strip()

    *lines, word = re.search(r"reads (.+?) answers \*(\w+)\*", README).groups()
    lines = re.findall("`(.+?)`", lines[0])
    assert len(lines) == 3 and answer(*lines) == word
    assert answer(lines[-1]) in dict(load_tasks("embedded")["en_it"].pairs).values()


def test_the_snippets_are_short():
    """What is asked for a first look: five lines, and about twenty."""
    lengths = [len(ast.parse(code).body) for language, code in FENCED.findall(README) if language == "python"]
    assert len(lengths) == 2 and lengths[0] == 5 and lengths[1] <= 20
