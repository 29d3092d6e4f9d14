"""Storybook, the embedded corpus: small children's stories told from a seed, each with its exact probability."""

from gemmule.data.storybook.story import Floor, Story, entropy_floor, stories, tell_story

__all__ = ["Floor", "Story", "entropy_floor", "stories", "tell_story"]
