"""Sphinx configuration: `sphinx-build -W -n --keep-going -b html docs build/docs` builds the documentation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "rtservice"
copyright = "the rtservice authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "generated"]
exclude_patterns = ["_build", "README.md"]
nitpicky = True
# autodoc names the types of Twisted, zope.interface and pytest, whose documentation is not part of this one.
nitpick_ignore_regex = [
    (r"py:(class|obj|exc)", r"(twisted|zope|pytest|ssl|socket|pathlib|collections|typing|builtins)(\..*)?")
]

# Headings can be linked to: `reference/listen.md#tls`.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist", "fieldlist", "colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
# The docstrings put code between single backticks.
default_role = "code"

html_theme = "furo"
html_title = "rtservice"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sphinx = False
