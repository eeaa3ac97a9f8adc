"""Models: parameter names in memory and on disk, weights of a folder, fingerprints, adapters, roles."""
