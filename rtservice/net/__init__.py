"""Sockets, listeners, connections, TLS and the reactor. No settings, no workers, no log records of connections."""
