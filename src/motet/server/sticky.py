"""Who asks, for decisions that must be the same every time the same one asks."""

from __future__ import annotations

import secrets

from starlette.requests import Request

from motet.server.openai import ChatRequest, Sampling


def user_of(request: Request, asked: Sampling) -> str:
    """The user that the request names, or its key; a request without either is a user of its own."""
    named = asked.user or (asked.safety_identifier if isinstance(asked, ChatRequest) else None)
    return named or request.headers.get("authorization") or secrets.token_hex(8)
