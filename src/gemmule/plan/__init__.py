"""Planning: what a recipe needs and how long it takes, before anything runs."""
