"""lm-evaluation-harness on our model and engine (extra `lm-eval`), and local tasks of the storybook.

`model` is lm_eval's view of a MODEL, `generation` its replies, `local_tasks` the documents of the tasks in `tasks/`,
`run` what `gemmule evaluate --tasks` does. `python -m gemmule.evaluate.lm_eval` is lm_eval's own command, which then
knows `--model gemmule` and the local tasks.
"""

from gemmule.evaluate.lm_eval.run import describe_results, evaluate_tasks

__all__ = ["describe_results", "evaluate_tasks"]
