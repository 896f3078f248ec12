"""Surgery: from a model to a model, with a receipt of what was preserved. One method a file."""
