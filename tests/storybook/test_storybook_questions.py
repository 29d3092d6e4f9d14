from gemmule.storybook import check_story, tell_story
from gemmule.storybook.questions import CHOICES, clozes, questions


def test_one_choice_of_a_cloze_agrees_with_the_story() -> None:
    for item in clozes(25, seed=3):
        agreeing = [
            number
            for number, choice in enumerate(item.choices)
            if check_story(f"{item.context} {choice}").problems == ("the story does not end",)
        ]
        assert len(set(item.choices)) == CHOICES
        assert agreeing == [item.answer]


def test_the_right_choice_is_what_the_story_says() -> None:
    texts = {tell_story(3, index).text for index in range(40)}
    for item in clozes(25, seed=3):
        assert any(text.startswith(f"{item.context} {item.choices[item.answer]}") for text in texts)


def test_the_right_choice_stands_at_every_place() -> None:
    assert {item.answer for item in clozes(40, seed=3)} == set(range(CHOICES))


def test_the_story_contains_the_answer_to_a_question() -> None:
    asked = questions(60, seed=4)
    for item in asked:
        assert item.answer in item.story
        assert "{" not in item.question
    assert len({item.question.split("'")[0] for item in asked}) >= 6


def test_items_depend_on_their_seed_alone() -> None:
    assert clozes(3, seed=5) == clozes(4, seed=5)[:3] != clozes(3, seed=6)
    assert questions(3, seed=5) == questions(4, seed=5)[:3] != questions(3, seed=6)
