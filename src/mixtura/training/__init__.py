"""Training: recipes, runs that can be killed and go on, and evaluation by domain."""
