"""Errors that people and programs can act on: what happened, where, and what to do."""

from typing import Any

from django.core.exceptions import RequestDataTooBig
from rest_framework.response import Response
from rest_framework.views import exception_handler


class Refused(Exception):
    """A request that the rules do not allow. `code` is for programs, the text for people, `status` is the HTTP status."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.code, self.message, self.status = code, message, status


def error_body(code: str, message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, **more}}


def api_exception_handler(error: Exception, context: dict[str, Any]) -> Response | None:
    """Give every API error one shape: {"error": {"code", "message", "fields"?}}."""
    if isinstance(error, Refused):
        return Response(error_body(error.code, error.message), status=error.status)
    if isinstance(error, RequestDataTooBig):
        return Response(error_body("too_large", "The body is too large."), status=413)
    response = exception_handler(error, context)
    if response is None:
        return None
    data = response.data
    if isinstance(data, dict) and set(data) == {"detail"}:
        detail = data["detail"]
        response.data = error_body(getattr(detail, "code", "error"), str(detail))
    else:
        names = ", ".join(str(name) for name in data) if isinstance(data, dict) else ""
        message = f"Missing or wrong: {names}." if names else "The request is not valid."
        response.data = error_body("invalid", message, fields=data)
    return response
