"""The decode loop: sequences, sampling, steps. Knows the model; knows no HTTP and no text."""
