"""Bounds on the cost of one TLS peer, for both TLS libraries."""

from __future__ import annotations

# Bytes to read in one event of a handshake, and to pass to OpenSSL in one event without counting the records in them.
# OpenSSL processes all records that it gets before it returns. The most expensive ones known, key updates (RFC 8446,
# section 4.6.3), have 27 bytes and cost 15 µs each.
FIRST_READ = 4 * 1024

# Bytes to read in one event once a peer has sent FIRST_READ bytes at a time: a record of the usual maximum size, and
# some more. With a larger buffer, the C library returns memory to the system more often.
FULL_READ = 20 * 1024

# Records with application data that are passed to OpenSSL in one event. Other records count more: of 128-byte records
# with handshake messages in TLS 1.2, half as many are passed.
MAX_RECORDS = 128

# The largest record (RFC 5246, section 6.2.3; it is smaller in RFC 8446, section 5.2), with its header.
MAX_RECORD = 5 + (1 << 14) + 2048

# Bytes that a client may send until its handshake is done. A chain of three certificates with post-quantum signatures
# (ML-DSA-65) and a ClientHello with a post-quantum key share need 25 KiB; the usual handshake needs 1 to 2 KiB.
MAX_HANDSHAKE_BYTES = 32 * 1024

# Limit of a client's certificate chain in bytes, with client certificates. Each certificate costs 0.1 to 0.9 ms before
# the client is authenticated (OpenSSL 3.0 decodes the public key of every certificate in a chain; a compressed point on
# P-224 is the worst, at 7 µs per byte). A client certificate and its authority's with ML-DSA-65 need 11 KiB; three
# certificates with RSA-2048 need 3 to 4 KiB.
MAX_CLIENT_CERTIFICATES = 12 * 1024

# Longest chain in bytes that is decoded in the reactor's thread; longer ones are decoded in another thread. Usual
# chains are longer, a single certificate with an ECDSA key is not.
MAX_INLINE_CERTIFICATES = 1024

# Bytes that a peer may send without application data: an incomplete record, key updates, warnings.
MAX_BYTES_WITHOUT_DATA = 64 * 1024

# Unsent bytes of TLS itself (answers to key updates, alerts) above which reading from the peer pauses.
MAX_UNSENT_ANSWERS = 16 * 1024

# Seconds without progress of these bytes after which the connection is aborted.
ANSWER_TIMEOUT = 60.0

# Reasons in logs and metrics.
HANDSHAKE_TOO_LARGE = "TLS handshake too large"
TOO_MUCH_WITHOUT_DATA = "too much TLS without data"
ANSWERS_NOT_READ = "TLS answers not read"
