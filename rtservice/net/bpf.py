"""Classic BPF programs for listening sockets (linux/filter.h): drop or distribute new clients. Linux only."""

from __future__ import annotations

import socket
import struct
from array import array
from collections.abc import Sequence
from contextlib import suppress

# asm-generic/socket.h. The `socket` module does not define them.
_SO_ATTACH_FILTER, _SO_DETACH_FILTER, _SO_ATTACH_REUSEPORT_CBPF = 26, 27, 51

# An instruction: code, instructions to skip if the comparison is true, instructions to skip if it is false, operand.
_Instruction = tuple[int, int, int, int]

_LOAD_BYTE, _LOAD_WORD = 0x30, 0x20
_SKIP_UNLESS_SET, _SKIP_UNLESS_EQUAL = 0x45, 0x15
_MODULO, _RETURN = 0x94, 0x06

_RANDOM = 0xFFFFF000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM

# The kernel runs this for each segment, starting at the TCP header.
_DROP_SYN: tuple[_Instruction, ...] = (
    (_LOAD_BYTE, 0, 0, 13),  # the flags (RFC 9293, section 3.1)
    (_SKIP_UNLESS_SET, 0, 1, 0x02),  # SYN
    (_RETURN, 0, 0, 0),  # keep nothing of the segment
    (_RETURN, 0, 0, 0xFFFFFFFF),  # keep all of it
)


def drop_new_clients(sock: socket.socket) -> None:
    """Drop the SYN of each new connection to a listening TCP socket. Handshakes that have begun continue."""
    _attach(sock, _SO_ATTACH_FILTER, _DROP_SYN)


def accept_new_clients(sock: socket.socket) -> None:
    """Undo `drop_new_clients`, including that of an earlier process on the same socket."""
    with suppress(OSError):  # usually no filter is attached
        sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def balance(sock: socket.socket, numbers: Sequence[int]) -> None:
    """Distribute new connections of a port at random among some of its listening sockets.

    `sock` is any socket of the port. `numbers` selects the sockets: 0 is the one that began to listen first
    (SO_ATTACH_REUSEPORT_CBPF of socket(7)).
    """
    program: list[_Instruction] = [(_LOAD_WORD, 0, 0, _RANDOM), (_MODULO, 0, 0, len(numbers))]
    for place, number in enumerate(numbers):
        program += [(_SKIP_UNLESS_EQUAL, 0, 1, place), (_RETURN, 0, 0, number)]
    program.append((_RETURN, 0, 0, numbers[0]))  # never reached, but the kernel requires a return at the end
    _attach(sock, _SO_ATTACH_REUSEPORT_CBPF, program)


def _attach(sock: socket.socket, option: int, program: Sequence[_Instruction]) -> None:
    code = array("B", b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    address, _ = code.buffer_info()
    with suppress(OSError):  # not Linux
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("HP", len(program), address))
