"""An operator's jobs on a store: verify, repair, compact, collect garbage, export and erase."""
