"""What importing and applying loads, seen from a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = "vllm mlx mlx_lm torch transformers wrapt numpy safetensors"


def run(code: str) -> None:
    check = f"""
import sys
def clean(*allowed):
    found = {{m.partition(".")[0] for m in sys.modules}} & set("{HEAVY}".split()) - set(allowed)
    assert not found, found
"""
    subprocess.run([sys.executable, "-c", check + code], check=True, timeout=120)


def test_import_is_light():
    run("import vllm_moe_compat; vllm_moe_compat.__version__; dir(vllm_moe_compat); clean()")


def test_apply_status_and_revert_import_no_mlx():
    run(
        "import vllm_moe_compat as c; c.apply(); str(c.status()); c.revert(); clean('wrapt')\n"
        "with c.applied(): pass\n"
        "clean('wrapt')"
    )


def test_where_mlx_is_missing_apply_is_inert():
    run(
        "for name in ('mlx', 'mlx.core', 'mlx_lm'): sys.modules[name] = None\n"
        "import vllm_moe_compat as c; c.apply()\n"
        "assert {row.state for row in c.status().rows} == {'waiting'}; c.revert()"
    )


def test_planning_needs_no_mlx():
    run("import vllm_moe_compat.plan, vllm_moe_compat.families.registry; clean()")


def test_an_unknown_name_is_an_attribute_error():
    import vllm_moe_compat

    with pytest.raises(AttributeError, match="nothing"):
        _ = vllm_moe_compat.nothing
    assert {"apply", "revert", "applied", "status", "__version__"} <= set(dir(vllm_moe_compat))
