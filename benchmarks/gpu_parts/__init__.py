"""The parts of `benchmarks/gpu.py`: what they share, checks on a small model, and speed on large ones."""
