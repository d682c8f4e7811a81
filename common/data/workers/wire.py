"""Messages between two processes over a socket: some bytes, and perhaps an open file.

One side asks and the other answers, so that there is never more than one message under way: most
take one call of the system to send and one to receive.
"""

import errno
import os
import socket
import struct

_HEADER = struct.Struct("=QB")  # bytes that follow; whether a file comes along
_CHUNK = 1 << 16  # bytes that are asked for at first


def send(channel: socket.socket, message: bytes, fd: int | None = None) -> None:
    """Raises `OSError` where the other side is gone."""
    header = _HEADER.pack(len(message), fd is not None)
    sent = socket.send_fds(channel, [header, message], [] if fd is None else [fd])
    if sent < len(header) + len(message):
        channel.sendall((header + message)[sent:])


def receive(channel: socket.socket) -> tuple[bytes, int | None]:
    """The next message and its file, which the caller closes.

    Raises:
      EOFError: the other side has closed the channel.
      OSError: the connection broke, or this process may not have any more open files.
    """
    data, fds, _, _ = socket.recv_fds(channel, _CHUNK, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        data = _at_least(channel, data, _HEADER.size)
        length, has_file = _HEADER.unpack_from(data)
        data = _at_least(channel, data, _HEADER.size + length)
        if has_file and not fds:
            raise OSError(errno.EMFILE, "no descriptor is left for the file of a message")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return data[_HEADER.size :], fds[0] if has_file else None


def _at_least(channel: socket.socket, data: bytes, count: int) -> bytes:
    """The data with what follows, up to `count` bytes."""
    if len(data) >= count:
        return data
    whole = bytearray(count)
    whole[: len(data)] = data
    rest = memoryview(whole)[len(data) :]
    while len(rest):
        got = channel.recv_into(rest)
        if not got:
            raise EOFError
        rest = rest[got:]
    return bytes(whole)
