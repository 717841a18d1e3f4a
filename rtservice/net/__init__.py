"""Sockets, listeners, connections, TLS and the reactor. Imports no settings, workers or logs of connections."""
