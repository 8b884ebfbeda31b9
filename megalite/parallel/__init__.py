"""What is done to a clean model so that several ranks run it as one. `apply.py` is the place to start."""
