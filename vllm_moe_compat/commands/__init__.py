"""The command ``vllm-moe-compat``: what a checkpoint is, what is done to it, and the way out.

Each command is a module of its own, imported only when it is called: ``inspect`` has to
answer without MLX or torch, and in the time that importing either would take.
"""
