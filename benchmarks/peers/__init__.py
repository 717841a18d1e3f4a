"""Echo servers to compare with, each the ordinary good program of its platform.

All listen on 127.0.0.1 at the port given as first argument, greet with ``Hello from the server!``, echo every
byte in order, close when the client has finished, and speak TLS when a key file and a certificate file follow
(except the one in C). The Twisted one takes an endpoint description from its environment instead.
"""
