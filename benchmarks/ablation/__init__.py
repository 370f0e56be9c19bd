"""What each choice in training is worth: one drafter a cell, by block efficiency."""
