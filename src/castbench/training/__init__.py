"""Training: one protocol for every model, resumed to the bit."""
