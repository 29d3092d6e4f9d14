"""Models that are served: loaded, measured, with an engine each."""

import hashlib
import json
import logging
import time
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

import gemmule
from gemmule.errors import TokenizerError, UserError
from gemmule.inference.engine import CHUNK_CPU, CHUNK_GPU, Engine, run_alone, stop_tokens
from gemmule.inference.preparing import prepare_for_decoding
from gemmule.inference.quantize import Int8, named_weights
from gemmule.inference.requests import Request
from gemmule.inference.runners import Decoding, cache_dtype
from gemmule.model.gemma3 import Gemma3
from gemmule.reading import local_path
from gemmule.run_folder import RunFolder, run_of, step_of
from gemmule.serve.cache_size import SHARE, CacheBound, available_memory, cache_bound
from gemmule.serve.settings import ModelSpec, ServerSettings
from gemmule.tokenizer import Tokenizer
from gemmule.train.opening import load_with_path

log = logging.getLogger(__name__)

_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model with its engine; the engine is for the engine's thread alone, all else is never changed."""

    id: str
    path: Path
    tokenizer: Tokenizer
    engine: Engine
    bound: CacheBound
    context: int
    vocab_size: int
    parameters: int
    format: str
    chats: bool
    stops: frozenset[int]
    fingerprint: str
    created: int
    trained_context: int | None = None  # sequence length of training, where the run is known
    run: str | None = None  # name of the run folder, which no other run has that is served
    followed: bool = False  # whether newer checkpoints take its place

    def described(self) -> dict[str, Any]:
        """Return the model as /v1/models lists it."""
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "gemmule",
            "context": self.context,
            "max_model_len": self.context,  # its name in vLLM
            "trained_context": self.trained_context,
            "parameters": self.parameters,
            "format": self.format,
            "decoding": self.engine.decoding,
            "chats": self.chats,
            # Whether a reply depends on the request alone, bit for bit.
            "reproducible": self.engine.decoding == "native",
            "fingerprint": self.fingerprint,
            "run": self.run,
            "checkpoint": self.path.name,
            "step": step_of(self.path),
            "followed": self.followed,
        }

    @cached_property
    def longest_token(self) -> int | None:
        """The bytes of the longest token; None where the texts of tokens depend on their neighbors."""
        return max(self.tokenizer.token_bytes()) if self.tokenizer.concatenates else None

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for; a special token has its name."""
        return self.tokenizer.piece(token) or self.tokenizer.decode([token], specials=True).encode()


def load_model(spec: ModelSpec, settings: ServerSettings, count: int = 1) -> ServedModel:
    """Open one of `count` models and warm its engine; UserError where it cannot be served as the settings ask."""
    network, tokenizer, path = load_with_path(spec.model, settings.device, adapters=settings.adapters)
    network, decoding = prepare_for_decoding(network, str(path), settings.decoding, settings.int8)
    if settings.chat and (tokenizer.start_of_turn_id is None or tokenizer.end_of_turn_id is None):
        raise TokenizerError(f"MODEL {spec.model}: --chat needs a vocabulary with turn tokens; leave it out")
    longest = network.config.max_position_embeddings
    if settings.context is not None:
        if settings.context > longest:
            raise UserError(f"--context {settings.context}: MODEL {spec.model} has {longest:,} positions")
        longest = settings.context
    weights = network.embedding.weight
    device = weights.device
    chunk = settings.chunk or (CHUNK_CPU if device.type == "cpu" else CHUNK_GPU)
    given = settings.cache_bytes
    available = int(available_memory(device) * SHARE / count) if given is None else given
    bound = cache_bound(network.config, available, settings.max_rows, longest, chunk, cache_dtype(network, decoding))
    engine = Engine(network, settings.max_rows, longest, decoding, tokenizer=tokenizer, size=bound.size, chunk=chunk)
    warm(engine)
    run = run_of(path.resolve())
    return ServedModel(
        id=spec.id,
        path=path,
        tokenizer=tokenizer,
        engine=engine,
        bound=bound,
        context=longest,
        vocab_size=network.config.vocab_size,
        parameters=sum(each.shape.numel() for _, each in named_weights(network)),
        format="int8" if settings.int8 else _FORMATS[weights.dtype],
        chats=settings.chat or tokenizer.chat_template is not None,
        stops=stop_tokens(tokenizer),
        fingerprint=model_fingerprint(network, tokenizer, decoding),
        created=int(time.time()),
        trained_context=None if run is None else run.trained_context(),
        run=None if run is None else _run_name(run, settings),
        followed=settings.follows(spec),
    )


def warm(engine: Engine) -> None:
    """Run two tokens through an engine, so that the first request finds compiled code."""
    for _ in run_alone(engine, Request((0,), 2)):
        pass


def model_fingerprint(network: Gemma3, tokenizer: Tokenizer, decoding: Decoding) -> str:
    """Return a hash of all that decides a reply beside the request: weights, vocabulary, version, decoding."""
    settings = {"version": gemmule.__version__, "decoding": decoding, "tokenizer": tokenizer.fingerprint}
    found = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    for name, weight in sorted(named_weights(network), key=itemgetter(0)):
        for tensor in (weight.data, weight.scales) if isinstance(weight, Int8) else (weight,):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return f"fp_{found.hexdigest()}"


def _run_name(run: RunFolder, settings: ServerSettings) -> str:
    """Return the name of a run folder, with its parent's where another run that is served has the same one."""
    runs = [run_of(local_path(spec.model).resolve()) for spec in settings.models]
    unique = all(each.path == run.path for each in runs if each is not None and each.path.name == run.path.name)
    return run.path.name if unique else f"{run.path.parent.name}/{run.path.name}"
