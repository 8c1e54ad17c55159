"""Notebooks as HTML pages by Sphinx, with myst-nb and the book theme: contents, previous and next, search, folded code.

The pages need no network: formulas are MathML, which browsers draw themselves, and the theme brings its own scripts.
"""

import shutil
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

_STYLE = """
.bd-main .bd-content .bd-article-container { max-width: 50rem; }
.bd-article h1 { font-size: 2rem; }
.bd-article h2 { font-size: 1.6rem; }
.bd-article h3 { font-size: 1.2rem; }
.bd-article figcaption p { color: var(--pst-color-text-base); font-weight: normal; }
details.hide summary .admonition-title { font-size: .85rem; font-weight: normal; }
math { font-size: 1.1em; }
math[display="block"] { font-size: 1em; margin: 1em 0; }
div.formula, div.wide, .cell_output div.output { overflow-x: auto; }
.cell_output pre { font-size: .8rem; white-space: pre-wrap; }
table.ledger { font-size: .9rem; }
@media (min-width: 40rem) { table.ledger td:nth-child(n+2) { white-space: nowrap; } }
table.ledger .holds { color: var(--pst-color-success, #00664b); }
table.ledger .misses { color: var(--pst-color-danger, #a33c00); font-weight: bold; }
"""


def mathml(tex: str, display: str) -> str:
    """A formula as MathML (`display` is "inline" or "block"); one that cannot be converted stays as its LaTeX."""
    try:
        formula = convert(tex, display=display)
    except Exception:  # the converter has no common base class; one odd formula should not cost the report
        formula = "\\"
    # the converter passes commands that it does not know through as text
    return f'<code class="latex">{escape(tex)}</code>' if "\\" in formula else formula


def setup(app: Sphinx) -> None:
    """This module as a Sphinx extension: formulas as MathML."""
    app.add_html_math_renderer("mathml", (_writer("inline"), None), (_writer("block"), None))


def _writer(display: str) -> Callable[[Any, nodes.Element], None]:
    def write(page: Any, node: nodes.Element) -> None:
        formula = mathml(node.astext(), display)
        page.body.append(f'<div class="formula">{formula}</div>' if display == "block" else formula)
        raise nodes.SkipNode

    return write


def build_pages(sources: Path, folder: Path, *, title: str, footer: str) -> None:
    """The pages of `sources` (`index.md` and the notebooks it lists) in `folder`, whose earlier content goes.

    What Sphinx finds amiss, a dead link for one, it says on stderr.
    """
    style = sources / "_static" / "report.css"
    style.parent.mkdir()
    style.write_text(_STYLE, encoding="utf-8")
    made = sources.with_name(f"{sources.name}.made")
    settings = {
        "extensions": ["myst_nb", __name__],
        "exclude_patterns": ["_static"],
        "html_css_files": ["report.css"],
        "html_copy_source": False,
        "html_math_renderer": "mathml",
        "html_show_copyright": False,
        "html_static_path": [str(style.parent)],
        "html_theme": "sphinx_book_theme",
        "html_theme_options": {
            "extra_footer": f"<p>{escape(footer)}</p>",
            "footer_content_items": ["extra-footer.html"],
            "home_page_in_toc": True,
            "navbar_persistent": [],
            "show_toc_level": 2,
            "use_download_button": False,
            "use_fullscreen_button": False,
        },
        "html_title": title,
        "html_use_index": False,
        "myst_enable_extensions": ["amsmath", "dollarmath"],
        "myst_heading_anchors": 3,
        "nb_code_prompt_hide": "Hide the code",
        "nb_code_prompt_show": "Code",
        "nb_execution_mode": "off",
        "nb_merge_streams": True,
        "nb_output_stderr": "remove",
        "nb_render_markdown_format": "myst",
        "project": title,
    }
    with patch_docutils(), docutils_namespace():
        args = (sources, None, made, sources / ".doctrees", "html", settings)
        Sphinx(*args, status=None, warning=sys.stderr).build()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    shutil.rmtree(made)
