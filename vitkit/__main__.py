"""`python -m vitkit`, as launchers such as torchrun start it."""

from vitkit.cli.main import main

if __name__ == "__main__":
    main()
