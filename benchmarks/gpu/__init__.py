"""A short session on a machine with a GPU and no network: build, correctness, benchmarks. See ../gpu_session.sh."""
