"""Bytes and sockets; knows nothing of services, settings or logs of connections."""
