"""What cli/options.py wants of the package typer: for `make gpu`, which calls the commands and parses no options."""


class BadParameter(Exception):
    """A value of an option that is refused."""


def Option(*names: object, **how: object) -> None:
    """What describes an option; nobody asks."""
