"""One file for each on-disk layout of optimizer states, safe unpickling, checksums."""
