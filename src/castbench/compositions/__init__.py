"""Compositions: formulas without structures, their splits, descriptors and the screening of new ones."""
