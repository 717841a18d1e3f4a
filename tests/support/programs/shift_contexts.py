"""Print the unavailable TLS features if contexts appear to have a different layout."""

import ctypes

from rtservice.net import openssl


class Shifted(ctypes.c_void_p):
    @classmethod
    def from_address(cls, address):
        return ctypes.c_size_t.from_address(address - 8)  # the type's address


ctypes.c_void_p = Shifted
print(openssl.unavailable())
