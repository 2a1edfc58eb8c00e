"""From a configuration to what the job may use."""

from __future__ import annotations

from cluster.resources import PROFILES, Profile
from prag_core.config import Config


def profile_of(config: Config) -> Profile:
    """Return the profile that a configuration names, with what its section `run` says in place of the profile's."""
    run = config.run
    return PROFILES[run.profile].tuned(
        actors_min=run.actors_min,
        actors_max=run.actors_max,
        actor_cpus=run.actor_cpus,
        actor_gpus=run.actor_gpus,
        partitions=run.partitions,
        tokens_per_step=run.tokens_per_step,
    )
