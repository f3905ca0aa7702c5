"""How a checkpoint becomes what a model wants, as data.

A plan lists every tensor that has to be made, with its sources and operations.
It is complete before a byte is read: whatever cannot be right is refused here.
"""
