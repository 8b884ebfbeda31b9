"""Watching a model in service, from the server's log of requests."""
