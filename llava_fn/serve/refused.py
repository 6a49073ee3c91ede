"""Why a request is not answered, as OpenAI's API says it."""

from __future__ import annotations


class Refused(Exception):
    """A request that cannot be answered. status: of HTTP. param: the field. code: for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        """The error as OpenAI's API writes it."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
