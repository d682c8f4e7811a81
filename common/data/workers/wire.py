"""Messages between two processes over a socket: some bytes, and perhaps an open file."""

import os
import socket
import struct

_HEADER = struct.Struct("=QB")  # bytes that follow; whether a file comes along


def send(channel: socket.socket, message: bytes, fd: int | None = None) -> None:
    """Raises `OSError` where the other side is gone."""
    header = _HEADER.pack(len(message), fd is not None)
    if fd is None:
        channel.sendall(header + message)
    else:
        socket.send_fds(channel, [header], [fd])
        channel.sendall(message)


def receive(channel: socket.socket) -> tuple[bytearray, int | None]:
    """The next message and its file, which the caller closes.

    Raises:
      EOFError: the other side is gone.
      OSError: so.
    """
    header, fds, _, _ = socket.recv_fds(channel, _HEADER.size, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        header += _exactly(channel, _HEADER.size - len(header)) if header else b""
        if not header:
            raise EOFError
        length, has_file = _HEADER.unpack(header)
        message = _exactly(channel, length)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return message, fds[0] if has_file else None


def _exactly(channel: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    rest = memoryview(data)
    while len(rest):
        got = channel.recv_into(rest)
        if not got:
            raise EOFError
        rest = rest[got:]
    return data
