"""Whether MLX computes a compiled graph with the bits of the plain one."""

import pytest

# MLX 0.32.0 differs in the last bits: there, decode passes are not compiled. 0.32.4 has this
# function, too.
same_bits = pytest.mark.needs("mlx/include/mlx/backend/cpu/simd/math.h", "sincos_checked")
