"""Crystals as graphs: asymmetric unit, nearest neighbours, packed storage."""
