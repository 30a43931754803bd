"""Which stretches of DNA drive a prediction."""
