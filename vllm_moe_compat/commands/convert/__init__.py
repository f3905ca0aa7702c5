"""A checkpoint written in another layout: the way out, for who wants no plugin.

``convert`` is the door. Where the tensors come from is ``to_mlx``'s and
``to_published``'s business; ``shards`` writes them, each to its place; ``folder`` sees
that the result is there as a whole or not at all.
"""

from vllm_moe_compat.commands.convert.convert import Options, convert
from vllm_moe_compat.commands.convert.folder import Report

__all__ = ["Options", "Report", "convert"]
