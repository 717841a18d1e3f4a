"""Free a context while a client is between two hellos; print the negotiated version and cipher."""

import contextlib
import gc
import ssl
import sys

from rtservice.net.tls import DirectoryTLS

server = DirectoryTLS(sys.argv[1]).load().context
server.set_ecdh_curve("secp384r1")  # clients support it but send no share of it: the server requests a second hello
client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
near = client.wrap_bio(to_client, to_server, server_hostname="a.example")
far = server.wrap_bio(to_server, to_client, server_side=True)


def turn(end):
    with contextlib.suppress(ssl.SSLWantReadError):
        end.do_handshake()


turn(near)
turn(far)
assert far.context is not server  # the first hello was handled
del server
gc.collect()
for end in (near, far, near):
    turn(end)
print(near.version(), near.cipher()[0])
