"""The models of the benchmark."""
