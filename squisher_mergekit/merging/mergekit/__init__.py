"""The only room that imports mergekit: hooks, the adapter to its tasks, the two methods, its commands."""
