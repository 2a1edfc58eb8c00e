"""The language model: loading it, adding adapters to it, decoding with it, and generators that augment."""
