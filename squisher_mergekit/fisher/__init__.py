"""What a diagonal Fisher is: a mapping from parameter name to tensor, its metadata, its files, its fingerprint."""
