"""Maintenance of a store: list its objects, verify, repair, compact, collect garbage, and erase."""
