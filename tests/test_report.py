"""The report: pages that open from the file system, without dead links, with what a reader needs and no more."""

import re
from html import unescape
from html.parser import HTMLParser
from urllib.parse import unquote

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from icl_lib.commands import report as command
from icl_lib.files.paths import root
from icl_lib.runs import Ledger, Store
from icl_lib.runs.pages import mathml
from icl_lib.runs.report import build

NOTEBOOKS = sorted((root() / "notebooks").glob("0*.ipynb"))
# two images that differ, as figures of a notebook do: 1 x 1 pixels
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk{}8+gAAAABJRU5ErkJggg=="
FETCHED = re.compile(r"(https?:)?//")


class Page(HTMLParser):
    """What a page refers to, where it can be referred to, and its images."""

    def __init__(self, text):
        super().__init__()
        self.text, self.ids, self.links, self.fetched, self.images = text, set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        self.links += [attrs[key] for key in ("href", "src") if attrs.get(key)]
        self.fetched += [attrs[key] for key in ("href", "src") if tag != "a" and attrs.get(key)]
        self.images += [attrs] if tag == "img" else []


def _pages(folder):
    return {path.name: Page(path.read_text()) for path in sorted(folder.glob("*.html"))}


def _dead(folder):
    """The references to files or anchors that are not there, each as (page, reference)."""
    pages, dead = _pages(folder), []
    for name, page in pages.items():
        for link in page.links:
            if re.match(r"(https?|mailto|data):|//", link):
                continue
            path, _, anchor = unquote(link).partition("#")
            path = path.partition("?")[0]
            target = pages.get(path or name)
            if not (folder / (path or name)).is_file() or (anchor and target and anchor not in target.ids):
                dead.append((name, link))
    return dead


def _figure(source, data="A", alt=None, **metadata):
    image = new_output(
        "display_data", {"image/png": PNG.format(data)}, metadata={"image/png": {"alt": alt}} if alt else {}
    )
    return new_code_cell(source, outputs=[image], metadata=metadata)


def _write(run_dir, name, cells):
    (run_dir / "notebooks").mkdir(parents=True, exist_ok=True)
    nbformat.write(
        new_notebook(cells=cells, metadata={"language_info": {"name": "python", "pygments_lexer": "ipython3"}}),
        run_dir / "notebooks" / f"{name}.ipynb",
    )


FORMULAS = r"""The error of $\hat x$ if $a < b$, a price of `$5`:

$$ L = \sum_i \mathrm{ReLU}(\pi_i), \qquad
   f = \begin{cases} p & p > \theta \\ 0 & \text{otherwise} \end{cases} $$

\begin{align} a &= b \end{align}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two notebooks, reported over an earlier report."""
    store = Store(tmp_path_factory.mktemp("runs") / "small", {"model": "some/model"})
    noise = new_output("stream", name="stderr", text="loud warning")
    caption = new_output("display_data", {"text/markdown": "**Figure 3.** Loss of *all* tasks at $x$."})
    cells = [
        new_markdown_cell("# Vectors & <tasks>\n\nSee [the next](03_b.ipynb) and [below](#the-end)."),
        new_code_cell("folded = 1", outputs=[noise]),
        new_code_cell("unseen = 1", metadata={"tags": ["remove-cell"]}),
        new_markdown_cell("## The middle\n\n```\n# no heading\n```"),
        _figure("draw()"),
        new_code_cell("say()", outputs=[caption]),
        new_markdown_cell("## The end"),
        _figure("draw_again()", "B"),
    ]
    _write(store.run_dir, "02_a", cells)
    _write(
        store.run_dir, "03_b", [new_markdown_cell(f"# Formulas\n\n{FORMULAS}"), _figure("x", alt="Said by the cell")]
    )
    ledger = Ledger(store, notebook="02_a")
    entry = dict(item="Fig 3b", published=3.78, ours=4.125, unit="latents")
    ledger.record("tvc_l0", criterion="ours < 5 & more", holds=True, **entry)
    ledger.record("other_tasks", criterion="none", holds=False, **entry)
    ledger.write()
    (store.run_dir / "report").mkdir()
    (store.run_dir / "report" / "09_old.html").write_text("of a notebook with another name")
    assert command.main([str(store.run_dir)]) == 0
    return store.run_dir


@pytest.fixture(scope="module")
def pages(run):
    return _pages(run / "report")


def test_no_link_is_dead_and_old_pages_are_gone(run, pages):
    assert _dead(run / "report") == []
    assert set(pages) == {"index.html", "search.html", "02_a.html", "03_b.html"}
    assert {"index.html", "02_a.html", "03_b.html"} <= set(pages["search.html"].links)  # the contents, on every page
    assert {"03_b.html", "#the-end"} <= set(pages["02_a.html"].links) and 'title="next page"' in pages["02_a.html"].text


def test_a_dead_link_is_found(run, tmp_path):
    (tmp_path / "p.html").write_text(
        '<a href="gone.html">x</a><a href="#gone">y</a><i id="there"></i><a href="#there">'
    )
    assert _dead(tmp_path) == [("p.html", "gone.html"), ("p.html", "#gone")]


def test_nothing_is_fetched_from_elsewhere(run, pages):
    for page in pages.values():
        assert [ref for ref in page.fetched if FETCHED.match(ref)] == []
        assert not re.search(r"@import|import\(|url\(\s*[\"']?(https?:)?//", page.text)
    for path in (run / "report").rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text()), path


def test_every_image_has_an_alternative_text(pages):
    alts = {name: [image.get("alt") for image in page.images] for name, page in pages.items()}
    assert alts["02_a.html"] == ["Loss of all tasks at x.", "Figure in the section: The end"]
    assert alts["03_b.html"] == ["Said by the cell"]
    assert alts["index.html"] == ["Figure in the section: The end", "Said by the cell"]


def test_formulas_are_mathml(pages):
    body = pages["03_b.html"].text.split("<article")[1].split("</article>")[0]
    assert body.count("<math") == 4 and body.count('display="block"') == 2
    assert "∑" in unescape(body) and "otherwise" in body and "<mo><</mo>" in unescape(body) and ">$5<" in body
    assert "\\" not in body and 'class="latex"' not in body
    assert "<math" in pages["02_a.html"].text  # of the caption


def test_code_is_folded_or_away_and_stderr_is_not_shown(pages):
    text = pages["02_a.html"].text
    assert "loud warning" not in text and "unseen" not in text
    outside = re.sub(r"<details.*?</details>", "", text, flags=re.S)
    assert "folded" in text and "folded" not in outside and "draw" not in outside


def test_the_front_page_has_the_ledger_in_words(run, pages):
    text = pages["index.html"].text
    assert "Vectors &amp; &lt;tasks&gt;" in text and "ours &lt; 5 &amp; more (Fig 3b)" in text
    assert "<b>tvc l0</b>" in text and "4.12 latents" in text and "3.78" in text
    assert "1 hold and 1 do not" in text and "1 of 2 criteria hold." in text and 'class="misses">does not hold' in text
    assert "This notebook records no number." in text


def test_figures_of_the_front_page_are_those_of_tagged_cells(tmp_path):
    cells = [_figure("one", "A", alt="tagged", tags=["report"]), _figure("two", "B", alt="other")]
    _write(tmp_path, "00_a", [new_markdown_cell("# A"), *cells])
    _write(tmp_path, "01_b", [new_markdown_cell("# B"), _figure("three", "C", alt="third")])
    index, _ = build(tmp_path)
    assert [image["alt"] for image in Page(index.read_text()).images] == ["tagged"]


def test_a_run_without_notebooks_says_how_to_make_them(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 2
    assert "holds no executed notebook" in capsys.readouterr().err


@pytest.mark.parametrize("tex", [r"\left( x", r"\nosuchcommand < x", r"\frac{"])
def test_a_formula_that_does_not_convert_stays_visible(tex):
    assert mathml(tex, "inline") == f'<code class="latex">{tex.replace("<", "&lt;")}</code>'


def test_the_notebooks_of_the_repository_have_no_dead_link_and_every_formula_converts(tmp_path, capfd):
    for notebook in NOTEBOOKS:
        cells = [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "markdown"]
        _write(tmp_path, notebook.stem, cells)
    build(tmp_path)
    assert capfd.readouterr().err == "" and _dead(tmp_path / "report") == []
    for name, page in _pages(tmp_path / "report").items():
        body = (page.text.split("<article") + [""])[1].split("</article>")[0]
        text = re.sub(r"<(code|pre)\b(?! class=\"latex\").*?</\1>", "", body, flags=re.S)
        assert "$" not in text and "\\" not in text and 'class="latex"' not in text, name
