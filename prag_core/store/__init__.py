"""The store: objects, tables, adapters in shards, ledgers, snapshots and runs."""
