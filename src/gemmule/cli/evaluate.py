"""`gemmule evaluate MODEL --data FILE`: loss, bits per byte and perplexity on a text, or the stories of a suite."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmule.cli.options import AdapterOption, adapters_of_one
from gemmule.cli.screen import Screen, logged_to, print_json
from gemmule.cli.text_settings import text_settings
from gemmule.reading import local_path
from gemmule.run_folder import run_of

if TYPE_CHECKING:
    from gemmule.data.dataset import Dataset
    from gemmule.data.settings import DataSettings
    from gemmule.evaluate.text import TextScores, Window
    from gemmule.model.gemma3 import Gemma3
    from gemmule.run_folder import RunFolder
    from gemmule.tokenizer import Tokenizer

# Options with long help texts.
SourceOption = Annotated[
    str | None,
    typer.Option(
        help="The SOURCE to score: a file, folder, glob, hf:owner/name, storybook, or - for standard input; "
        "or a prepared dataset, whose validation documents are scored.  [default: those of the run]"
    ),
]
StrideOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Read longer documents in windows of --context that move by so many tokens, so that each token has "
        "at least context - stride tokens before it.  [default: cut them]",
    ),
]
SuiteOption = Annotated[
    str | None,
    typer.Option(
        help="Let the model tell the stories of a suite instead: stories, stories-temperature-1, or answer its tasks: "
        "tasks, tasks-temperature-1; or a .toml file."
    ),
]
TasksOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,NAME",
        help="Run tasks of lm-evaluation-harness instead: storybook (needs no network), hellaswag ...; "
        "--documents is then how many items of each.",
    ),
]


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="A model folder, run folder, .gguf file or owner/name.")
    ],
    data: SourceOption = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Number of documents, from the first.  [default: all]")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Separator of the documents in a text file.  [default: the run's]")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column that holds the text.  [default: the run's]")] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Sequence length; longer documents are cut.  [default: longest document, up to 2048]"),
    ] = None,
    stride: StrideOption = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences per batch.  [default: 32,768 tokens, on a CPU 8,192]")
    ] = None,
    overlap: Annotated[
        bool,
        typer.Option(
            help="Search the run's training data, where it is at hand, for the documents and for text that the model "
            "generates (memorization)."
        ),
    ] = True,
    suite: SuiteOption = None,
    tasks: TasksOption = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before each item of --tasks.  [default: the task's]")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Render --tasks by the model's chat template.")] = False,
    adapter: AdapterOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object last, with every document.")] = False,
) -> None:
    """Measure the loss of a model on a text: nats per token, bits per byte, perplexity, with 95 % intervals.

    The text is cleaned as for training. Each document is scored on its own, from its first token to its last; bits per
    byte can be compared between models of different vocabularies. Of a run folder, the run's own validation documents
    are scored where --data names nothing else, and its own settings say how text is read. Of several models the paired
    differences are given. What is found of a run is kept in its evaluation.json.

    Examples:

        gemmule evaluate runs/story

        gemmule evaluate runs/story/model --data storybook:500

        gemmule evaluate runs/story runs/other --data valid.txt --context 512 --stride 256

        gemmule evaluate runs/story --suite stories --json

        gemmule evaluate runs/story --tasks storybook_cloze,storybook_perplexity
    """
    from gemmule.cli.evaluate_tasks import Options, run_tasks
    from gemmule.errors import RecipeError

    adapters = adapters_of_one(adapter, models)
    if tasks is not None:
        if adapters:
            raise RecipeError(f"--adapter {adapters[0]}: for --tasks, name the folder of the adapter as MODEL")
        unread = {"data": data, "separator": separator, "column": column, "stride": stride, "suite": suite}
        run_tasks(models, tasks, Options(documents, shots, chat, context, batch_size, device), unread, as_json)
        return
    if chat or shots is not None:
        raise RecipeError(f"{'--chat' if chat else '--shots'}: says how --tasks are run; name some, or leave it out")
    with Screen() as screen, logged_to(screen):
        if suite is None:
            from gemmule.evaluate.text import Window

            settings, run = text_settings(local_path(models[0]), data, separator, column)
            text = _Text(screen, settings, run, data, documents, Window(context, stride, batch_size), overlap)
            if text.prepared and (separator or column):
                raise RecipeError(
                    f"--separator, --column: {text.prepared} is prepared, its text was read already; leave them out"
                )
            result = text.evaluate(models, device, adapters)
        else:
            reading = {"data": data, "documents": documents, "separator": separator, "column": column}
            reading |= {"context": context, "stride": stride, "batch-size": batch_size}
            for name, value in reading.items():
                if value is not None:
                    raise RecipeError(f"--{name} {value}: a suite of stories reads no text; leave it out, or --suite")
            from gemmule.evaluate.tasks import is_task_suite

            if is_task_suite(suite):
                result = _answer_tasks(screen, models, suite, device, adapters)
            else:
                result = _tell_stories(screen, models, suite, device, adapters, overlap)
    if as_json:
        print_json(result)


class _Text:
    """A text that models are evaluated on."""

    def __init__(
        self,
        screen: Screen,
        settings: "DataSettings",
        run: "RunFolder | None",
        data: str | None,
        documents: int | None,
        window: "Window",
        overlap: bool,
    ) -> None:
        from gemmule.data.dataset import prepared_folder

        self._screen, self._settings, self._documents = screen, settings, documents
        self._window, self._overlap = window, overlap
        self.prepared = prepared_folder(settings) or (run.data if run and data is None else None)
        self._name = str(self.prepared) if self.prepared else ", ".join(settings.train)

    def evaluate(self, models: Sequence[str], device: str, adapters: Sequence[str]) -> dict[str, Any]:
        """Score the text by each model; say and return the figures, and how they differ."""
        from gemmule.evaluate.results import compare, describe_difference

        if self.prepared:
            self._screen.print(f"the validation documents of {self.prepared}:")
        found, results, tokenizers = {}, [], set()
        for name, model, network, tokenizer, path in _each(self._screen, models, device, adapters):
            found[name], result = self._score(network, tokenizer, model, path)
            results.append({"model": name, **result})
            tokenizers.add(tokenizer.fingerprint)
        if len(models) == 1:
            return results[0]
        differences = compare(found, len(tokenizers) == 1)
        for difference in differences:
            self._screen.print(describe_difference(difference, results[0]["documents"]))
        if len(tokenizers) > 1:
            only = "bits per byte alone" if differences else "nothing: one of them changes the text"
            self._screen.print(f"the tokenizers differ, so that the models can be compared in {only}")
        return {"models": results, "differences": differences}

    def _score(
        self, network: "Gemma3", tokenizer: "Tokenizer", model: str, path: Path
    ) -> "tuple[TextScores, dict[str, Any]]":
        from gemmule.errors import GemmuleError
        from gemmule.evaluate.memorization import Comparison, generate_texts
        from gemmule.evaluate.overlap import Spans, Vocabulary
        from gemmule.evaluate.results import describe_text, keep, text_result
        from gemmule.evaluate.text import score_dataset, score_text

        run, progress = run_of(local_path(model)), self._screen.progress
        dataset = _training_data(self._screen, run) if run and self._overlap else None
        vocabulary = Vocabulary()
        spans = Spans(vocabulary)
        options = self._documents, self._window, progress, spans.add if dataset else None
        if self.prepared is None:
            scores = score_text(network, tokenizer, self._settings, *options)
        else:
            scores = score_dataset(network, tokenizer, self.prepared, *options)
        loss = scores.figures()["loss"]
        if not math.isfinite(loss):
            raise GemmuleError(f"{model}: the loss is {loss}, not a number; gemmule doctor {model} says what is wrong")
        result, memorization = text_result(scores), None
        if run and dataset:
            texts = generate_texts(network, tokenizer, run, progress)
            memorization = Comparison(texts, dataset, vocabulary).search(progress, spans)
            result = text_result(scores, spans.overlapping(), memorization.searched)
            result["memorization"] = memorization.figures()
        for sentence in [*describe_text(result), *([str(memorization)] if memorization else [])]:
            self._screen.print(sentence)
        if run:
            asked = {"data": self._name, "limit": self._documents}
            window = {"context": result["context"], "stride": result["stride"]}
            keep(run, {"kind": "text", "model": _within(run, path), **asked, **window}, result)
        return scores, result


def _tell_stories(
    screen: Screen, models: Sequence[str], suite: str, device: str, adapters: Sequence[str], overlap: bool
) -> dict[str, Any]:
    """Let each model tell the stories of a suite; say and return what they show."""
    from gemmule.evaluate.memorization import Comparison
    from gemmule.evaluate.results import describe_stories, keep
    from gemmule.evaluate.stories import judge_suite, open_suite, tell_suite

    settings, results = open_suite(suite), []
    for name, model, network, tokenizer, path in _each(screen, models, device, adapters):
        run = run_of(local_path(model))
        dataset = _training_data(screen, run) if run and overlap else None
        stories = tell_suite(network, tokenizer, settings, screen.progress)
        comparison = Comparison([story.text for story in stories], dataset) if dataset else None
        memorization = comparison and comparison.search(screen.progress)
        result = judge_suite(stories, comparison.copied() if comparison else None, _tells_the_storybook(run))
        result |= {"searched": memorization and memorization.searched, "settings": settings.model_dump()}
        result |= {"memorization": memorization.figures()} if memorization else {}
        for sentence in [*describe_stories(result), *([str(memorization)] if memorization else [])]:
            screen.print(sentence)
        if run:
            keep(run, {"kind": "stories", "model": _within(run, path), "suite": suite}, result)
        results.append({"model": name, "suite": suite, **result})
    return results[0] if len(models) == 1 else {"models": results}


def _answer_tasks(
    screen: Screen, models: Sequence[str], suite: str, device: str, adapters: Sequence[str]
) -> dict[str, Any]:
    """Let each model answer the tasks of a suite; say and return how many are solved."""
    from gemmule.evaluate.results import keep
    from gemmule.evaluate.tasks import answer_suite, describe_answers, judge_answers, open_task_suite

    settings, results = open_task_suite(suite), []
    for name, model, network, tokenizer, path in _each(screen, models, device, adapters):
        run = run_of(local_path(model))
        result = judge_answers(answer_suite(network, tokenizer, settings, screen.progress))
        result |= {"settings": settings.model_dump()}
        for sentence in describe_answers(result):
            screen.print(sentence)
        if run:
            keep(run, {"kind": "tasks", "model": _within(run, path), "suite": suite}, result)
        results.append({"model": name, "suite": suite, **result})
    return results[0] if len(models) == 1 else {"models": results}


def _each(
    screen: Screen, models: Sequence[str], device: str, adapters: Sequence[str]
) -> "Iterator[tuple[str, str, Gemma3, Tokenizer, Path]]":
    """Open one model after the other, and yield its label and name with it; a CPU computes in fp32, of bf16, too."""
    from gemmule.train.opening import load_with_path

    for label, model in zip(_labels(models), models, strict=True):
        if len(models) > 1:
            screen.print(f"{label}:")
        network, tokenizer, path = load_with_path(model, device, adapters=adapters)
        on_cpu = network.embedding.weight.device.type == "cpu"
        yield label, model, network.float() if on_cpu else network, tokenizer, path


def _labels(models: Sequence[str]) -> list[str]:
    """Return names of the models that differ, where one is given twice."""
    return [
        model if models.count(model) == 1 else f"{model} ({models[: number + 1].count(model)})"
        for number, model in enumerate(models)
    ]


def _within(run: "RunFolder", path: Path) -> str:
    """Return where a model lies in its run folder."""
    return str(path.relative_to(run.path)) if path.is_relative_to(run.path) else str(path)


def _training_data(screen: Screen, run: "RunFolder") -> "Dataset | None":
    """Return the data that a run was trained on; say where it is not at hand."""
    from gemmule.errors import DatasetError
    from gemmule.evaluate.memorization import training_data

    try:
        return training_data(run)
    except DatasetError as error:
        screen.print(str(error))
        return None


def _tells_the_storybook(run: "RunFolder | None") -> bool:
    """Return whether a run was trained on the storybook alone."""
    from gemmule.data.dataset import run_data_settings
    from gemmule.data.sources import StorybookSource, parse_source

    sources = run_data_settings(run).train if run else ()
    return bool(sources) and all(isinstance(parse_source(source), StorybookSource) for source in sources)
