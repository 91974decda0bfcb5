"""From run records and caches to tables and attention data."""
