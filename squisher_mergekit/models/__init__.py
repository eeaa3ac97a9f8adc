"""Models without their weights: parameter names in memory and on disk, weights of a folder, adapters, roles."""
