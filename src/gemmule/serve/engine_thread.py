"""The thread that owns the models: it takes requests from an inbox, steps the engines, and hands over their tokens."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gemmule.errors import GemmuleError, UserError
from gemmule.inference.engine import Engine
from gemmule.inference.kv_cache import CacheTooSmallError
from gemmule.inference.requests import SequenceState
from gemmule.serve.failures import ApiError, invalid
from gemmule.serve.metrics import Metrics
from gemmule.serve.models import ServedModel, load_model
from gemmule.serve.replies import Got, Reply
from gemmule.serve.settings import ServerSettings

log = logging.getLogger(__name__)

# The first and the last token of a sequence are handed to the event loop at once, those between so often at most: small
# models take thousands of steps per second, and to write to each client after each step costs more than the step.
HAND_OVER_SECONDS = 0.02

Tokens = Mapping[SequenceState, Sequence[Got]]  # by the sequences that got them


@dataclass(frozen=True)
class _Submission:
    served: ServedModel
    reply: Reply
    accepted: "asyncio.Future[None]"


class EngineThread:
    """Models and engines, in a thread of their own.

    `submit`, `cancel` and `replace` are for the event loop and never wait for a step. `on_ready`, `on_failure` and all
    that replies get are called in the event loop.
    """

    def __init__(
        self,
        settings: ServerSettings,
        metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
        on_ready: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.models: dict[str, ServedModel] = {}  # those that new requests get; replaced as a whole
        self.running = True
        self._settings, self._metrics, self._loop = settings, metrics, loop
        self._on_ready, self._on_failure = on_ready, on_failure
        self._inbox: deque[_Submission | Reply | ServedModel] = deque()
        self._bell = threading.Condition()
        self._stopping = False
        # The event loop's own: who waits for each sequence, and as which choice.
        self._readers: dict[SequenceState, tuple[Reply, int]] = {}
        # The thread's own.
        self._held: dict[SequenceState, list[Got]] = {}
        self._handed_over = 0.0
        self._unadmitted: dict[SequenceState, Reply] = {}
        self._engines: dict[Engine, ServedModel] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Load the models, and step whatever comes."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """End the thread after its step, or leave it after so many seconds."""
        self._stopping = True
        self._ring()
        self._thread.join(seconds)

    async def submit(self, served: ServedModel, reply: Reply) -> None:
        """Hand a request to the engine; ApiError where it refuses it. Cancelling this cancels the request."""
        accepted: asyncio.Future[None] = self._loop.create_future()
        reply.times.submitted = time.monotonic()  # its constraint has been compiled by now
        self._inbox.append(_Submission(served, reply, accepted))
        self._ring()
        try:
            await accepted
        except asyncio.CancelledError:
            self.cancel(reply)
            raise

    def cancel(self, reply: Reply) -> None:
        """Let go of a request; in the event loop. What is finished already is left as it is."""
        for sequence in reply.sequences:
            self._readers.pop(sequence, None)
        self._inbox.append(reply)
        self._ring()

    def replace(self, served: ServedModel) -> None:
        """Serve another checkpoint under a model's name; requests that run keep theirs."""
        self._inbox.append(served)
        self._ring()

    def _ring(self) -> None:
        with self._bell:
            self._bell.notify()

    def _run(self) -> None:
        try:
            count = len(self._settings.models)
            for spec in self._settings.models:
                self._serve(load_model(spec, self._settings, count))
            self._call(self._on_ready)
            while not self._stopping:
                self._turn()
        except BaseException as error:
            self._fail(error)
        finally:
            self.running = False

    def _fail(self, error: BaseException) -> None:
        self.running = False
        if not isinstance(error, UserError):
            log.exception("the engine's thread failed")
        self._hand_over_all()
        failed = ApiError(500, "the engine failed; the server ends", code="engine_failed")
        for each in self._inbox:
            if isinstance(each, _Submission):
                self._call(_refuse, each.accepted, failed)
        self._call(self._fail_readers, failed)
        self._call(self._on_failure, error)

    def _turn(self) -> None:
        """Take in what came, and step every engine that has work."""
        if all(engine.idle for engine in self._engines):
            self._hand_over_all()
            with self._bell:
                self._bell.wait_for(lambda: self._inbox or self._stopping)
        while self._inbox:
            self._receive(self._inbox.popleft())
        for engine in [*self._engines]:
            if not engine.idle:
                self._step(engine)
            elif self._engines[engine] not in self.models.values():
                del self._engines[engine]  # of a checkpoint that another one replaced
        if time.monotonic() - self._handed_over >= HAND_OVER_SECONDS:
            self._hand_over_all()

    def _hand_over_all(self) -> None:
        """Give the event loop all tokens that it does not have yet."""
        self._handed_over = time.monotonic()
        self._metrics.observe_engines(self._engines)
        held, self._held = self._held, {}
        self._hand_over(held)

    def _hand_over(self, tokens: Tokens) -> None:
        """Give the event loop tokens; it is woken once for all of them."""
        if tokens:
            self._call(self._deliver, tokens)

    def _receive(self, given: "_Submission | Reply | ServedModel") -> None:
        if isinstance(given, ServedModel):
            self._serve(given)
        elif isinstance(given, Reply):
            self._cancel(given)
        else:
            self._submit(given)

    def _serve(self, served: ServedModel) -> None:
        self._engines[served.engine] = served
        self.models = self.models | {served.id: served}

    def _submit(self, given: _Submission) -> None:
        engine, reply = given.served.engine, given.reply
        reply.engine = engine
        self._engines[engine] = given.served
        try:
            for request in reply.requests:
                for sequence in engine.submit(request):
                    self._unadmitted[sequence] = reply
                    reply.sequences.append(sequence)
        except (UserError, ValueError) as error:
            self._cancel(reply)
            self._call(_refuse, given.accepted, _refusal_of(error, given))
        else:
            self._call(self._accept, given)

    def _cancel(self, reply: Reply) -> None:
        for sequence in reply.sequences:
            self._unadmitted.pop(sequence, None)
        if reply.engine is not None:
            reply.engine.cancel(reply.sequences)

    def _step(self, engine: Engine) -> None:
        began = time.monotonic()
        events = engine.step()
        if events:
            moment, hurried = time.monotonic(), []
            for sequence, event in events:
                self._held.setdefault(sequence, []).append(Got(event, moment))
                if sequence.finish or len(sequence.generated) == 1:
                    hurried.append(sequence)
            self._metrics.observe_step(len(events))
            self._hand_over({sequence: self._held.pop(sequence) for sequence in hurried})
        self._note_admissions(engine, began)

    def _note_admissions(self, engine: Engine, moment: float) -> None:
        """Note which sequences got a row in this step, and what of their prompts was read anew."""
        if not self._unadmitted:
            return
        queued = set(engine.queued)
        for sequence, reply in [*self._unadmitted.items()]:
            if sequence in queued:
                continue
            del self._unadmitted[sequence]
            reply.times.admitted = reply.times.admitted or moment
            if sequence.sample == 0:
                self._metrics.count_prompt(len(sequence.request.prompt), sequence.cached)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: the server has ended
            self._stopping = True

    # In the event loop.

    def _accept(self, given: _Submission) -> None:
        if not given.accepted.done():
            reply = given.reply
            self._readers |= {sequence: (reply, choice) for choice, sequence in enumerate(reply.sequences)}
            given.accepted.set_result(None)

    def _deliver(self, tokens: Tokens) -> None:
        for sequence, given in tokens.items():
            if (reader := self._readers.get(sequence)) is None:
                continue
            reply, choice = reader
            last = given[-1].event
            if last is None and sequence.error is not None:
                reply.deliver(choice, sequence, given[:-1])
                reply.fail(_error_of(sequence.error))
                self.cancel(reply)
                continue
            reply.deliver(choice, sequence, given)
            if last is None or last.finish:
                del self._readers[sequence]

    def _fail_readers(self, error: ApiError) -> None:
        for reply, _ in self._readers.values():
            reply.fail(error)


def _error_of(error: GemmuleError) -> ApiError:
    if isinstance(error, UserError):
        return invalid(None, str(error))
    return ApiError(500, str(error), code="generation_failed")


def _refusal_of(error: Exception, given: _Submission) -> ApiError:
    if isinstance(error, CacheTooSmallError):
        advice = "ask for fewer replies, or for shorter ones with max_tokens"
        param = "max_tokens" if given.reply.samples == 1 else "n"
        return invalid(param, f"{error}, it keeps {given.served.bound.tokens} tokens; {advice}", "cache_too_small")
    return invalid(None, str(error))


def _refuse(accepted: "asyncio.Future[None]", error: ApiError) -> None:
    if not accepted.done():
        accepted.set_exception(error)
