"""What a checkpoint is, found from its config and its tensors' names, shapes and dtypes.

Nothing here reads a tensor's values or knows a model family. ``headers`` reads the
files, ``layout`` says what they hold; both run over a checkpoint of hundreds of
gigabytes in about a second.
"""
