"""The one exception that means "your input is at fault, and here is what to change"."""


class ConfigError(ValueError):
    """Bad input found before anything expensive starts.

    The message is one sentence or a short list that names the key, or the file and row, and says what to do. The command
    line prints it without a traceback and exits with status 2.
    """
