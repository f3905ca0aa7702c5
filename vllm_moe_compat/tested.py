"""The version ranges this package is tested with, by distribution name.

Outside of a range nothing is refused; ``status`` and ``doctor`` say so. Each value is a specifier
set as ``packaging.specifiers`` reads it.
"""

from __future__ import annotations

TESTED = {"mlx": ">=0.32,<0.33", "mlx-lm": ">=0.32.2,<0.33", "vllm": ">=0.27.1,<0.33"}
