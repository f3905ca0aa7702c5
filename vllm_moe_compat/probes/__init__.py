"""What upstream does by itself, found out by trying."""
