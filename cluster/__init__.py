"""Where a job runs: Ray start-up, resources and manifests. Knows nothing of passages or adapters."""
