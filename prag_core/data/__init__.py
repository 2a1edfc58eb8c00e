"""Input: corpus files become passages, and published question sets become questions."""
