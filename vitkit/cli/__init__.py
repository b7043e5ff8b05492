"""The command line. `vitkit.cli.main` is its entry point; nothing else in vitkit imports it."""
