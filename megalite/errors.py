"""Errors that a user can cause and mend."""


class ConfigError(ValueError):
    """A config that cannot be used. The message says which setting to change and how."""


class DataError(ValueError):
    """Data that cannot be used. The message names the file, what is wrong with it and what to do."""


class NotFinite(DataError):
    """A model whose numbers are not finite, so that what it would say means nothing."""


class TemplateLimit(DataError):
    """A chat template that does not end, or makes more text than it is given reason to."""


class Unreachable(DataError):
    """Data that could not be had now, and may be another time."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used. The message names the folder and what is wrong with it."""
