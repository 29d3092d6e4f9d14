"""Chat template of Gemma: messages to token ids, with a mask of the tokens to train on."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gemmule.errors import SourceError, TokenizerError
from gemmule.tokenizer.tokenizer import Tokenizer

START, END = "<start_of_turn>", "<end_of_turn>"

# The template of `render_chat` in Jinja, for transformers, vLLM and llama.cpp.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system='', turns=0) -%}
{%- for message in messages -%}
    {%- set text = message['content'] | trim -%}
    {%- if message['role'] == 'system' and loop.first -%}
        {%- set ns.system = text + '\\n\\n' if text else '' -%}
    {%- else -%}
        {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
        {%- if role != ('user', 'model')[ns.turns % 2] -%}
            {{- raise_exception('after an optional system message, turns alternate: user, assistant, user, ...') -}}
        {%- endif -%}
        {{- '<start_of_turn>' + role + '\\n' + (ns.system if ns.turns == 0 else '') + text + '<end_of_turn>\\n' -}}
        {%- set ns.turns = ns.turns + 1 -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


class Turn(NamedTuple):
    """One turn of a conversation; the role is "user" or "model"."""

    role: str
    text: str


class Rendered(NamedTuple):
    """Token ids of a conversation; `trained` is the loss mask, true for the model's own tokens."""

    ids: list[int]
    trained: list[bool]


def render_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, reply: bool = False) -> Rendered:
    """Apply Gemma 3's chat template to messages with "role" and "content".

    The loss mask covers the model's text and its <end_of_turn>. Special tokens in the content are encoded as ordinary
    text. `reply` adds the start of the model's next turn (a generation prompt). Raises SourceError for an invalid
    conversation, TokenizerError for a vocabulary without turn tokens.
    Source: the chat template of Google's instruction-tuned Gemma 3; unlike there, system text is trimmed.
    """
    _, end = turn_tokens(tokenizer)
    turns = read_turns(messages)
    if reply and turns[-1].role == "model":
        raise SourceError(f"message {len(messages)}: the model spoke last; a reply needs a user's message to answer")
    rendered = Rendered([], [])

    def add(ids: Sequence[int], trained: bool) -> None:
        rendered.ids.extend(ids)
        rendered.trained.extend([trained] * len(ids))

    if tokenizer.bos_id is not None:
        add([tokenizer.bos_id], trained=False)
    for turn in turns:
        add(turn_header(tokenizer, turn.role), trained=False)
        add([*_encode(tokenizer, turn.text), end], trained=turn.role == "model")
        add(_encode(tokenizer, "\n"), trained=False)
    if reply:
        add(turn_header(tokenizer, "model"), trained=False)
    return rendered


def turn_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ids of <start_of_turn> and <end_of_turn>; TokenizerError for a vocabulary without one of them."""
    start, end = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    if start is None or end is None:
        missing = START if start is None else END
        raise TokenizerError(
            f"the tokenizer has no {missing}, so it cannot render a chat; use one with {START} and {END}"
        )
    return start, end


def turn_header(tokenizer: Tokenizer, role: str) -> list[int]:
    """Return the tokens before the text of a turn, whose role is "user" or "model"."""
    return _encode(tokenizer, f"{START}{role}\n", specials=True)


def read_turns(messages: Sequence[Mapping[str, str]]) -> list[Turn]:
    """Convert messages to alternating turns, the system message prepended to the first; else SourceError."""
    turns: list[Turn] = []
    system = ""
    for number, message in enumerate(messages, 1):
        role, text = message.get("role"), message.get("content")
        if not isinstance(text, str):
            raise SourceError(f"message {number}: its content is {text!r}, not text")
        if role == "system" and number == 1:
            system = text.strip()
            continue
        wanted = ("user", "model")[len(turns) % 2]
        if {"assistant": "model"}.get(str(role), role) != wanted:
            expected = "assistant" if wanted == "model" else wanted
            raise SourceError(
                f"message {number}: its role is {role!r} where {expected!r} is expected; "
                "after an optional system message, turns alternate: user, assistant, user, ..."
            )
        turns.append(Turn(wanted, text.strip()))
    if not turns:
        raise SourceError(
            f"a conversation of {len(messages)} messages has no turn; it needs at least one of the user's"
        )
    if system:
        turns[0] = Turn("user", f"{system}\n\n{turns[0].text}")
    return turns


def _encode(tokenizer: Tokenizer, text: str, *, specials: bool = False) -> list[int]:
    """Encode a part of the conversation, without bos."""
    ids = tokenizer.encode(text, specials=specials)
    return ids[1:] if tokenizer.adds_bos else ids
