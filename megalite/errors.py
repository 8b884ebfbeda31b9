"""Errors that a user can cause and fix."""


class _OfAUser:
    """An error whose message says it all."""

    def _render_traceback_(self) -> list[str]:
        # IPython asks for it: a cell that ends so shows the line, as the command does.
        return [f"{type(self).__name__}: {self}"]


class ConfigError(_OfAUser, ValueError):
    """Raised for a config that cannot be used. The message says which setting to change and how."""


class DataError(_OfAUser, ValueError):
    """Raised for data that cannot be used. The message names the file, what is wrong with it and
    what to do."""


class NotFinite(DataError):
    """Raised for a model whose logits are NaN or infinite, so that its output would mean
    nothing."""


class TemplateLimit(DataError):
    """Raised for a chat template that does not end, or produces more text than its input
    justifies."""


class Unreachable(DataError):
    """Raised for data that cannot be read now, but perhaps later."""


class CheckpointError(_OfAUser, RuntimeError):
    """Raised for a checkpoint that cannot be used. The message names the folder and what is wrong
    with it."""


class NotSaved(CheckpointError):
    """Raised when the last checkpoint of a run could not be written."""
