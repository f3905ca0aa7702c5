"""The command ``doctor``: check every link from Python to a served answer.

``chain`` runs the checks in order and finds the first broken link. ``surroundings`` holds the
cheap checks, which run in this process. Every check that imports MLX or vLLM is one of
``steps`` and runs in a process of its own, started by ``child``, so that a crash there is a
finding.
"""
