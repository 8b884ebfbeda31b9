"""What reading and writing data raises."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used. The message names the file, what is wrong with it and what to do."""
