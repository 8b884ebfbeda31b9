"""Everything that is done to a clean model so that several ranks run it as one. Start with
`apply.py`."""
