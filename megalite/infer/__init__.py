"""Text generation and evaluation with a trained model."""
