"""What needs no lm_eval: bos, replies, chats, and what is said without it. The rest is in tests/parity."""

import sys
from pathlib import Path

import pytest
import tokenizers

from gemmule.errors import TokenizerError
from gemmule.evaluate.lm_eval.chat import render_messages
from gemmule.evaluate.lm_eval.generation import GenerationSettings, Prompt, generate_replies
from gemmule.evaluate.lm_eval.local_tasks import judge_continuation
from gemmule.evaluate.lm_eval.model import HarnessModel
from gemmule.formats.folder import save_folder
from gemmule.inference.sampling import SamplingSettings
from gemmule.model.gemma3 import Gemma3
from gemmule.storybook import tell_story
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.chat import CHAT_TEMPLATE, render_chat
from runs import gemmule
from sentences import SENTENCES
from tiny import lively_model, tiny_config

GREEDY = SamplingSettings(temperature=0.0)
CHAT = [
    {"role": "user", "content": " Who? "},
    {"role": "assistant", "content": "Mia."},
    {"role": "user", "content": "?"},
]


@pytest.fixture(scope="module")
def model() -> Gemma3:
    return lively_model(tiny_config(vocab_size=380, max_position_embeddings=256))


@pytest.fixture(scope="module")
def folder(model: Gemma3, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("harness")
    save_folder(model, tiny_tokenizer, made)
    return made


def test_bos_stands_once_before_a_text(folder: Path, tiny_tokenizer: Tokenizer) -> None:
    harness_model = HarnessModel(str(folder), device="cpu")
    bos = tiny_tokenizer.bos_id
    plain = tiny_tokenizer.encode(SENTENCES[0])
    assert plain[0] == bos != plain[1]
    assert harness_model.tok_encode(SENTENCES[0]) == plain
    assert harness_model.tok_encode("<bos>" + SENTENCES[0]) == plain  # a rendered chat begins with it
    assert harness_model.tok_encode(SENTENCES[0], add_special_tokens=False) == plain[1:]
    assert harness_model.prefix_token_id == bos


def replies(model: Gemma3, tokenizer: Tokenizer, rows: int, until: tuple[str, ...], limit: int = 24) -> list[str]:
    asked = [Prompt(tuple(tokenizer.encode(text)), GenerationSettings(limit, until, GREEDY)) for text in SENTENCES[:6]]
    return generate_replies(model, tokenizer, asked, rows)


def test_replies_do_not_depend_on_how_many_are_generated_side_by_side(model: Gemma3, tiny_tokenizer: Tokenizer) -> None:
    alone = replies(model, tiny_tokenizer, 1, ())
    assert all(alone)
    assert len(set(alone)) > 1
    assert replies(model, tiny_tokenizer, 2, ()) == replies(model, tiny_tokenizer, 99, ()) == alone


def test_a_reply_ends_before_the_first_stop_string(model: Gemma3, tiny_tokenizer: Tokenizer) -> None:
    whole = replies(model, tiny_tokenizer, 3, ())
    stop, other = whole[0][4:7], whole[0][9:11]
    expected = [min(text.partition(stop)[0], text.partition(other)[0], key=len) for text in whole]
    assert expected[0] != whole[0]
    assert replies(model, tiny_tokenizer, 3, (other, stop)) == expected


def with_turns(tokenizer: Tokenizer) -> Tokenizer:
    library = tokenizers.Tokenizer.from_str(tokenizer._document)
    library.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    return Tokenizer(library.to_str(), {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE})


def test_a_rendered_chat_is_encoded_as_the_chat_itself(tiny_tokenizer: Tokenizer) -> None:
    tokenizer = with_turns(tiny_tokenizer)
    text = render_messages(tokenizer, CHAT_TEMPLATE, CHAT)
    assert tokenizer.encode(text, specials=True) == render_chat(tokenizer, CHAT, reply=True).ids


def test_an_open_turn_is_left_to_be_continued(tiny_tokenizer: Tokenizer) -> None:
    text = render_messages(with_turns(tiny_tokenizer), CHAT_TEMPLATE, CHAT[:2], open_turn=True)
    assert text.endswith("<start_of_turn>model\nMia.")


def test_a_template_runs_no_code(tiny_tokenizer: Tokenizer) -> None:
    for template in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}"):
        with pytest.raises(TokenizerError, match="the chat template does not take these messages"):
            render_messages(tiny_tokenizer, template, CHAT)


def test_a_whole_story_is_judged_consistent_and_possible() -> None:
    story = tell_story(1, 2).text
    beginning, rest = story[:200], story[200:]
    whole = {"consistent": 1.0, "possible": 1.0}
    assert judge_continuation({"beginning": beginning}, [rest]) == whole
    assert judge_continuation({"beginning": beginning}, [rest[:-9]]) == {"consistent": 0.0, "possible": 0.0}


def test_without_the_library_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.models", "lm_eval.api.model", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    ended = gemmule("evaluate", folder, "--tasks", "storybook")
    assert ended.code == 2
    assert ended.err.strip() == (
        "gemmule: --tasks needs the library lm_eval, which is not installed: pip install 'gemmule[lm-eval]'"
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tasks", "storybook", "--data", "x.txt"], "--data x.txt: tasks bring their own texts"),
        (["--tasks", "storybook", "--suite", "stories"], "--suite stories: tasks bring their own texts"),
        (["--chat"], "--chat: says how --tasks are run"),
        (["--shots", "2"], "--shots: says how --tasks are run"),
    ],
)
def test_options_that_would_do_nothing_are_refused(folder: Path, options: list[str], sentence: str) -> None:
    ended = gemmule("evaluate", folder, *options)
    assert ended.code == 2
    assert sentence in ended.err
