"""A running server as a model that chats: OpenAI's API over the standard library."""

import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import quote, urlsplit

from gemmule.errors import UserError
from gemmule.inference.conversation import Chunk, Piece, ReplySettings, Usage, messages_of, text_ids

_CONNECT_SECONDS, _READ_SECONDS = 10.0, 600.0


class RemoteModel:
    """Replies through a server: Gemmule's with token ids, another one of OpenAI's API with what it returns."""

    def __init__(self, url: str, model: str | None = None, key: bytes | None = None, chats: bool | None = None) -> None:
        """Ask the server for its models; UserError where none answers, or it has no model of that name."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise UserError(f"--url {url}: no address of a server; write http://127.0.0.1:8000")
        self._url, self._key, self._parts = url, key, parts
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._socket: socket.socket | None = None
        self._stopped = False
        described = self._describe(model)
        self.id = str(described["id"])
        self._own = described.get("owned_by") == "gemmule"
        self.chats = bool(described.get("chats", True)) if chats is None else chats
        context = described.get("context", described.get("max_model_len"))
        self.context: int | None = context if isinstance(context, int) else None
        trained = described.get("trained_context")
        self.trained_context: int | None = trained if isinstance(trained, int) else None
        self.fingerprint: str | None = described.get("fingerprint")
        self._start: list[int] | None = None

    def encode(self, text: str) -> list[int] | None:
        """Return the tokens of a text by the server, special tokens as ordinary text, without bos."""
        return self._tokenize(text, specials=False) if self._own else None

    def stop(self) -> None:
        """End the reply that is being received."""
        self._stopped = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def reply(self, pieces: Sequence[Piece], settings: ReplySettings, seed: int) -> Iterator[Chunk]:
        """Yield a reply to the pieces so far; UserError with its sentence where the server refuses or fails."""
        self._stopped = False
        body: dict[str, Any] = {"model": self.id, "stream": True, "stream_options": {"include_usage": True}}
        body |= _asked(settings) | {"seed": seed}
        if self._own:
            body["return_token_ids"] = True
        if self.chats:
            path, body["messages"] = "/v1/chat/completions", messages_of(pieces, settings.system)
        else:
            path, body["prompt"] = "/v1/completions", self._prompt(pieces)
            if settings.max_tokens is None:  # the API's default there is 16
                read = len(body["prompt"]) if self._own else 0
                body["max_tokens"] = max(1, (self.context or 2048) - read)
        started = time.monotonic()
        try:
            yield from self._receive(self._send("POST", path, body), started)
        except (OSError, HTTPException, ValueError) as error:
            if not self._stopped:
                raise UserError(f"{self._url}: the reply was cut: {_reason(error)}") from None
            yield Chunk("", (), "stopped")
        finally:
            self._socket = None

    def _receive(self, response: HTTPResponse, started: float) -> Iterator[Chunk]:
        """Yield the events of a stream; the last chunk has the finish reason and what was counted."""
        finish, usage, first, count = None, None, started, 0
        for line in response:
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                yield Chunk("", (), finish or "stop", usage)
                return
            event = json.loads(data)
            if "error" in event:
                raise UserError(f"{self._url}: {_message(event)}")
            self.fingerprint = event.get("system_fingerprint") or self.fingerprint
            now = time.monotonic()
            if (prompt := event.get("prompt_token_ids")) is not None:
                yield Chunk("", prompt=tuple(prompt))
            for choice in event.get("choices", ()):
                if (prompt := choice.get("prompt_token_ids")) is not None:
                    yield Chunk("", prompt=tuple(prompt))
                finish = choice.get("finish_reason") or finish
                text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                tokens = tuple(choice.get("token_ids") or ())
                if text or tokens:
                    first, count = (now if not count else first), count + 1
                    yield Chunk(text, tokens)
            if (counted := event.get("usage")) is not None:
                cached = (counted.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                usage = Usage(counted["prompt_tokens"], cached, counted["completion_tokens"], now - first)
        raise HTTPException("the stream ended before its end")

    def _prompt(self, pieces: Sequence[Piece]) -> list[int] | str:
        """Return the text so far: its tokens where the server returns them, and takes them."""
        if not self._own:
            return "".join(piece.text for piece in pieces)
        if self._start is None:
            self._start = self._tokenize("", specials=True)
        ids = text_ids(pieces, self._start, lambda text: self._tokenize(text, specials=False))
        if not ids:
            raise UserError("this model's tokenizer begins no text with bos: write a word first")
        return ids

    def _tokenize(self, text: str, *, specials: bool) -> list[int]:
        body = {"model": self.id, "prompt": text, "add_special_tokens": specials}
        found: list[int] = self._ask("POST", "/tokenize", body)["tokens"]
        return found

    def _describe(self, model: str | None) -> dict[str, Any]:
        models = {each["id"]: each for each in self._ask("GET", "/v1/models").get("data", ())}
        if model is None and len(models) == 1:
            return dict(next(iter(models.values())))
        if model not in models:
            reason = "name a MODEL" if model is None else f"it serves no model {model!r}"
            raise UserError(f"--url {self._url}: {reason}; there are {', '.join(models) or 'none'}")
        return dict(models[model])

    def _ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Return the server's answer; UserError where there is none."""
        try:
            found = json.loads(self._send(method, path, body).read())
        except (OSError, HTTPException, ValueError) as error:
            raise UserError(f"--url {self._url}: no answer of OpenAI's API: {_reason(error)}") from None
        finally:
            self._socket = None
        if not isinstance(found, dict):
            raise UserError(f"--url {self._url}: no answer of OpenAI's API at {path}")
        return found

    def _send(self, method: str, path: str, body: Any = None) -> HTTPResponse:
        """Send a request on a connection of its own; UserError where nobody answers, or the answer is an error."""
        kind = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
        assert self._parts.hostname is not None
        connection = kind(self._parts.hostname, self._parts.port, timeout=_CONNECT_SECONDS)
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key.decode('ascii')}"}
        content = None
        if body is not None:
            content, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        try:
            connection.connect()
        except OSError as error:
            advice = "start one with `gemmule serve MODEL`"
            raise UserError(f"--url {self._url}: no server answers: {_reason(error)}; {advice}") from None
        self._socket = connection.sock
        self._socket.settimeout(_READ_SECONDS)
        connection.request(method, quote(self._base) + path, content, headers | {"Connection": "close"})
        response = connection.getresponse()
        if response.status >= 400:
            raise UserError(f"--url {self._url}: {_refusal(response)}")
        return response


def _asked(settings: ReplySettings) -> dict[str, Any]:
    """Return the settings as fields of a request: those that are not the API's defaults."""
    found = settings.written()
    found.pop("system", None)
    if "stop" in found:
        found["stop"] = [*settings.stop]
    return found


def _refusal(response: HTTPResponse) -> str:
    content = response.read()
    try:
        sentence = _message(json.loads(content))
    except (ValueError, TypeError, AttributeError):
        sentence = f"answers {response.status} {response.reason}"
    advice = "; give the key with --api-key-file" if response.status == 401 else ""
    return sentence + advice


def _message(answer: Any) -> str:
    error = answer["error"] if isinstance(answer, dict) and "error" in answer else answer
    return str(error.get("message") or error) if isinstance(error, dict) else str(error)


def _reason(error: BaseException) -> str:
    reason = error.strerror if isinstance(error, OSError) else None
    return str(reason or error or type(error).__name__)
