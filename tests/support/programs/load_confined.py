"""Load a key and a certificate where memory cannot be made executable; print the unavailable TLS features."""

import mmap
import sys

try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
except PermissionError:
    pass
else:
    raise SystemExit("not confined")

from rtservice.net import groups, openssl  # noqa: F401  # after the check
from rtservice.net.tls import ServerTLS

loaded = ServerTLS(sys.argv[1], sys.argv[2]).load()
print(openssl.unavailable(), loaded.warnings)
