"""What works on this repository alone: demos, experiments, benchmarks, real images. In no wheel."""
