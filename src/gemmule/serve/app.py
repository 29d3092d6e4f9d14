"""The application: its routes, and what every error looks like."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from gemmule.serve.answers import Format, json_response, stream, unless_gone, whole
from gemmule.serve.bodies import read_body
from gemmule.serve.chat import ChatFormat
from gemmule.serve.completions import CompletionFormat
from gemmule.serve.engine_thread import EngineThread
from gemmule.serve.failures import ApiError, unavailable
from gemmule.serve.generation import Generation, check_constraint, make_generation, token_text
from gemmule.serve.guard import App, Guard, Record
from gemmule.serve.metrics import Metrics
from gemmule.serve.models import ServedModel
from gemmule.serve.openapi import describe
from gemmule.serve.page_files import PAGE, page_response
from gemmule.serve.prompts import Prompt, chat_ids, check_ids, completion_prompts, encode_text
from gemmule.serve.protocol import (
    TOKEN_ID_BOUND,
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from gemmule.serve.replies import Reply
from gemmule.serve.settings import ServerSettings
from gemmule.serve.streams import ClientGone, EventStream

log = logging.getLogger(__name__)

B = TypeVar("B", bound=Body)
# From so many bytes on, a body is read in another thread, so that streams do not wait for it.
_LARGE = 16 << 10


class Service:
    """What the routes share: the engine's thread, who is being answered, and whether new requests are taken."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings, self.limits, self.metrics = settings, settings.limits, Metrics()
        self.engine: EngineThread | None = None
        self.ready = self.draining = False
        self.failed: BaseException | None = None
        # Of their own, so that slow grammars do not hold up long prompts.
        self._compilers = ThreadPoolExecutor(2, "constraints")
        self.replies: dict[Reply, str] = {}  # that are not over, with their models

    def refusal(self) -> ApiError | None:
        """Return why new requests are not taken now, or None."""
        if self.failed is not None:
            return unavailable("the engine failed; the server ends")
        if self.draining:
            return unavailable("the server is shutting down")
        if not self.ready:
            return unavailable("the models are being loaded")
        return None

    def model(self, name: str | None) -> ServedModel:
        """Return the model that a request asks for; ApiError where there is none of that name."""
        if (refusal := self.refusal()) is not None:
            raise refusal
        assert self.engine is not None
        models = self.engine.models
        if name is None and len(models) == 1:
            return next(iter(models.values()))
        if name not in models:
            problem = "model: missing" if name is None else f"model {name!r}: not served here"
            status, code = (400, "missing_parameter") if name is None else (404, "model_not_found")
            raise ApiError(status, f"{problem}; there are {', '.join(models)}", code=code, param="model")
        return models[name]

    async def begin(self, generation: Generation, record: Record) -> None:
        """Hand a generation to the engine; ApiError where the queue is full or the engine refuses it."""
        await check_constraint(generation, self._compilers)
        if (refusal := self.refusal()) is not None:
            raise refusal
        assert self.engine is not None
        self._check_queue(generation)
        record.model = generation.served.id
        record.prompt_tokens = sum(len(prompt.ids) for prompt in generation.prompts)
        self.replies[generation.reply] = generation.served.id
        generation.reply.observe_gap = self.metrics.gap.observe
        try:
            await self.engine.submit(generation.served, generation.reply)
        except BaseException:
            del self.replies[generation.reply]
            raise

    def _check_queue(self, generation: Generation) -> None:
        """Raise ApiError where too many sequences of the model run and wait already."""
        served, wanted = generation.served, generation.reply.choices
        unfinished = sum(reply.left for reply, model in self.replies.items() if model == served.id)
        most = served.engine.cache.rows + self.limits.queue
        if unfinished and unfinished + wanted > most:
            message = f"{unfinished} replies of {served.id} run and wait, at most {most} may; try again later"
            raise ApiError(429, message, code="queue_full")

    def close(self) -> None:
        """Let go of what waits for a thread."""
        self._compilers.shutdown(wait=False, cancel_futures=True)

    def end(self, generation: Generation, record: Record, outcome: str) -> None:
        """Let go of a generation, however it ended."""
        reply = generation.reply
        if reply not in self.replies:
            return
        del self.replies[reply]
        if not reply.over and self.engine is not None:
            self.engine.cancel(reply)
        record.outcome, record.cached_tokens = outcome, sum(reply.cached)
        record.completion_tokens = reply.generated
        self.metrics.observe_reply(reply)


def make_app(service: Service, write: Callable[[str], None] | None = None) -> App:
    """Return the application behind its guard; `write` gets the lines of the access log."""
    app = FastAPI(title="Gemmule", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_information(app, service)
    _add_page(app)
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    return Guard(_Counted(app, service.metrics), service.settings, write)


class _Counted:
    """Counts answers by endpoint and outcome."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["type"] == "http":
                record: Record = scope["gemmule"]
                route = scope.get("route")
                endpoint = getattr(route, "path", "other")
                record.outcome = record.outcome or (
                    str(record.status) if record.status not in (0, 499) else "cancelled"
                )
                self._metrics.requests.labels(endpoint, record.outcome).inc()


async def _api_error(_request: Request, error: Any) -> Response:
    return _error(error)


async def _http_error(_request: Request, error: Any) -> Response:
    return _error(_of_http(error))


async def _client_gone(_request: Request, _gone: Any) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _unforeseen(_request: Request, _failure: Any) -> Response:
    return _error(ApiError(500, "the server failed; the reason is in its log", code="internal_error"))


_HANDLERS: Mapping[Any, Callable[[Request, Any], Awaitable[Response]]] = {
    ApiError: _api_error,
    HTTPException: _http_error,
    ClientGone: _client_gone,
    ClientDisconnect: _client_gone,
    Exception: _unforeseen,
}


def _error(error: ApiError) -> Response:
    return Response(error.encoded(), error.status, error.headers, "application/json")


def _of_http(error: HTTPException) -> ApiError:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return ApiError(404, "there is no such path; /openapi.json lists all", code="not_found", headers=headers)
    if error.status_code == 405:
        allowed = headers.get("Allow", "another")
        return ApiError(405, f"the method is not allowed; use {allowed}", code="method_not_allowed", headers=headers)
    return ApiError(error.status_code, str(error.detail), code="http_error", headers=headers)


async def _read(request: Request, schema: type[B]) -> B:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        message = f"Content-Type {kind or 'is missing'}: send application/json"
        raise ApiError(415, message, code="unsupported_media_type")
    content = await request.body()
    if len(content) < _LARGE:
        return read_body(content, schema)
    return await asyncio.to_thread(read_body, content, schema)


async def _prompts(request: Request, encode: Callable[[], list[Prompt]]) -> list[Prompt]:
    """Encode the prompts of a request, large ones in another thread."""
    return encode() if len(await request.body()) < _LARGE else await asyncio.to_thread(encode)


async def _answer(service: Service, request: Request, generation: Generation, format_: Format) -> Response:
    record: Record = request.scope["gemmule"]
    limits = service.limits
    await unless_gone(request.receive, service.begin(generation, record))
    if generation.body.stream:
        return EventStream(
            stream(generation, format_),
            keep_alive_seconds=limits.keep_alive_seconds,
            stalled_seconds=limits.stalled_seconds,
            on_end=lambda outcome: service.end(generation, record, outcome),
        )
    outcome = "cancelled"
    try:
        answer = await unless_gone(request.receive, whole(generation, format_))
        outcome = "done"
    except ApiError:
        outcome = "error"
        raise
    finally:
        service.end(generation, record, outcome)
    return Response(answer, media_type="application/json")


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Continue prompts."""
        body = await _read(request, CompletionBody)
        served = service.model(body.model)
        prompts = await _prompts(request, lambda: completion_prompts(served, body))
        generation = make_generation("cmpl", served, body, prompts, service.limits)
        return await _answer(service, request, generation, CompletionFormat(generation))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        body = await _read(request, ChatBody)
        served = service.model(body.model)
        prompts = await _prompts(request, lambda: [Prompt(chat_ids(served, body.messages), "")])
        generation = make_generation("chatcmpl", served, body, prompts, service.limits)
        return await _answer(service, request, generation, ChatFormat(generation))


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        """Encode a text or a conversation."""
        body = await _read(request, TokenizeBody)
        served = service.model(body.model)
        if body.messages is not None:
            reply = body.add_generation_prompt is not False
            ids = [*chat_ids(served, body.messages, reply=reply)]
        else:
            ids = encode_text(served, body.prompt or "")
            if body.add_special_tokens is False and served.tokenizer.adds_bos:
                ids = ids[1:]
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": served.context, "tokens": ids}
        answer["token_strs"] = [token_text(served, each) for each in ids] if body.return_token_strs else None
        return json_response(answer)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        """Decode tokens, special ones by their names."""
        body = await _read(request, DetokenizeBody)
        served = service.model(body.model)
        check_ids(served, body.tokens, "tokens")
        return json_response({"prompt": served.tokenizer.decode(body.tokens, specials=True)})


def _add_information(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        """List the models."""
        if (refusal := service.refusal()) is not None and not service.draining:
            raise refusal
        assert service.engine is not None
        return json_response({"object": "list", "data": [each.described() for each in service.engine.models.values()]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """Describe a model."""
        return json_response(service.model(model).described())

    @app.get("/health")
    async def health() -> Response:
        """Report whether requests are taken."""
        if (refusal := service.refusal()) is not None:
            raise refusal
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/openapi.json")
    async def openapi() -> Response:
        """Describe the API."""
        models = service.engine.models.values() if service.engine is not None else ()
        return json_response(
            describe(service.settings, min((each.vocab_size for each in models), default=TOKEN_ID_BOUND))
        )


def _add_page(app: FastAPI) -> None:
    @app.get("/")
    async def page() -> Response:
        """Return the page."""
        return await page_file(PAGE)

    @app.get("/page/{name}")
    async def page_file(name: str) -> Response:
        """Return a file of the page."""
        if (found := page_response(name)) is None:
            raise HTTPException(404)
        return found
