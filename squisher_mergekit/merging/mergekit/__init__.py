"""The only room that imports mergekit: hooks, adapter of its tasks, tasks, the two methods, merges and commands."""
