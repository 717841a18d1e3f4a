"""Free a context of pyOpenSSL while a client is between two hellos; print the negotiated version and cipher."""

import contextlib
import gc
import ssl
import sys

from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

from rtservice.net.tls import DirectoryTLS

server = DirectoryTLS(sys.argv[1], library="pyopenssl").load().context
# Clients support it but send no share of it: the server requests a second hello.
server._context.set_tmp_ecdh(ec.SECP384R1())
client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
near = client.wrap_bio(to_client, to_server, server_hostname="a.example")
far = SSL.Connection(server._context, None)
far.set_accept_state()


def turn(end):
    if end is far:
        far.bio_write(to_server.read())
        with contextlib.suppress(SSL.WantReadError):
            far.do_handshake()
        to_client.write(far.bio_read(1 << 16))
        return
    with contextlib.suppress(ssl.SSLWantReadError):
        end.do_handshake()


turn(near)
turn(far)
assert far.get_context() is not server._context  # the first hello was handled
del server
gc.collect()
for end in (near, far, near):
    turn(end)
print(near.version(), near.cipher()[0])
