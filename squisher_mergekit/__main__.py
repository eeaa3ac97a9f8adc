"""``python -m squisher_mergekit``: the command line, for launchers that start a module."""

from squisher_mergekit.cli.main import main

if __name__ == "__main__":
    main()
