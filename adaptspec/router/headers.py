"""Which headers go on: those of the message itself, not those of one connection."""

from __future__ import annotations

from collections.abc import Sequence

Headers = Sequence[tuple[bytes, bytes]]

# RFC 9110, section 7.6.1, and what each side sets for its own connection.
OF_A_CONNECTION = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer"),
        *(b"proxy-authenticate", b"proxy-authorization", b"proxy-authentication-info"),
        *(b"transfer-encoding", b"upgrade", b"expect"),
    }
)
OURS = b"x-adaptspec-"


def request_headers(given: Headers) -> list[tuple[bytes, bytes]]:
    """Of a client's request: the server gets a host and a length of its own."""
    return _passed_on(given, {b"host", b"content-length"})


def answer_headers(given: Headers) -> list[tuple[bytes, bytes]]:
    """Of a server's answer, whose length stays, since its body does."""
    return _passed_on(given, set())


def value_of(given: Headers, name: bytes) -> str | None:
    """A header's value; several of one name are joined as HTTP says."""
    found = [value for key, value in given if key.lower() == name]
    return b", ".join(found).decode("utf-8", "replace") if found else None


def _passed_on(given: Headers, own: set[bytes]) -> list[tuple[bytes, bytes]]:
    named = (value_of(given, b"connection") or "").lower().split(",")
    dropped = OF_A_CONNECTION | own | {name.strip().encode() for name in named}
    return [
        (key, value)
        for key, value in given
        if key.lower() not in dropped and not key.lower().startswith(OURS)
    ]
