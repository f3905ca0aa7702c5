"""One engine step: requests, forward passes and sampled tokens."""
