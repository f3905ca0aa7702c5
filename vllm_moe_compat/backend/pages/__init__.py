"""What layers keep between steps: pages, states, and attention over them."""
