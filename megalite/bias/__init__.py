"""Bias of a model towards groups of people, by paired and templated tests from local files."""
