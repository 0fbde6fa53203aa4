"""The one exception that means "your input is at fault, and here is what to change", and a parser that raises it."""

import argparse
from typing import NoReturn


class ConfigError(ValueError):
    """Bad input found before anything expensive starts.

    The message is one sentence or a short list that names the key, or the file and row, and says what to do. The command
    line prints it without a traceback and exits with status 2.
    """


class CommandParser(argparse.ArgumentParser):
    """argparse for the small commands, whose errors are those of the others: one message, exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.prog}: {message}")
