"""Errors as clients get them: OpenAI's error object, with a status."""

import json
from collections.abc import Mapping
from typing import Any

# Of a server that is busy, starting or shutting down; clients try again after so many seconds.
RETRY_AFTER = 2
_RETRIED = (429, 503)


class ApiError(Exception):
    """A request that is refused or failed; `code` is one word, `param` the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        # OpenAI's client repeats some errors by itself, unless a header forbids it.
        retried = status in _RETRIED
        self.headers = {"retry-after": str(RETRY_AFTER)} if retried else {"x-should-retry": "false"}
        self.headers |= headers or {}

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        """Return the error object as JSON."""
        return json.dumps(self.body()).encode()


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """Return the error of a field whose value cannot be accepted."""
    return ApiError(400, message, code=code, param=param)


def unsupported(param: str, message: str) -> ApiError:
    """Return the error of a part of OpenAI's API that there is not here."""
    return ApiError(400, message, code="unsupported", param=param)


def unavailable(message: str) -> ApiError:
    """Return the error of a server that takes no requests now."""
    return ApiError(503, message, code="unavailable")
