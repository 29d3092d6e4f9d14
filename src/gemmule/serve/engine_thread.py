"""The thread that owns the models: it takes requests from an inbox, steps the engines, and hands out what they said."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gemmule.errors import GemmuleError, UserError
from gemmule.inference.engine import Engine, TokenEvent
from gemmule.inference.requests import SequenceState
from gemmule.serve.failures import ApiError
from gemmule.serve.metrics import Metrics
from gemmule.serve.models import ServedModel, load_model
from gemmule.serve.replies import Reply, Update
from gemmule.serve.settings import ServerSettings

log = logging.getLogger(__name__)

Delivery = tuple[Reply, Update | ApiError]


@dataclass(frozen=True)
class _Submission:
    served: ServedModel
    reply: Reply
    accepted: "asyncio.Future[None]"


class EngineThread:
    """Models and engines, in a thread of their own.

    `submit`, `cancel` and `replace` are for other threads and never wait for a step. `on_ready`, `on_failure` and all
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
        # Who waits for each sequence, and as which choice.
        self._readers: dict[SequenceState, tuple[Reply, int]] = {}
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
        self._inbox.append(_Submission(served, reply, accepted))
        self._ring()
        try:
            await accepted
        except asyncio.CancelledError:
            self.cancel(reply)
            raise

    def cancel(self, reply: Reply) -> None:
        """Let go of a request whose client went away; what is finished already is left as it is."""
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
        failed = ApiError(500, "the engine failed; the server ends", code="engine_failed")
        readers = {id(reply): reply for reply, _ in self._readers.values()}
        for each in self._inbox:
            if isinstance(each, _Submission):
                readers[id(each.reply)] = each.reply
                self._call(_refuse, each.accepted, failed)
        for reply in readers.values():
            self._call(reply.fail, failed)
        self._call(self._on_failure, error)

    def _turn(self) -> None:
        """Take in what came, and step every engine that has work."""
        busy = [engine for engine in self._engines if not engine.idle]
        if not busy:
            with self._bell:
                self._bell.wait_for(lambda: self._inbox or self._stopping)
        while self._inbox:
            self._receive(self._inbox.popleft())
        deliveries: list[Delivery] = []
        for engine in [*self._engines]:
            if not engine.idle:
                deliveries += self._step(engine)
            elif self._engines[engine] not in self.models.values():
                del self._engines[engine]  # of a checkpoint that another one replaced
        self._metrics.observe_engines(self._engines)
        if deliveries:
            self._call(_deliver, deliveries)

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
                    self._readers[sequence] = reply, len(reply.sequences)
                    self._unadmitted[sequence] = reply
                    reply.sequences.append(sequence)
        except (UserError, ValueError) as error:
            self._cancel(reply)
            self._call(_refuse, given.accepted, ApiError(400, str(error), code="invalid_value"))
        else:
            self._call(_accept, given.accepted)

    def _cancel(self, reply: Reply) -> None:
        for sequence in reply.sequences:
            self._readers.pop(sequence, None)
            self._unadmitted.pop(sequence, None)
        if reply.engine is not None:
            reply.engine.cancel(reply.sequences)

    def _step(self, engine: Engine) -> list[Delivery]:
        began = time.monotonic()
        events = engine.step()
        moment = time.monotonic()
        self._metrics.observe_step(len(events))
        self._note_admissions(engine, began)
        deliveries: list[Delivery] = []
        for event in events:
            found = self._readers.get(event.sequence)
            if found is not None:
                deliveries.append(self._delivery(*found, event, moment))
        return deliveries

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

    def _delivery(self, reply: Reply, choice: int, event: TokenEvent, moment: float) -> Delivery:
        sequence, said = event
        if sequence.finish:
            del self._readers[sequence]
        if sequence.error is not None:
            self._cancel(reply)
            return reply, _error_of(sequence.error)
        before = sequence.prompt_log_probabilities if len(sequence.generated) <= 1 else ()
        token, text, scores = (None, "", None) if said is None else (said.token, said.text, said.log_probabilities)
        return reply, Update(choice, token, text, sequence.finish, scores, sequence.cached, before, moment)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: the server has ended
            self._stopping = True


def _error_of(error: GemmuleError) -> ApiError:
    if isinstance(error, UserError):
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(500, str(error), code="generation_failed")


def _deliver(deliveries: Sequence[Delivery]) -> None:
    for reply, given in deliveries:
        if isinstance(given, ApiError):
            reply.fail(given)
        else:
            reply.deliver(given)


def _accept(accepted: "asyncio.Future[None]") -> None:
    if not accepted.done():
        accepted.set_result(None)


def _refuse(accepted: "asyncio.Future[None]", error: ApiError) -> None:
    if not accepted.done():
        accepted.set_exception(error)
