"""What stands behind the README: digits to point at, the simulation, the benchmark, and their plots."""
