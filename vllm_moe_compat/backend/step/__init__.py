"""One step: requests, passes and tokens."""
