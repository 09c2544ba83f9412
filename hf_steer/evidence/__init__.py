"""What stands behind the figures of README and docs: digits to point at, the simulation, the benchmark, and their plots."""
