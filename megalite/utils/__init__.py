"""Small tools that every package uses: files from outside, counter-based random numbers, progress,
secrets."""
