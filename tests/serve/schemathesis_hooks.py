"""What schemathesis cannot know of the API, each with its reason; loaded by its command."""

from typing import Any

import schemathesis


@schemathesis.hook
def before_call(context: Any, case: Any, _kwargs: Any) -> None:
    """Repair what no JSON schema says, in bodies that are to be accepted."""
    body = case.body
    if not isinstance(body, dict) or case.meta is None or not case.meta.generation.mode.is_positive:
        return
    # Roles have an order: system first, then user and assistant in turn, the user last.
    for message in body.get("messages") or ():
        message["role"] = "user"
    # No JSON schema describes a grammar, a JSON schema that llguidance compiles, or a regular expression in Rust's
    # syntax.
    if body.get("grammar") is not None:
        body["grammar"] = 'start: "a"'
    if body.get("regex") is not None:
        body["regex"] = "a+"
    format_ = body.get("response_format") or {}
    if format_.get("json_schema") is not None:
        format_["json_schema"]["schema"] = {"type": "object"}
