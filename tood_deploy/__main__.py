"""List the commands, a line each: `python -m tood_deploy`."""

from tood_deploy import __version__
from tood_deploy.cli.common import COMMANDS
from tood_deploy.reporter import Reporter


def main() -> None:
    """Print the version, and a line for each command."""
    reporter = Reporter()
    reporter.result(f"tood_deploy {__version__}. A command's --help shows its options.")
    width = max(map(len, COMMANDS)) + 2
    for command, description in COMMANDS.items():
        reporter.result(f"  {command:{width}}{description}")


if __name__ == "__main__":
    main()
