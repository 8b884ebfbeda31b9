"""Which text a run was trained on, and when; taking a text out again; evaluation texts in it."""
