"""Studies that train models or search circuits: what was learned, not how fast it ran."""
