"""lm_eval's view of a MODEL: the log-probabilities and replies that its tasks ask for."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import gemmule
from gemmule.errors import MissingExtra, ModelError, RecipeError, TokenizerError
from gemmule.evaluate.choices import score_choices
from gemmule.evaluate.lm_eval.chat import render_messages
from gemmule.evaluate.lm_eval.generation import Prompt, generate_replies, read_generation_settings
from gemmule.evaluate.log_probabilities import ContinuationScore, default_runtime, score_continuations
from gemmule.runtime import Runtime
from gemmule.train.opening import load_with_path

NAME = "gemmule"  # of `--model`

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TOKENS = {True: 4096, False: 32_768}  # at once, on a CPU and elsewhere: more are slower there, of which memory is slow
_PORTION = 512  # requests between two updates of the progress bar
_ROWS = 64  # replies that are generated side by side, where nobody says otherwise
_NEW_TOKENS = 256  # of a reply, where the task does not say: what lm_eval's other models take

Pair = tuple[list[int], list[int]]  # ids of a context and of its continuation


class HarnessModel:
    """What lm_eval asks a model, without lm_eval: `register` makes it one of its models.

    bos stands once before a text where the tokenizer begins texts with it. Special tokens in a text are read as such,
    as lm_eval's `hf` reads them, since a rendered chat is a text to it.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_length: int | str | None = None,
        dtype: str | None = None,
        max_batch_size: int | str | None = None,  # noqa: ARG002 - lm_eval passes it to every model
        **unknown: Any,
    ) -> None:
        """Open a MODEL, as every command does.

        `batch_size` is a number of rows; without one, or with "auto", rows are as many as make 16,384 tokens. A CPU
        computes in fp32, a GPU in bf16, where `dtype` ("float32", "bfloat16") does not say otherwise. ModelError where
        it is none, RecipeError for an argument that is not known.
        """
        super().__init__()
        if unknown:
            there = "pretrained, dtype, device, batch_size, max_length"
            raise RecipeError(f"model_args: {', '.join(unknown)}: no such argument of {NAME}; there are {there}")
        if dtype not in (None, "auto", *_DTYPES):
            raise RecipeError(f"model_args: dtype = {dtype!r}: must be one of {', '.join(_DTYPES)}")
        network, tokenizer, self._path = load_with_path(pretrained, device or "auto", _DTYPES.get(str(dtype)))
        on_cpu = network.embedding.weight.device.type == "cpu"
        self._network = network.float() if on_cpu and dtype != "bfloat16" else network
        self._runtime = default_runtime(self._network)
        if dtype == "float32":
            self._runtime = Runtime(self._runtime.device, "fp32")
        self._tokenizer = tokenizer
        self._device = self._runtime.device
        self._rows = _whole_number("batch_size", None if str(batch_size).startswith("auto") else batch_size)
        self._longest = network.config.max_position_embeddings
        self._longest = min(self._longest, _whole_number("max_length", max_length) or self._longest)

    @property
    def max_length(self) -> int:
        """How many tokens the model reads at once."""
        return self._longest

    @property
    def eot_token_id(self) -> int:
        """The id of the end of a text."""
        if self._tokenizer.eos_id is None:
            raise TokenizerError("the tokenizer has no end token; name its eos_token in tokenizer_config.json")
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that a text is predicted from where nothing stands before it: bos, or else the end of a text."""
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """What distinguishes this tokenizer from others, for lm_eval's cache of requests."""
        return self._tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval writes beside the results."""
        parameters = sum(parameter.numel() for parameter in self._network.parameters())
        precision = str(self._network.embedding.weight.dtype)
        return {"model_num_parameters": parameters, "model_dtype": precision, "gemmule": gemmule.__version__}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text with one bos, where the tokenizer begins texts with it; without any for False."""
        ids = self._tokenizer.encode(string, specials=True)
        bos = [self._tokenizer.bos_id]
        return ids[1:] if add_special_tokens is False and self._tokenizer.adds_bos and ids[:1] == bos else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations; what is too long loses the beginning of its context, as in lm_eval's `hf`."""
        scores = self._score([(context, continuation) for _, context, continuation in requests], disable_tqdm)
        return [(score.log_probability, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, without its end, in lm_eval's windows if it is longer than one."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        owners: list[int] = []
        pairs: list[Pair] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self._longest, context_len=1):
                owners.append(number)
                pairs.append(make_disjoint_window(window))
        totals = [0.0] * len(requests)
        for number, score in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            totals[number] += score.log_probability
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return replies up to the first of a task's stop strings; greedy, unless it asks for sampling."""
        from tqdm import tqdm

        asked = []
        for request in requests:
            prompt, options = request.args
            settings = read_generation_settings(options, _NEW_TOKENS)
            room = self._longest - settings.max_new_tokens
            if room < 1:
                raise RecipeError(f"max_gen_toks = {settings.max_new_tokens}: the model reads {self._longest} tokens")
            ids = self.tok_encode(prompt) or [self.prefix_token_id]
            asked.append(Prompt(tuple(ids[-room:]), settings))
        with tqdm(total=len(asked), desc="Generating replies", disable=disable_tqdm) as bar:
            return generate_replies(self._network, self._tokenizer, asked, self._rows or _ROWS, bar.update)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's chat template of that name, or its usual one; TokenizerError where it has none."""
        if chat_template is False:
            return None
        templates = self._tokenizer.chat_templates
        name = "default" if chat_template is True else chat_template
        if name not in templates:
            there = f"it has {', '.join(templates)}" if templates else "it has none: leave chats out"
            raise TokenizerError(f"{self._path}: the tokenizer has no chat template {name!r}; {there}")
        return templates[name]

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat; without the start of the next turn, the last message stays open, to be continued."""
        template = self.chat_template(True)
        assert template is not None
        return render_messages(self._tokenizer, template, chat_history, open_turn=not add_generation_prompt)

    def _score(self, pairs: Sequence[Pair], disable_tqdm: bool) -> list[ContinuationScore]:
        """Score pairs: `batch_size` of similar length at once, or as many as make a number of tokens."""
        from tqdm import tqdm

        cut = [self._cut(*pair) for pair in pairs]
        order = list(range(len(cut)))
        if self._rows:
            order.sort(key=lambda number: -len(cut[number][0]) - len(cut[number][1]))
        scores: dict[int, ContinuationScore] = {}
        size = self._rows or _PORTION
        with tqdm(total=len(cut), desc="Scoring continuations", disable=disable_tqdm) as bar:
            for first in range(0, len(order), size):
                group = order[first : first + size]
                scores |= zip(group, self._score_group([cut[number] for number in group]), strict=True)
                bar.update(len(group))
        return [scores[number] for number in range(len(cut))]

    def _score_group(self, pairs: Sequence[Pair]) -> list[ContinuationScore]:
        if self._rows is None:
            return score_choices(self._network, pairs, _TOKENS[self._device.type == "cpu"], self._runtime)
        longest = max(len(context) + len(continuation) for context, continuation in pairs)
        return score_continuations(self._network, pairs, batch_tokens=longest * self._rows, runtime=self._runtime)

    def _cut(self, context: list[int], continuation: list[int]) -> Pair:
        if len(continuation) > self._longest:
            raise ModelError(f"a continuation of {len(continuation)} tokens; the model reads {self._longest} at once")
        return context[-(self._longest + 1 - len(continuation)) :], continuation


def _whole_number(name: str, value: int | str | None) -> int | None:
    if value is None:
        return None
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise RecipeError(f"{name} = {value!r}: must be a whole number above 0")
    return number


def register() -> Any:
    """Make `HarnessModel` lm_eval's model "gemmule"; return its class. MissingExtra without lm_eval."""
    try:
        importlib.import_module("lm_eval.models")  # lm_eval's own: it looks for them where there is none yet
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import model_registry
    except ImportError:
        raise MissingExtra("lm_eval", "lm-eval", "--tasks") from None
    if NAME in model_registry:
        return model_registry.get(NAME)
    # TemplateLM splits contexts and continuations as every model of lm_eval does.
    model = type("GemmuleLM", (HarnessModel, TemplateLM), {"__doc__": HarnessModel.__doc__})
    model_registry.register(NAME)(model)
    return model
