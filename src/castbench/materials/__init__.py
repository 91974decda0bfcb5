"""Materials: crystals with their labels, collected from a source, filtered, split."""
