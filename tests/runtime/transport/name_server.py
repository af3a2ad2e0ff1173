"""A name server: `python name_server.py FILE` answers at 127.0.0.1:53 what FILE says then.

FILE has lines `NAME ADDRESS`; a name that is on none of them is one that there is not. Of RFC 1035
it knows questions for IPv4 addresses by UDP.
"""

from __future__ import annotations

import socket
import struct
import sys
from pathlib import Path

_ADDRESS, _INTERNET = 1, 1
_QUESTION_AT = 12
_ANSWER, _NO_SUCH_NAME = 0x8180, 3
_SAME_NAME = 0xC000 | _QUESTION_AT


def answered(question: bytes, records: str) -> bytes:
    """What is answered to a question."""
    at, labels = _QUESTION_AT, []
    while length := question[at]:
        labels.append(question[at + 1 : at + 1 + length].decode("ascii"))
        at += 1 + length
    asked = question[_QUESTION_AT : at + 5]
    kind, _ = struct.unpack("!HH", asked[-4:])
    lines = [line.split() for line in records.splitlines()]
    found = [address for name, address in lines if name == ".".join(labels).lower()]
    given = found if kind == _ADDRESS else []
    flags = _ANSWER | (0 if found else _NO_SUCH_NAME)
    head = question[:2] + struct.pack("!HHHHH", flags, 1, len(given), 0, 0)
    record = struct.pack("!HHHIH", _SAME_NAME, _ADDRESS, _INTERNET, 0, 4)
    return head + asked + b"".join(record + socket.inet_aton(address) for address in given)


def main() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 53))
        print("ready", flush=True)
        while True:
            question, asker = sock.recvfrom(512)
            sock.sendto(answered(question, Path(sys.argv[1]).read_text()), asker)


if __name__ == "__main__":
    main()
