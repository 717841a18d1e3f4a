"""A mark for tests that run with each version of TLS."""

import pytest

VERSIONS = pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
