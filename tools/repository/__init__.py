"""What works on this repository alone: demos, experiments, real images, benchmarks. Not in the wheel."""
