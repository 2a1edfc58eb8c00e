"""Planning, before money is spent: check every node, and estimate what a run will cost."""
