"""Bodies of requests: their fields, and what these ask of each other."""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from gemmule.fields import LARGEST_REQUEST_SEED, Noun
from gemmule.serve.failures import ApiError, invalid, unsupported

MOST_LIKELIEST = 20  # alternatives beside each token
MOST_STOP_TOKENS = 128
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI has it

Ignored = Annotated[Any, Field(description="accepted, without effect")]
TOKEN_ID_BOUND = 2**31 - 1  # of ids before a vocabulary is asked
_NO_TOOLS = "tools are not supported; send turns of user and assistant"


def _whole(number: Any) -> Any:
    """Turn 5.0 into 5: to JSON both are one number."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


WHOLE = BeforeValidator(_whole)
TokenId = Annotated[int, Field(ge=0, lt=TOKEN_ID_BOUND), WHOLE]
Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TopCount = Annotated[int, Field(ge=0, le=MOST_LIKELIEST), WHOLE]
Nonempty = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1)]
Ids = Annotated[list[TokenId], Field(min_length=1)]
ListsOfIds = Annotated[list[Ids], Field(min_length=1)]


class Body(BaseModel):
    """A JSON object with known fields; null stands for the default."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())
    # Fields of OpenAI's API that there are not here, with what would do.
    unsupported: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def refuse(cls, given: Mapping[str, Any]) -> None:
        """Raise ApiError for what is known, and not there."""
        for name, advice in cls.unsupported.items():
            if given.get(name) not in (None, [], {}, ""):
                raise unsupported(name, f"{name}: {advice}")
        messages = given.get("messages")
        for number, message in enumerate(messages if isinstance(messages, list) else []):
            if isinstance(message, dict):
                _refuse_parts(number, message)

    def problems(self) -> Iterator[ApiError]:
        """Yield what is wrong with fields together."""
        yield from ()


class StreamOptions(Body):
    """How a reply is streamed."""

    include_usage: bool | None = Field(None, description="the last chunk reports the number of tokens")
    include_obfuscation: Ignored = None


class JsonSchema(Body):
    """A JSON schema with a name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", description="the JSON schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the reply has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampled(Body):
    """What both endpoints have."""

    model: str | None = Field(None, description="one of /v1/models; may be left out where there is one")
    stream: bool | None = Field(None, description="send tokens as they come")
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1), WHOLE] | None = Field(None, description="replies to each prompt; 1")
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="above 1 flattens the distribution, 0 takes the likeliest token; 1"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="keep the likeliest tokens that together reach this probability; 1"
    )
    top_k: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = Field(
        None, description="keep the k likeliest tokens; 0 keeps all"
    )
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="keep tokens at least this likely, as a share of the likeliest one; 0"
    )
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="makes tokens of prompt and reply less likely, by a factor; 1"
    )
    presence_penalty: Penalty | None = Field(None, description="is subtracted from the logits of the reply's tokens; 0")
    frequency_penalty: Penalty | None = Field(
        None, description="is subtracted from the logits of the reply's tokens, as often as they occur there; 0"
    )
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,10}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Noun("an object of token ids, each with a number from -100 to 100"),
        ]
        | None
    ) = Field(None, description="is added to the logits of single tokens")
    seed: Annotated[int, Field(ge=0, le=LARGEST_REQUEST_SEED), WHOLE] | None = Field(
        None, description="repeats a reply; without one it is drawn, and returned"
    )
    stop: (
        Annotated[
            Nonempty | Annotated[list[Nonempty], Field()],
            Noun("a text, or a list of texts, none of them empty"),
        ]
        | None
    ) = Field(None, description="texts before which a reply ends")
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=MOST_STOP_TOKENS), Noun("a list of up to 128 token ids")] | None
    ) = Field(None, description="tokens with which a reply ends, beside the model's own")
    min_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = Field(
        None, description="before so many tokens no stop token is drawn, max_tokens permitting; 0"
    )
    response_format: ResponseFormat | None = Field(None, description="text, any JSON object, or that of a schema")
    regex: str | None = Field(None, description="a regular expression that the whole reply matches")
    grammar: str | None = Field(None, description="a grammar (llguidance's Lark) that the reply matches")
    return_token_ids: bool | None = Field(None, description="return the ids of prompt and reply")
    timings: bool | None = Field(None, description="return how long the parts of the work took")
    user: Ignored = None
    store: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @property
    @abstractmethod
    def new_tokens(self) -> int | None:
        """How many tokens were asked for at most."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts that end a reply."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    @abstractmethod
    def likeliest(self) -> int | None:
        """How many alternatives are returned beside each token; None for no log-probabilities."""

    def problems(self) -> Iterator[ApiError]:
        """Yield what is wrong with fields together."""
        if self.stream_options is not None and not self.stream:
            yield unsupported("stream_options", "stream_options: only with stream = true")
        format_ = self.response_format
        if format_ is not None and (format_.type == "json_schema") != (format_.json_schema is not None):
            yield invalid(
                "response_format", 'response_format: json_schema comes with type "json_schema", and only then'
            )
        constrained = format_ is not None and format_.type != "text"
        if constrained + (self.regex is not None) + (self.grammar is not None) > 1:
            param = "regex" if self.regex is not None else "grammar"
            yield invalid(param, "response_format, regex, grammar: only one of them constrains a reply")


class CompletionBody(Sampled):
    """POST /v1/completions."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "suffix": "not supported; the model continues a prompt at its end",
        "tools": "not supported; leave them out",
    }

    prompt: (
        Annotated[
            str | Texts | Ids | ListsOfIds,
            Noun("a text, a list of texts, a list of token ids, or a list of lists of token ids, none of them empty"),
        ]
        | None
    ) = Field(None, description="what is continued; without one a text begins")
    max_tokens: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = Field(
        None, description=f"tokens of a reply at most; {DEFAULT_MAX_TOKENS}"
    )
    echo: bool | None = Field(None, description="begin with the prompt")
    logprobs: TopCount | None = Field(
        None, description="return log-probabilities of each token and of so many likeliest ones"
    )
    best_of: Annotated[int, Field(ge=1), WHOLE] | None = Field(None, description="no more than n")
    suffix: Ignored = None

    @property
    def new_tokens(self) -> int:
        """How many tokens were asked for at most."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many alternatives are returned beside each token; None for no log-probabilities."""
        return self.logprobs

    def problems(self) -> Iterator[ApiError]:
        """Yield what is wrong with fields together."""
        yield from super().problems()
        samples = self.n or 1
        if self.best_of is not None and self.best_of != samples:
            yield unsupported("best_of", f"best_of = {self.best_of}: all replies are returned, so only n, {samples}")


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str
    cache_control: Ignored = None


class Message(Body):
    """A turn of a conversation, or the system's text."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "tool_calls": _NO_TOOLS,
        "function_call": _NO_TOOLS,
        "audio": "the model reads text alone",
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart], Noun("a text, or a list of text parts")]
    name: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None
    reasoning_content: Ignored = None


class ChatBody(Sampled):
    """POST /v1/chat/completions."""

    unsupported: ClassVar[Mapping[str, str]] = {
        "tools": "not supported; describe in a message what the model may answer, or constrain it by response_format",
        "functions": "not supported; constrain the reply by response_format",
        "function_call": "not supported; constrain the reply by response_format",
        "audio": "not supported; the model writes text",
        "web_search_options": "not supported; put what the model should know into a message",
        "prediction": "not supported; leave it out",
    }

    messages: Annotated[list[Message], Field(min_length=1), Noun("a list of messages, at least one")]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = Field(
        None, description="tokens of the reply at most; what the context has left"
    )
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = Field(
        None, description="max_tokens under its newer name"
    )
    logprobs: bool | None = Field(None, description="return log-probabilities of each token")
    top_logprobs: TopCount | None = Field(None, description="and of so many likeliest ones; 0")
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None
    modalities: Annotated[list[Literal["text"]], Noun('["text"]')] | None = None

    @property
    def new_tokens(self) -> int | None:
        """How many tokens were asked for at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        """How many alternatives are returned beside each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def problems(self) -> Iterator[ApiError]:
        """Yield what is wrong with fields together."""
        yield from super().problems()
        if self.top_logprobs and not self.logprobs:
            yield invalid("top_logprobs", "top_logprobs: only with logprobs = true")
        newer = self.max_completion_tokens
        if newer is not None and self.max_tokens not in (None, newer):
            yield invalid("max_tokens", "max_tokens and max_completion_tokens are one setting; give one of them")


def _refuse_parts(number: int, message: Mapping[str, Any]) -> None:
    place = f"messages[{number}]"
    if message.get("role") in ("tool", "function"):
        raise unsupported(f"{place}.role", f"{place}: {_NO_TOOLS}")
    for name, advice in Message.unsupported.items():
        if message.get(name):
            raise unsupported(f"{place}.{name}", f"{place}: {advice}")
    content = message.get("content")
    for part in content if isinstance(content, list) else []:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise unsupported(
                f"{place}.content", f"{place}: a part of type {json.dumps(kind)[:60]}; the model reads text alone"
            )


class TokenizeBody(Body):
    """POST /tokenize."""

    model: str | None = None
    prompt: str | None = Field(None, description="a text, as /v1/completions encodes it")
    messages: Annotated[list[Message], Field(min_length=1)] | None = Field(
        None, description="a conversation, as /v1/chat/completions encodes it"
    )
    add_special_tokens: bool | None = Field(None, description="begin a text with bos where the model does; true")
    add_generation_prompt: bool | None = Field(None, description="end messages with the start of a reply; true")
    return_token_strs: bool | None = Field(None, description="return each token's text, too")

    def problems(self) -> Iterator[ApiError]:
        """Yield what is wrong with fields together."""
        if (self.prompt is None) == (self.messages is None):
            yield invalid("prompt", "prompt, messages: exactly one of them is encoded")


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Noun("a list of token ids")]
