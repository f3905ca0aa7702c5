"""Storage of a layer between steps: KV pages, states, and attention over pages."""
