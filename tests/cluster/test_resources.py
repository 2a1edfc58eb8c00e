"""Actors are counted by what the nodes of the cluster have room for."""

from __future__ import annotations

import pytest

from cluster.resources import Actors


@pytest.mark.slow
def test_actors_that_fit_are_those_for_which_the_nodes_have_room(ray_here: str) -> None:
    # The node has two CPUs and one GPU.
    def that_fit(cpus: float, gpus: float, min_size: int, max_size: int) -> int:
        return Actors(cpus, gpus, min_size, max_size, threads=None).that_fit()

    assert that_fit(0.5, 0, 1, 1000) == 4
    assert that_fit(0.5, 0, 1, 3) == 3
    assert that_fit(0.5, 1, 1, 1000) == 1
    assert that_fit(0.5, 0.25, 1, 1000) == 4
    # On a cluster that is still to grow, the pool starts with its least number.
    assert that_fit(16, 0, 2, 1000) == 2
