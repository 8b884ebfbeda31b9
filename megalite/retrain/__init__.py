"""Finetuning a served model on what its users rated and corrected, and swapping it if that is better."""
