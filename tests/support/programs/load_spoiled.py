"""Load a key and a certificate after a statement that breaks the interpreter; print the unavailable TLS features."""

import _ctypes  # noqa: F401  # for the statement
import ssl
import sys

exec(sys.argv[3])

from rtservice.net import openssl  # noqa: E402  # after the statement
from rtservice.net.tls import ServerTLS  # noqa: E402  # after the statement

if hasattr(ssl.SSLContext, "set_groups"):
    del ssl.SSLContext.set_groups
loaded = ServerTLS(sys.argv[1], sys.argv[2]).load()
print(openssl.unavailable() is not None, loaded.warnings[0].partition(":")[0])
