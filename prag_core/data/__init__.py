"""What comes in: corpus files become passages, published question sets become questions."""
