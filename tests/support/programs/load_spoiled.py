"""Loads a key and a certificate in an interpreter that a statement has spoiled; prints what is missing of TLS then."""

import _ctypes  # noqa: F401  # for the statement
import ssl
import sys

exec(sys.argv[3])

from rtservice.net import openssl  # noqa: E402  # in the spoiled interpreter
from rtservice.net.tls import ServerTLS  # noqa: E402

if hasattr(ssl.SSLContext, "set_groups"):
    del ssl.SSLContext.set_groups
loaded = ServerTLS(sys.argv[1], sys.argv[2]).load()
print(openssl.unavailable() is not None, loaded.warnings[0].partition(":")[0])
