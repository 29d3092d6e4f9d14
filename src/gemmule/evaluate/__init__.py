"""How good is it: loss on a text, and stories that are checked."""
