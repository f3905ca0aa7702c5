"""The embedded MLX platform: vLLM's scheduler, sampler and server over mlx-lm models.

vLLM calls ``platform`` (configuration) and ``worker`` (execution). A step goes
``scheduler_output`` → ``runner`` → ``batch`` (who computes what) → the model,
whose cache objects (``attention``, ``linear_attention``) write to and read from
pages (``page_pool``) and states (``state_pool``) → ``sampling``.
"""
