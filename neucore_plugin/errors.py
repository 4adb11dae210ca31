"""Errors that a user can mend: what was given, what is allowed, what to do; the command line prints no traceback."""


class NeucoreError(Exception):
    """Base of every error this package raises on bad input."""


class ConfigError(NeucoreError, ValueError):
    """A yaml file or an option is wrong; all problems are listed at once."""


class DataError(NeucoreError, ValueError):
    """Annotations, splits or folders are missing or malformed."""


class ImageError(DataError):
    """A file is no readable image."""


class CheckpointError(NeucoreError, RuntimeError):
    """A weight file is missing, damaged, hostile or of another architecture."""
