"""What a model makes of a text: surprise, alternatives, logit lens, attention, ranges; one model, or two compared."""

from gemmule.evaluate.explain.comparison import CommonSpan, Comparison, compare
from gemmule.evaluate.explain.explanation import LONGEST, Explanation, as_json, explain

__all__ = ["LONGEST", "CommonSpan", "Comparison", "Explanation", "as_json", "compare", "explain"]
