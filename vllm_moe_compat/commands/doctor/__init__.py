"""The chain from a Python to an answer, link by link, and the first one that is broken.

``examine`` is the door. Looking costs little and is done in this process (``surroundings``);
whatever imports MLX or vLLM is done in a process of its own (``steps``, run by ``child``),
so that a crash there is a finding and not the end.
"""

from vllm_moe_compat.commands.doctor.chain import examine
from vllm_moe_compat.commands.doctor.link import BROKEN, OK, SKIPPED, WARNING, Diagnosis, Link

__all__ = ["BROKEN", "OK", "SKIPPED", "WARNING", "Diagnosis", "Link", "examine"]
