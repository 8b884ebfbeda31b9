"""What all rooms use: files from outside, counter-based random numbers, progress, secrets."""
