"""mergekit's own console command; nothing else is imported, so that it starts wherever mergekit does."""


def mergekit_yaml() -> None:
    """Run ``mergekit-yaml`` with the arguments of this process."""
    from mergekit.scripts.run_yaml import main

    main()
