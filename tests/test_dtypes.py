"""The dtype table against safetensors and MLX themselves."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from vllm_moe_compat import dtypes

LOADED = [name for name, known in dtypes.DTYPES.items() if known.mlx]


@pytest.mark.parametrize("name", dtypes.DTYPES)
def test_safetensors_knows_the_name_and_the_width(name: str):
    from safetensors import SafetensorError, deserialize

    def file(width: int) -> bytes:
        entry = {"dtype": name, "shape": [8], "data_offsets": [0, width]}
        header = json.dumps({"x": entry}).encode()
        return len(header).to_bytes(8, "little") + header + bytes(width)

    ((_, found),) = deserialize(file(dtypes.nbytes(name, (8,))))
    assert found["shape"] == [8]
    with pytest.raises(SafetensorError):
        deserialize(file(dtypes.nbytes(name, (8,)) + 1))


@pytest.mark.parametrize("name", LOADED)
def test_mlx_loads_the_dtype_that_the_table_names(name: str, tmp_path: Path):
    width = dtypes.nbytes(name, (8,))
    header = json.dumps({"x": {"dtype": name, "shape": [8], "data_offsets": [0, width]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(width))
    loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    assert loaded["x"].dtype == dtypes.mlx_dtype(name)


def test_names_go_both_ways():
    for name in ("BF16", "F32", "U8", "I64", "BOOL"):
        assert dtypes.stored_name(dtypes.mlx_dtype(name)) == name
    assert dtypes.stored_name(dtypes.mlx_dtype("F8_E4M3")) == "U8"
    assert dtypes.stored_name("torch.bfloat16") == dtypes.STORED_NAMES["bfloat16"] == "BF16"
    assert dtypes.stored_name(mx.float64) == "mlx.core.float64"
    assert dtypes.mlx_dtype("bfloat16") == mx.bfloat16
    with pytest.raises(KeyError, match="F4"):
        dtypes.mlx_dtype("F4")
