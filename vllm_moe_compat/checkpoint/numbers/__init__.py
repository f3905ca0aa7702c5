"""One file per stored number form: how to find it, what can be wrong with it, its words."""
