"""Twisted's test suite on the reactor and the transports of rtservice, compared with Twisted's epoll reactor.

`python -m tests.conformance` runs it, and fails when a test that passes on Twisted's reactor does not pass on ours.
"""
