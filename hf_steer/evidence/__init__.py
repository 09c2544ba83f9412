"""What stands behind the figures of the docs: digits to point at, the simulation, the benchmark, and their plots."""
