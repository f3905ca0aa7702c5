"""Describe a checkpoint by its config and its tensors' names, shapes and dtypes.

Nothing here reads a tensor's values or knows a model family. ``headers`` reads the files and
``layout`` describes their content; both take about a second for hundreds of gigabytes.
"""
