"""The store: objects, tables, adapters in shards, ledgers, snapshots and runs.

Every function that reads or writes a store raises `UnreachableError` if the store does not answer. Docstrings name
the other errors.
"""
