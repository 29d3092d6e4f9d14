"""Side by side with others: how fast and in how much memory Gemmule trains, generates, prepares and loads."""
