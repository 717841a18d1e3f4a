"""Contexts of pyOpenSSL for Twisted's TLS, with the same policy as the `ssl` contexts of `tls`."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL
from OpenSSL.crypto import X509StoreFlags
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from twisted.protocols.tls import TLSMemoryBIOProtocol
from zope.interface import implementer

from rtservice.net.groups import GROUP_LISTS, GroupPolicy
from rtservice.net.tls_bounds import MAX_CLIENT_CERTIFICATES, MAX_HANDSHAKE_BYTES


@implementer(IOpenSSLServerConnectionCreator)
class PyOpenSSLContext:
    """Server context with one certificate.

    `certificates`, `private_key`, `client_ca` and `client_crl` are paths of PEM files, `options` are OpenSSL's SSL_OP_
    bits. `max_handshake_bytes` is the number of bytes that a client may send until its handshake is done.
    """

    def __init__(
        self,
        *,
        certificates: str,
        private_key: str,
        client_ca: str | None,
        client_crl: str | None,
        minimum: ssl.TLSVersion,
        ciphers: str,
        options: int,
        alpn: tuple[str, ...],
    ) -> None:
        context = self._context = SSL.Context(SSL.TLS_SERVER_METHOD)
        # Certificate chains are decoded in the reactor's thread, and pyOpenSSL has no limit for them.
        self.max_handshake_bytes = (
            MAX_HANDSHAKE_BYTES if client_ca is None else MAX_CLIENT_CERTIFICATES + MAX_HANDSHAKE_BYTES // 8
        )
        context.set_min_proto_version(minimum)
        context.set_cipher_list(ciphers.encode())
        # No sessions are resumed, as on Twisted's TLS listeners. Protocols with channel binding (RFC 5929) rely on it.
        context.set_options(options | SSL.OP_NO_TICKET)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.use_certificate_chain_file(certificates)
        context.use_privatekey_file(private_key)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
        if client_crl is not None:
            context.load_verify_locations(client_crl)
            store = context.get_cert_store()
            assert store is not None  # a context is made with one
            store.set_flags(X509StoreFlags.CRL_CHECK | X509StoreFlags.CRL_CHECK_ALL)
        if alpn:
            supported = [name.encode("ascii") for name in alpn]

            def choose(connection: SSL.Connection, offered: list[bytes]) -> Any:
                for name in supported:
                    if name in offered:
                        return name
                # The sentinel NO_OVERLAPPING_PROTOCOLS would continue without a protocol. After an exception OpenSSL
                # sends the alert no_application_protocol (RFC 7301, section 3.2), and do_handshake raises it.
                raise SSL.Error([("SSL routines", "", "no application protocol")])

            context.set_alpn_select_callback(choose)

    def find_by_name(self, find: Callable[[str], PyOpenSSLContext | None]) -> None:
        """Select the context by SNI: `find` returns the context for a server name, or None to keep this one."""

        def choose(connection: SSL.Connection) -> None:
            name = connection.get_servername()
            found = name and find(name.decode("ascii", "replace"))
            if found:
                connection.set_context(found._context)

        self._context.set_tlsext_servername_callback(choose)

    def limit_groups(self, like_this: Callable[[], PyOpenSSLContext]) -> str | None:
        """Limit the key exchange groups. Returns a warning for the log, or None.

        `like_this` creates another context with the same arguments.
        """
        return _GROUPS.limit(self._context, lambda: like_this()._context)

    def serverConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        """Return a connection for Twisted's TLS layer, which calls this."""
        return SSL.Connection(self._context, None)


# --- groups ---


def _answer(context: SSL.Context, hello: bytes) -> bytes:
    connection = SSL.Connection(context, None)
    connection.set_accept_state()
    connection.bio_write(hello)
    with suppress(SSL.Error):
        connection.do_handshake()
    with suppress(SSL.Error):
        return connection.bio_read(1 << 16)
    return b""


def _below_pyopenssl(context: SSL.Context) -> bool:
    """Limit the groups through the OpenSSL bindings below pyOpenSSL, which has no API for this."""
    try:
        library: Any = vars(SSL)["_lib"]  # private
        pointer = context._context
        set_groups = library.SSL_CTX_set1_curves_list
        for groups in GROUP_LISTS:
            taken = set_groups(pointer, groups.encode("ascii"))
            library.ERR_clear_error()  # the queue of this thread: the next call would raise the error
            if taken == 1:
                return True
    except (KeyError, AttributeError, TypeError):
        pass
    return False


def _by_curve(context: SSL.Context) -> bool:
    context.set_tmp_ecdh(ec.SECP256R1())
    return True


_GROUPS = GroupPolicy(
    answer=_answer,
    full=(_below_pyopenssl,),
    fallback=_by_curve,
    why=lambda: "this version of pyOpenSSL does not let them be chosen",
)
