"""What an operator does to a store: verify, repair, compact, collect garbage, export and erase."""
