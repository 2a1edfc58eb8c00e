"""Where a job runs: starting Ray, profiles, checks of nodes, manifests. It knows nothing of passages or adapters."""
