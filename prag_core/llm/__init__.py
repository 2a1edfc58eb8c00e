"""The language model: load it, add adapters to it, decode with it, and generate text for augmentations."""
