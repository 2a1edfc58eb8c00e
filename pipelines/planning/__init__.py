"""Before money is spent: checks of every node, and what a run will cost."""
