"""What exists, and since when: objects, tables, ledgers, adapters in shards, snapshots and runs."""
