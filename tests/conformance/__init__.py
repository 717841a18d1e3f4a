"""Twisted's own tests on our reactor and our transports, beside the same tests on Twisted's.

`python -m tests.conformance` runs them and fails when anything that passes on Twisted's does not pass on ours.
"""
