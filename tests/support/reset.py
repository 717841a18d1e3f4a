"""Reset a connection."""

import socket
import struct


def reset(sock: socket.socket) -> None:
    """Close a socket with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
