"""Flags of the commands that take --config: main.py, the planner and the preview."""

from absl import flags

from mambaout_jax.config import check_command_line
from mambaout_jax.errors import UserError

_HELP = {"--help", "-help", "--helpfull", "--helpshort"}


def parse_flags(argv: list[str]) -> list[str]:
    """Parses a command line, and returns its arguments that are not flags: the command alone.

    Raises:
        UserError: when a flag is unknown or has a wrong value.
    """
    if not _HELP.intersection(argv):
        check_command_line(argv)
    try:
        arguments = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(str(error).replace("\n", " ")) from None
    if len(arguments) > 1:
        raise UserError(f"unexpected argument {arguments[1]!r}: expected --flag=value")
    return arguments
