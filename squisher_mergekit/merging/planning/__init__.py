"""Plan of a merge: its records, and the checks of weights and of the base."""
