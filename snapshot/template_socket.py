"""The socket of a resident template: private to its user, found by fronts, swept when dead."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator

from coldframe.loader.errors import PlatformError
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.places import KEY_DIGITS, template_directory

__all__ = ["TemplateSocket", "peer_uid"]

_MOST_PATH_BYTES = 107  # what the kernel takes for a socket
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid; see unix(7)


class TemplateSocket:
    """A socket that listens.

    Args:
        listener: It.
        path: Where it is bound.
    """

    def __init__(self, listener: socket.socket, path: str) -> None:
        self.path = path
        self._listener = listener

    @classmethod
    def open(cls, model: ModelKey) -> TemplateSocket:
        """Listens under a name that is the model's; takes away the sockets of dead templates.

        Raises:
            PlatformError: The directory cannot be had, or is not this user's alone.
        """
        directory = template_directory()
        path = os.path.join(directory, f"{model.digest[:KEY_DIGITS]}-{os.urandom(4).hex()}")
        if len(os.fsencode(path)) > _MOST_PATH_BYTES:
            raise PlatformError(
                "the templates' directory has too long a path for sockets in it",
                where=directory,
                expected=f"at most {_MOST_PATH_BYTES} bytes with a socket's name",
                got=f"{len(os.fsencode(path))} bytes",
                hint="Set COLDFRAME_RUN_DIR to a directory with a shorter path.",
            )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _locked(directory):
                _sweep(directory)
                listener.bind(path)
                os.chmod(path, 0o600)
                listener.listen()
        except OSError as error:
            listener.close()
            raise PlatformError(
                "a template cannot listen",
                where=path,
                got=error.strerror,
                hint="Set COLDFRAME_RUN_DIR to a directory that can be written to.",
            ) from error
        except BaseException:
            listener.close()
            raise
        return cls(listener, path)

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self) -> socket.socket:
        return self._listener.accept()[0]

    def close(self) -> None:
        """Takes it away, and with the last one the directory."""
        self._listener.close()
        directory = os.path.dirname(self.path)
        with contextlib.suppress(OSError, PlatformError), _locked(directory):
            os.unlink(self.path)
            os.rmdir(directory)


def peer_uid(connection: socket.socket) -> int:
    """Whose process has connected."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    """Has the directory to itself; makes it where it is not there.

    Between a bind and a listen a socket looks as if it were dead, and nobody may look then.

    Raises:
        PlatformError: Somebody else could write there.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        try:
            fd = os.open(directory, _OPEN_DIRECTORY)
        except FileNotFoundError:  # the last template has just gone, and taken it away
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            about = os.fstat(fd)
            if about.st_nlink == 0:  # taken away while this waited
                continue
            if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) != 0o700:
                raise PlatformError(
                    "the templates' directory is not this user's alone",
                    where=directory,
                    expected=f"user {os.getuid()}, mode 700",
                    got=f"user {about.st_uid}, mode {stat.S_IMODE(about.st_mode):o}",
                    hint="Whoever can write there can be taken for a template. Remove it.",
                )
            yield
            return
        finally:
            os.close(fd)


def _sweep(directory: str) -> None:
    """Removes the sockets that nobody listens on any more."""
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a full backlog is a sign of life
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            except OSError:
                continue
