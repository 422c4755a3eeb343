"""Sphinx configuration: `python -m sphinx docs build/docs`."""

import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import jpyfunc

HERE = Path(__file__).parent
# Sphinx reads nothing outside of this folder. Git ignores the copies.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks")

project = "jpyfunc"
author = "the jpyfunc authors"
release = jpyfunc.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["**/.ipynb_checkpoints", "benchmarks/table.md"]  # included

# Pages are MyST. A link to a heading of any page is `[text](page.md#heading)`.
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3

# Notebooks are shown with the outputs that they are committed with. The tests run them.
nb_execution_mode = "off"

nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!jpyfunc).*")]
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
viewcode_follow_imported_members = True
add_module_names = False

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "jpyfunc"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
pygments_dark_style = "monokai"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def write_code_as_rst(_app: Any, *about: Any) -> None:
    """Turn the Markdown code spans of a docstring into links and literals."""
    lines = about[-1]

    def span(match: re.Match[str]) -> str:
        code, after = match.groups()
        public = code.removeprefix("jpyfunc.")
        role = f":py:obj:`{code} <jpyfunc.{public}>`" if public in PUBLIC else f"``{code}``"
        return role + ("\\ " + after if after else "")

    text = re.sub(r"(?<!`)`([^`]+)`(\w?)", span, "\n".join(lines))
    lines[:] = text.splitlines()


def write_mathml(writer: Any, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers show without a script from elsewhere."""
    formula = tex2mathml(node.astext())
    if isinstance(node, nodes.math_block):
        formula = formula.replace("<math ", '<math display="block" ', 1)
    writer.body.append(formula)
    raise nodes.SkipNode


PUBLIC = {name for name in vars(jpyfunc) if not name.startswith("_")}


def setup(app: Any) -> None:
    """Connect the hook, and add the renderer."""
    app.connect("autodoc-process-docstring", write_code_as_rst)
    app.add_html_math_renderer("mathml", (write_mathml, None), (write_mathml, None))
