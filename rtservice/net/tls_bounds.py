"""Bounds on what one TLS peer may cost, whichever library runs its TLS."""

from __future__ import annotations

# Bytes that are read in one event of a handshake, and that OpenSSL is given in one event without a look at the records
# in them. OpenSSL processes all records that it is given before it returns. The most expensive ones known, key updates
# (RFC 8446, section 4.6.3), have 27 bytes and cost 15 µs each.
FIRST_READ = 4 * 1024

# Bytes that are read in one event once a peer has sent as much as FIRST_READ at a time: a record of the usual maximum
# size and what comes with it. The larger the buffer, the more often the C library gives memory back to the system.
FULL_READ = 20 * 1024

# What OpenSSL is given of them in one event: this many records with application data, or fewer of others, such as half
# as many of 128 bytes with handshake messages in TLS 1.2.
MAX_RECORDS = 128

# The largest record (RFC 5246, section 6.2.3; it is smaller in RFC 8446, section 5.2), with its header.
MAX_RECORD = 5 + (1 << 14) + 2048

# Bytes that a client may send until its handshake is done. A chain of three certificates with post-quantum signatures
# (ML-DSA-65) and a ClientHello with a post-quantum key share need 25 KiB; the usual handshake needs 1 to 2 KiB.
MAX_HANDSHAKE_BYTES = 32 * 1024

# Bytes of a client's certificates, where it has to show one. Each costs 0.1 to 0.9 ms before the client is
# authenticated (OpenSSL 3.0 decodes the public key of every certificate in a chain; a compressed point on P-224 is the
# worst, at 7 µs a byte). An authority's certificate and a client's with ML-DSA-65 need 11 KiB; three with RSA-2048 need
# 3 to 4.
MAX_CLIENT_CERTIFICATES = 12 * 1024

# The same that are decoded in the reactor's thread; more are decoded in another one. The usual chain is longer, a
# certificate with an ECDSA key alone is not.
MAX_INLINE_CERTIFICATES = 1024

# Bytes that a peer may send without any application data in them: one incomplete record, key updates, warnings.
MAX_BYTES_WITHOUT_DATA = 64 * 1024

# Bytes that TLS itself has to send (answers to key updates, alerts) and that the kernel does not take, above which
# nothing more is read from the peer.
MAX_UNSENT_ANSWERS = 16 * 1024

# Seconds that such bytes may wait without any progress before the connection is aborted.
ANSWER_TIMEOUT = 60.0

# Reasons for the log and the counters.
HANDSHAKE_TOO_LARGE = "TLS handshake too large"
TOO_MUCH_WITHOUT_DATA = "too much TLS without data"
ANSWERS_NOT_READ = "TLS answers not read"
