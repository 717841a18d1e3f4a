"""Marks for tests that run with one or both TLS libraries."""

import importlib.util

import pytest

# BOTH skips pyOpenSSL where it is missing; LIBRARIES does not.
needs_pyopenssl = pytest.mark.skipif(
    importlib.util.find_spec("OpenSSL") is None, reason="pyOpenSSL (twisted[tls]) is not installed"
)


BOTH = pytest.mark.parametrize("library", ["ssl", pytest.param("pyopenssl", marks=needs_pyopenssl)])


LIBRARIES = pytest.mark.parametrize("library", ["ssl", "pyopenssl"])
