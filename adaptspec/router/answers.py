"""Answers that the router gives itself, in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.responses import Response

INVALID_REQUEST, SERVER_ERROR = "invalid_request_error", "server_error"


def error_answer(
    status: int,
    message: str,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error as OpenAI's API tells it."""
    from starlette.responses import JSONResponse

    kind = SERVER_ERROR if status >= 500 else INVALID_REQUEST
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)
