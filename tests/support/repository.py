"""Directories of the repository, and of the package under test."""

from pathlib import Path

import rtservice

ROOT = Path(__file__).parents[2]
ETC = ROOT / "etc"
PACKAGE = Path(rtservice.__file__).parent
