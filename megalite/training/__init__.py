"""What a run does with a model: its objective, its learning rate, its steps."""
