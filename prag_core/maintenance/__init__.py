"""Keeping a store: listing, checking, repairing, compacting and erasing what it holds."""
