"""From the text, messages or ids of a request to the token ids of its prompts."""

from collections.abc import Sequence
from typing import NamedTuple

from gemmule.errors import UserError
from gemmule.serve.failures import ApiError, invalid
from gemmule.serve.models import ServedModel
from gemmule.serve.protocol import CompletionBody, Message
from gemmule.tokenizer.chat import render_chat

# Characters per token from which on a text may be too long whatever its tokens are.
_LONG = 16


class Prompt(NamedTuple):
    """A prompt as the model reads it; the text is that of the request, or what the ids decode to."""

    ids: tuple[int, ...]
    text: str


def completion_prompts(served: ServedModel, body: CompletionBody) -> list[Prompt]:
    """Return the prompts of /v1/completions; ApiError where one cannot be read."""
    given = body.prompt
    if given is None or isinstance(given, str):
        texts: Sequence[str] = [given or ""]
    elif isinstance(given[0], str):
        texts = [each for each in given if isinstance(each, str)]
    elif isinstance(given[0], int):
        return [_of_ids(served, [each for each in given if isinstance(each, int)])]
    else:
        return [_of_ids(served, each) for each in given if isinstance(each, list)]
    return [_of_text(served, text) for text in texts]


def check_length(served: ServedModel, tokens: int, param: str) -> None:
    """Raise ApiError for a prompt that leaves no room for a reply."""
    if tokens >= served.context:
        raise ApiError(
            400,
            f"{param}: {tokens} tokens; the context of {served.id} is {served.context}, reply included: "
            f"send at most {served.context - 1}",
            code="context_length_exceeded",
            param=param,
        )


def refuse_endless(served: ServedModel, text: str, param: str) -> None:
    """Raise ApiError for a text that is too long even if all its tokens are the longest there are.

    To encode megabytes takes seconds.
    """
    if len(text) > _LONG * served.context and (longest := served.longest_token):
        check_length(served, len(text.encode()) // longest, param)


def check_ids(served: ServedModel, ids: Sequence[int], param: str) -> None:
    """Raise ApiError for ids that the vocabulary lacks."""
    if ids and max(ids) >= served.vocab_size:
        raise invalid(param, f"{param}: there is no token {max(ids)}; the vocabulary ends at {served.vocab_size - 1}")


def encode_text(served: ServedModel, text: str, param: str = "prompt") -> list[int]:
    """Encode a text, special tokens in it as ordinary text."""
    try:
        return served.tokenizer.encode(text)
    except UserError as error:
        raise invalid(param, f"{param}: {error}") from None


def _of_text(served: ServedModel, text: str) -> Prompt:
    refuse_endless(served, text, "prompt")
    ids = encode_text(served, text)
    if not ids:
        raise invalid("prompt", "prompt: empty, and no bos begins a text of this model; give it a word")
    check_length(served, len(ids), "prompt")
    check_ids(served, ids, "prompt")
    return Prompt(tuple(ids), text)


def _of_ids(served: ServedModel, ids: Sequence[int]) -> Prompt:
    check_ids(served, ids, "prompt")
    check_length(served, len(ids), "prompt")
    return Prompt(tuple(ids), served.tokenizer.decode(ids))


def chat_ids(served: ServedModel, messages: Sequence[Message], *, reply: bool = True) -> tuple[int, ...]:
    """Render a conversation by Gemma's chat template; ApiError names the message that is out of place.

    `developer` is `system`; neighbors of the same role become one message.
    """
    if not served.chats:
        raise ApiError(
            400,
            f"model {served.id} has no chat template; continue a text with /v1/completions, "
            "or start the server with --chat",
            code="no_chat_template",
            param="messages",
        )
    merged: list[dict[str, str]] = []
    for number, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] += "\n\n" + _text_of(message)
            continue
        _check_place(number, role, [each["role"] for each in merged])
        merged.append({"role": role, "content": _text_of(message)})
    last = merged[-1]["role"]
    if last == "system" or (reply and last == "assistant"):
        place = f"messages[{len(messages) - 1}]"
        raise invalid(place, f"{place}: the last message is the {last}'s; end with the user's, which is answered")
    refuse_endless(served, "".join(each["content"] for each in merged), "messages")
    try:
        ids = tuple(render_chat(served.tokenizer, merged, reply=reply).ids)
    except UserError as error:
        raise invalid("messages", f"messages: {error}") from None
    check_length(served, len(ids), "messages")
    check_ids(served, ids, "messages")
    return ids


def _check_place(number: int, role: str, before: Sequence[str]) -> None:
    """Raise ApiError where a role cannot stand there."""
    place = f"messages[{number}]"
    if role == "system" and before:
        raise invalid(place, f"{place}: a {role} message after others; put it first")
    if role == "assistant" and before in ([], ["system"]):
        raise invalid(place, f"{place}: the assistant comes first; begin with a user's message")


def _text_of(message: Message) -> str:
    content = message.content
    return content if isinstance(content, str) else "".join(part.text for part in content)
