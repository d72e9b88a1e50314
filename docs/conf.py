"""How Sphinx builds the site (`make docs`): README.md is its front page, and the pages are those of the repository."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
jax.Array.__name__ = jax.Array.__qualname__ = "Array"  # signatures would say jaxlib._jax.Array

from members import FOLDERS, draw_levels, members, reference  # noqa: E402

project = html_title = "jquant"
root_doc = "README"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["*.md", "docs/*.md", "docs/[!_]*/*.md", "experiments/notebooks/*.ipynb"]
exclude_patterns = [".*", "docs/_build"]
NOTEBOOKS = ("quantize_in_five_minutes", "your_own_rounding", "inside_gptq", "below_three_bits", "eight_devices")
CONTENTS = {
    "Guide": [
        f"docs/{page}" for page in ("tour", "methods", "interop", "extending", "training", "sweeps-and-pods", "speed")
    ],
    "Notebooks": [f"experiments/notebooks/{name}" for name in NOTEBOOKS],
    "Measured": [f"docs/{page}" for page in ("results", "reproducing", "benchmarks", "pods")],
    "Reference": ["docs/api", "CONTRIBUTING", "docs/mutants", "CHANGELOG"],
}

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # would be fetched from the network
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"
highlight_language = "none"
default_role = "py:obj"
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_use_ivar = True
napoleon_attr_annotations = False  # they are in the signature
html_theme = "furo"
html_copy_source = html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
# Unions whose names signatures would otherwise lack.
ALIASES = {
    "int | tuple[int, int] | ~typing.Literal['channel', 'tensor']": "~jquant.formats.Group",
    "~collections.abc.Sequence[tuple[str, str | ~jquant.composition.Method | None]]": "Rules",
}


def add_to_source(app: Any, docname: str, source: list[str]) -> None:
    """Adds what GitHub doesn't show: the contents, a member's levels, and its signature and docstring.

    Links to folders become text: the site has none.
    """
    folder, name = Path(docname).parent.name, Path(docname).name
    if docname == root_doc:
        for caption, pages in CONTENTS.items():
            there = [page for page in pages if any((ROOT / page).parent.glob(f"{Path(page).name}.[mi]*"))]
            source[0] += toctree("\n".join(there), caption)
    here = (ROOT / docname).parent
    source[0] = re.sub(r"\[([^]]+)\]\(([\w./-]+)\)", lambda m: m[1] if (here / m[2]).is_dir() else m[0], source[0])
    source[0] = re.sub(r"<!-- pages: (\S+) -->", lambda match: toctree(f"{match[1]}/*"), source[0])
    if folder in FOLDERS and name in members(folder):
        text, *tables = re.split(r"(?=<!-- table)", source[0])
        if folder == "formats":
            path = ROOT / "docs/_build/levels" / f"{name}.svg"
            draw_levels(name, path)
            text += f"![The levels of {name}](/{path.relative_to(ROOT)})\n\n"
        source[0] = "".join([text, *tables, "\n", reference(folder, name), "\n"])


def toctree(pages: str, caption: str = "") -> str:
    """A directive that lists pages in the site's contents, but not in the page itself."""
    caption = f":caption: {caption}\n" if caption else ""
    return f"\n```{{toctree}}\n:hidden:\n:glob:\n{caption}\n{pages}\n```\n" if pages else ""


def shorten(app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> tuple[Any, Any]:
    """A signature with the names of unions in place of their members."""
    for union, alias in ALIASES.items():
        signature = signature and signature.replace(union, alias)
    return signature, returns


def add_math(translator: Any, node: Any) -> None:
    """A formula as MathML, which browsers draw themselves; MathJax would be fetched from the network."""
    translator.body.append(tex2mathml(node.astext(), as_block=node.tagname == "math_block"))
    raise SkipNode


def add_index(app: Any, exception: Exception | None) -> None:
    """The front page under the name that browsers and servers look for."""
    if exception is None:
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Any) -> None:
    """Connects the functions above."""
    app.add_html_math_renderer("mathml", (add_math, None), (add_math, None))
    app.connect("source-read", add_to_source)
    app.connect("autodoc-process-signature", shorten)
    app.connect("build-finished", add_index)
