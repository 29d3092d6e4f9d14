"""Storybook, the embedded corpus: children's stories sampled from a weighted grammar, with exact log-probabilities.

One description of the language is used in three directions: `story` samples, `parser` and `check` parse and check,
`measure` counts and computes the entropy. Sentences (`beginnings.toml`, `plots.toml`, `endings.toml`) and vocabulary
(`lexicons.toml`) are data files in the notation of `grammar`.
"""

from gemmule.storybook.check import Verdict, check_story, log_probability
from gemmule.storybook.measure import Measure, count_stories, measure_stories
from gemmule.storybook.story import Floor, Story, entropy_floor, stories, tell_story

__all__ = [
    "Floor",
    "Measure",
    "Story",
    "Verdict",
    "check_story",
    "count_stories",
    "entropy_floor",
    "log_probability",
    "measure_stories",
    "stories",
    "tell_story",
]
