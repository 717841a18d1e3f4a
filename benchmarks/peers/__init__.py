"""Echo servers for comparison, each written as is usual for its platform.

All listen on 127.0.0.1 at the port in the first argument, greet with ``Hello from the server!``, echo every byte in
order, close after the client's FIN, and use TLS if a key file and a certificate file follow (except the one in C). The
Twisted server takes an endpoint description from its environment instead.
"""
