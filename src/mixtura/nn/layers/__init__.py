"""Whole mixture layers: published arrangements of router, experts and shared experts. One method a file."""
