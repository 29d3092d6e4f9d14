"""Plan a recipe before it runs: peak memory, time and cost."""
