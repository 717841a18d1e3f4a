"""Servers for comparison, each written as is usual for its platform.

All listen on 127.0.0.1 at the port in the first argument, with TCP_NODELAY, and greet with ``Hello from the server!``.

``echo_*`` echo every byte in order, close after the client's FIN, and use TLS if a key file and a certificate file
follow (except the one in C). The Twisted server takes an endpoint description from its environment instead.

``broadcast*`` send each line of a client to all clients. If the port of Redis follows, the clients of all processes get
it, through Pub/Sub.
"""
