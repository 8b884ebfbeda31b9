"""Answering over HTTP, as OpenAI's API does."""
