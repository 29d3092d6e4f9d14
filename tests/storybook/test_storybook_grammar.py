"""The book itself: its sites can be told apart, its numbers add up, and it is as rich as promised."""

import math
from collections.abc import Iterator
from itertools import combinations

import pytest

from gemmule.storybook import count_stories, entropy_floor, measure_stories, stories
from gemmule.storybook.grammar import END, START, Blank, Line, Option, Table, Tags, book, line_table, word_table
from gemmule.storybook.measure import live_tags
from gemmule.storybook.parser import spell

Piece = frozenset[tuple[str, ...]]  # what can stand at one place, each as tokens


def spell_line(line: Line) -> list[Piece]:
    """Write a line as what can stand at each of its places."""
    return [
        frozenset(spell(part.render(option)) for option in book().lexicons[part.variable])
        if isinstance(part, Blank)
        else frozenset({spell(part)})
        for part in line.parts
        if part != " "
    ]


def can_begin_another(one: list[Piece], other: list[Piece]) -> bool:
    """Whether some wording of one line is also a wording of the other or of its beginning."""
    seen = set()
    todo: list[tuple[int, tuple[str, ...], int, tuple[str, ...]]] = [(0, (), 0, ())]
    while todo:
        state = todo.pop()
        if state in seen:
            continue
        seen.add(state)
        i, left, j, right = state
        if (not left and i == len(one)) or (not right and j == len(other)):
            return True
        lefts = [left] if left else one[i]
        rights = [right] if right else other[j]
        after = (i if left else i + 1, j if right else j + 1)
        todo += [(after[0], a[1:], after[1], b[1:]) for a in lefts for b in rights if a[0] == b[0]]
    return False


def tables() -> Iterator[Table[Line] | Table[Option]]:
    """Yield the table of every choice that some story has to make, with every set of tags it can be made with."""
    todo: list[tuple[str, Tags]] = [(START, frozenset())]
    seen = set(todo)
    while todo:
        moment, tags = todo.pop()
        if moment == END:
            continue
        lines = line_table(moment, tags & book().asks[moment])
        yield lines
        for line in lines.options:
            reached = {tags | line.gives}
            for part in line.parts:
                if isinstance(part, Blank) and part.fresh:
                    words = [
                        (before, word_table(part.variable, before & book().asks[part.variable])) for before in reached
                    ]
                    yield from (table for _, table in words)
                    reached = {before | option.gives for before, table in words for option in table.options}
            new = {(line.following, after & live_tags(line.following)) for after in reached} - seen
            seen |= new
            todo += new


def test_no_line_reads_like_the_beginning_of_another_of_its_moment() -> None:
    for lines in book().moments.values():
        for (one, its), (other, others) in combinations([(line, spell_line(line)) for line in lines], 2):
            assert not can_begin_another(its, others), (one.parts, other.parts)


def test_the_comparison_of_lines_finds_twins_and_beginnings() -> None:
    names = frozenset({("Mia",), ("Tom",), ("old", "Tom")})
    runs, ran_away = frozenset({("ran", ".")}), frozenset({("ran", ".", "Away", "!")})
    assert can_begin_another([names, runs], [frozenset({("Tom",)}), ran_away])
    assert can_begin_another([names, runs], [frozenset({("old",)}), frozenset({("Tom", "ran", ".")})])
    assert not can_begin_another([names, runs], [frozenset({("Ann",)}), runs])


def test_no_entry_begins_another_of_its_lexicon() -> None:
    for options in book().lexicons.values():
        for one, other in combinations([spell(option.text) for option in options], 2):
            assert one[: len(other)] != other[: len(one)], (one, other)


def test_heroes_friends_and_helpers_have_separate_names() -> None:
    names = [option.text for lexicon in ("hero", "friend", "helper") for option in book().lexicons[lexicon]]
    assert len(set(names)) == len(names)


def test_every_choice_has_options_whose_probabilities_sum_to_one() -> None:
    for table in set(tables()):
        assert math.fsum(map(math.exp, table.log_probabilities)) == pytest.approx(1, abs=1e-12)


def test_every_line_and_every_word_can_be_told() -> None:
    told = {option for table in set(tables()) for option in table.options}
    assert told == {option for site in (*book().moments.values(), *book().lexicons.values()) for option in site}


def test_what_is_repeated_was_chosen_once_before() -> None:
    repeated = {
        part.variable
        for each in book().moments.values()
        for line in each
        for part in line.parts
        if isinstance(part, Blank) and not part.fresh
    }
    todo: list[tuple[str, Tags, frozenset[str]]] = [(START, frozenset(), frozenset())]
    seen = set(todo)
    while todo:
        moment, tags, bound = todo.pop()
        for line in book().moments.get(moment, ()):
            if not all(tags & group for group in line.needs if group <= PLOT_TAGS):
                continue
            now = set(bound)
            for part in line.parts:
                if not isinstance(part, Blank) or part.variable not in repeated:
                    continue
                if part.fresh:
                    now.add(part.variable)
                assert part.variable in now, (line.parts, part.variable)
            state = (line.following, tags | (line.gives & PLOT_TAGS), frozenset(now))
            if state not in seen:
                seen.add(state)
                todo.append(state)


# The tags that lines give and ask for; the others are given by words.
PLOT_TAGS = frozenset(tag for each in book().moments.values() for line in each for tag in line.gives)


def test_there_are_more_than_a_billion_stories() -> None:
    assert count_stories() > 10**9


def test_five_thousand_stories_have_more_than_1500_different_words() -> None:
    words = {token.lower() for story in stories(5000, seed=1) for token in spell(story.text) if token[0].isalpha()}
    assert len(words) > 1500


def test_the_mean_over_a_sample_agrees_with_the_exact_entropy() -> None:
    floor = entropy_floor(stories(4000, seed=3))
    assert floor.standard_error < 0.3
    assert abs(floor.nats - measure_stories().nats) < 4 * floor.standard_error
