"""Chats as text by a model's own Jinja template, which is not trusted: it is rendered in a sandbox."""

from collections.abc import Mapping, Sequence

from gemmule.errors import MissingExtra, TokenizerError
from gemmule.tokenizer import Tokenizer


def render_messages(
    tokenizer: Tokenizer, template: str, messages: Sequence[Mapping[str, str]], *, open_turn: bool = False
) -> str:
    """Render messages and the start of the model's next turn, or, for `open_turn`, up to the end of the last message.

    TokenizerError where the template does not accept them.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingExtra("jinja2", "lm-eval", "a chat template") from None

    def refuse(message: str) -> str:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = refuse
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    words = {name: "" if i is None else tokenizer.decode([i], specials=True) for name, i in ids.items()}
    try:
        text = environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=not open_turn, **words
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise TokenizerError(f"the chat template does not take these messages: {error}") from None
    if not open_turn:
        return text
    last = messages[-1]["content"].strip()
    return text[: text.rindex(last) + len(last)]
