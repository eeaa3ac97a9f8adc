"""mergekit's own tests, run with and without the plug-in."""
