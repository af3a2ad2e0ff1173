"""What a platform wants of a container: where to listen, where the model is, which routes.

Plain classes and next to no imports: a profile is chosen before the port is bound, within
milliseconds of the exec. What is wrong with an environment is a `PlatformError`, whose module is
imported only then.
"""

from __future__ import annotations

TYPE_CHECKING = False  # `typing` itself is slow to import
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

__all__ = ["Profile", "Route"]

_READABLE = ("s3://", "http://", "https://", "peer://")
"""The schemes that there is a source for."""


class Route:
    """A method and a path, and what answers there.

    Args:
        method: `GET`, `POST` or `PUT`.
        path: With parameters in braces, as `/v2/models/{model}`.
        kind: Who answers: `predict`, an adapter; `health`, 200 once ready and `loading` before;
            `live`, always 200; the others are documents of one protocol, and say so by name.
        adapter: Of a `predict` route, the name of its translation (`adapters.ADAPTERS`).
        variable: An environment variable that overrules the path.
        loading: The status while the model is not ready, where it matters.
    """

    __slots__ = ("adapter", "kind", "loading", "method", "path", "variable")

    def __init__(
        self,
        method: str,
        path: str,
        kind: str,
        adapter: str | None = None,
        *,
        variable: str | None = None,
        loading: int = 503,
    ) -> None:
        self.method = method
        self.path = path
        self.kind = kind
        self.adapter = adapter
        self.variable = variable
        self.loading = loading

    def resolved(self, environ: Mapping[str, str]) -> Route:
        """The route at the path that the environment asks for.

        Raises:
            PlatformError: What it asks for is no path.
        """
        path = environ.get(self.variable, "") if self.variable else ""
        if not path:
            return self
        # Braces would be parameters to the router; a query or a fragment is no part of a path.
        bad = any(mark in path for mark in "{}?#") or not (path.isascii() and path.isprintable())
        if not path.startswith("/") or bad or " " in path:
            _refuse(
                "the route that the environment gives is no path",
                where=self.variable,
                expected="a path that begins with /",
                got=repr(path[:200]),
            )
        return Route(self.method, path, self.kind, self.adapter, loading=self.loading)

    def __repr__(self) -> str:
        return f"Route({self.method} {self.path}: {self.kind})"


class Profile:
    """One platform's contract.

    Args:
        name: As `--platform` takes it.
        why: What its probes and its router do, and so why it is bound and answered as it is.
        host: The address to listen on.
        ports: Environment variables that may hold the port, the first that is set wins.
        port: Where none is.
        health_port: A variable that may name a second port, for the health route.
        models: Variables that may hold the model, where the command line names none.
        model_path: A folder that the platform mounts it at.
        names: Variables that may hold the name that clients call it by.
        bind: `early`, before anything is loaded, or `ready`.
        drain_s: How long open requests may take after SIGTERM, in seconds; less than the
            platform waits before it kills.
        max_body: The most bytes of a request that get through, where the platform has a limit.
        request_s: How long it waits for an answer, in seconds, where it has a limit.
        routes: Beside those that every server has.
        errors: The name of the adapter that shapes errors outside of a predict route.
        aliases: Its own command-line flags, and what each is here: `port`, `model` or `name`.
        unconfirmed: What of this is not taken from the platform's own words.
    """

    __slots__ = (
        "aliases",
        "bind",
        "default_port",
        "drain_s",
        "errors",
        "health_variable",
        "host",
        "max_body",
        "model_path",
        "models",
        "name",
        "names",
        "ports",
        "request_s",
        "routes",
        "unconfirmed",
        "why",
    )

    def __init__(
        self,
        name: str,
        *,
        why: str,
        host: str = "0.0.0.0",
        ports: tuple[str, ...] = ("PORT",),
        port: int = 8080,
        health_port: str | None = None,
        models: tuple[str, ...] = (),
        model_path: str | None = None,
        names: tuple[str, ...] = (),
        bind: str = "early",
        drain_s: float = 28.0,
        max_body: int | None = None,
        request_s: float | None = None,
        routes: tuple[Route, ...] = (),
        errors: str = "openai",
        aliases: tuple[tuple[str, str], ...] = (),
        unconfirmed: str = "",
    ) -> None:
        self.name = name
        self.why = why
        self.host = host
        self.ports = ports
        self.default_port = port
        self.health_variable = health_port
        self.models = models
        self.model_path = model_path
        self.names = names
        self.bind = bind
        self.drain_s = drain_s
        self.max_body = max_body
        self.request_s = request_s
        self.routes = routes
        self.errors = errors
        self.aliases = aliases
        self.unconfirmed = unconfirmed

    def port(self, environ: Mapping[str, str]) -> int:
        """The port to listen on; 0 is any that is free.

        Raises:
            PlatformError: A variable holds what is no port.
        """
        for variable in self.ports:
            if environ.get(variable):
                return _port(variable, environ[variable])
        return self.default_port

    def health_port(self, environ: Mapping[str, str]) -> int | None:
        """A second port that the health route is asked on, where it is another one.

        Raises:
            PlatformError: A variable holds what is no port.
        """
        variable = self.health_variable
        if variable is None or not environ.get(variable):
            return None
        port = _port(variable, environ[variable])
        return None if port == self.port(environ) else port

    def model(self, environ: Mapping[str, str]) -> str | None:
        """Where the platform has put the model, for a command line that names none.

        Raises:
            PlatformError: It is where nothing here can read it.
        """
        for variable in self.models:
            place = environ.get(variable)
            if place:
                if "://" in place and not place.startswith(_READABLE):
                    _refuse(
                        "the platform names a model that there is no way to read",
                        where=variable,
                        expected="a directory, " + ", ".join(_READABLE),
                        got=repr(place[:200]),
                        hint="Put the model into the image, or name another place as MODEL.",
                    )
                return place
        return self.model_path

    def model_name(self, environ: Mapping[str, str]) -> str | None:
        """The name that the platform has clients call the model by, where it says one."""
        for variable in self.names:
            if environ.get(variable):
                return environ[variable]
        return None

    def routes_for(self, environ: Mapping[str, str]) -> list[Route]:
        """Its routes, at the paths that the environment asks for.

        Raises:
            PlatformError: A variable holds what is no path, or two routes are one.
        """
        found: dict[tuple[str, str], Route] = {}
        for route in self.routes:
            resolved = route.resolved(environ)
            key = (resolved.method, resolved.path)
            if key in found:
                _refuse(
                    "the environment gives two routes the same path",
                    where=route.variable,
                    got=f"{resolved.method} {resolved.path}",
                )
            found[key] = resolved
        return list(found.values())

    def __repr__(self) -> str:
        return f"Profile({self.name})"


def _port(variable: str, text: str) -> int:
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 5 and int(digits) <= 0xFFFF):
        _refuse(
            "the environment holds what is no port",
            where=variable,
            expected="0 to 65535",
            got=repr(text[:200]),
        )
    return int(digits)


def _refuse(
    what: str,
    *,
    where: str | None,
    expected: str | None = None,
    got: str,
    hint: str | None = None,
) -> NoReturn:
    from coldframe.loader.errors import PlatformError

    hint = hint or f"Set {where} to what the platform means, or unset it."
    raise PlatformError(what, where=where, expected=expected, got=got, hint=hint)
