"""``python -m vllm_moe_compat`` is the command ``vllm-moe-compat``."""

import sys

from vllm_moe_compat.commands.main import main

sys.exit(main())
