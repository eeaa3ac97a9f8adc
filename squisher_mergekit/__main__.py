"""Command line for launchers that start a module: ``python -m squisher_mergekit``."""

from squisher_mergekit.cli.main import main

if __name__ == "__main__":
    main()
