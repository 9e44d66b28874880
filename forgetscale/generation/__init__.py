"""Self-dialogues and answers: independent workers, every id exactly once."""
