"""Messages of any length arrive whole, with their file."""

import os
import socket
import threading

import pytest

from common.data.workers import wire


@pytest.mark.parametrize("length", [0, 1, 1000, 65536 - 9, 65536, 3_000_000])
@pytest.mark.parametrize("with_file", [False, True])
def test_a_message_arrives_as_it_was_sent(tmp_path, length, with_file):
    message = os.urandom(length)
    (tmp_path / "file").write_text("content")
    here, there = socket.socketpair()
    with here, there, open(tmp_path / "file") as file:
        fd = file.fileno() if with_file else None
        sender = threading.Thread(target=wire.send, args=(here, message, fd))
        sender.start()
        received, other = wire.receive(there)
        sender.join()
    assert received == message and (other is not None) == with_file
    if other is not None:
        with open(other) as copy:
            assert copy.read() == "content"


@pytest.mark.parametrize("sent", [b"", b"\x05\x00", b"\x05\x00\x00\x00\x00\x00\x00\x00\x00abc"])
def test_a_side_that_is_gone_is_no_message(sent):
    here, there = socket.socketpair()
    with there:
        here.sendall(sent)
        here.close()
        with pytest.raises(EOFError):
            wire.receive(there)
