"""What evidence scripts share: small models, real data, and training at equal budget."""
