"""Storybook, the embedded corpus: small children's stories told from a seed, each with its exact probability.

One description of the language (`words`, `beginnings`, `plots`, `endings`, in the notation of `grammar`) is used in
three directions: `story` tells, `reading` and `check` read and judge, `measure` counts.
"""

from gemmule.data.storybook.check import Verdict, check_story, log_probability
from gemmule.data.storybook.measure import Measure, count_stories, measure_stories
from gemmule.data.storybook.story import Floor, Story, entropy_floor, stories, tell_story

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
