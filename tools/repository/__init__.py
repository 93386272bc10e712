"""What works on this repository alone: demos, experiments, benchmarks. Not in the wheel."""
