"""Contexts of pyOpenSSL, for Twisted's own TLS: what `tls` makes of `ssl`, with the same policy."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

from OpenSSL import SSL
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from twisted.protocols.tls import TLSMemoryBIOProtocol
from zope.interface import implementer


@implementer(IOpenSSLServerConnectionCreator)
class PyOpenSSLContext:
    """What connections are made of that show one certificate.

    `certificates`, `private_key` and `client_ca` are names of PEM files, `options` are OpenSSL's SSL_OP_ bits.
    """

    def __init__(
        self,
        *,
        certificates: str,
        private_key: str,
        client_ca: str | None,
        minimum: ssl.TLSVersion,
        ciphers: str,
        options: int,
        alpn: tuple[str, ...],
    ) -> None:
        context = self._context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(minimum)
        context.set_cipher_list(ciphers.encode())
        # No sessions are resumed, as on Twisted's own listeners: protocols that bind to the channel (RFC 5929) rely on
        # that.
        context.set_options(options | SSL.OP_NO_TICKET)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.use_certificate_chain_file(certificates)
        context.use_privatekey_file(private_key)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
        if alpn:
            ours = [name.encode("ascii") for name in alpn]

            def choose(connection: SSL.Connection, offered: list[bytes]) -> Any:
                return next((name for name in ours if name in offered), SSL.NO_OVERLAPPING_PROTOCOLS)

            context.set_alpn_select_callback(choose)

    def find_by_name(self, find: Callable[[str], PyOpenSSLContext | None]) -> None:
        """Have another context in this one's place for a client that asks for a name, if `find` gives one."""

        def choose(connection: SSL.Connection) -> None:
            name = connection.get_servername()
            found = name and find(name.decode("ascii", "replace"))
            if found:
                connection.set_context(found._context)

        self._context.set_tlsext_servername_callback(choose)

    def serverConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        """Called by Twisted's layer."""
        return SSL.Connection(self._context, None)
