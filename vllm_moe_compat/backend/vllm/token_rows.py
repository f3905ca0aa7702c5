"""The token ids that a checkpoint has rows for, from its headers.

A model computes ids below the number of rows of its embeddings, and draws ids below that of its
head. A tokenizer may have more tokens than either: fine-tunes add tokens and forget to resize the
model. The front end has to know the numbers before a request is queued, and it has no MLX and no
model, so they are read from the headers of the checkpoint. The worker takes them from the loaded
model (``backend.model.token_rows``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_moe_compat.backend.model.rows import TokenRows
from vllm_moe_compat.checkpoint.config_file import read_config
from vllm_moe_compat.checkpoint.headers import TensorInfo, read_headers
from vllm_moe_compat.checkpoint.names import layer_of
from vllm_moe_compat.errors import CompatError
from vllm_moe_compat.families import modules
from vllm_moe_compat.log import logger

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_HEAD, _EMBEDDING = "lm_head", "embed_tokens"
# Other forms of stored numbers have the tokens on another axis.
_ROWS_FIRST = (".weight", ".weight_packed")


def of_checkpoint(model_config: ModelConfig) -> TokenRows:
    """Return the rows of a checkpoint; where its headers do not tell, those of its config."""
    size = int(model_config.get_vocab_size())
    folder = _folder(model_config)
    if folder is None:
        return TokenRows(size, size)
    try:
        tensors = read_headers(folder)
        row = modules.find(read_config(folder)).row
    except CompatError:
        return TokenRows(size, size)  # The load, which comes next, reports it with its file.
    embedding = _rows(tensors, row.embedding if row else _EMBEDDING, size)
    return TokenRows(embedding, _rows(tensors, _HEAD, embedding))


def warn_of_larger_tokenizer(rows: TokenRows, tokenizer: Any) -> None:
    """Warn if ``tokenizer`` has ids without a row; None has none."""
    if tokenizer is None:
        return
    last = max(int(tokenizer.max_token_id), len(tokenizer) - 1)
    if last < rows.embedding:
        return
    names = tokenizer.convert_ids_to_tokens([rows.embedding])
    logger.warning(
        "the tokenizer has ids up to %d and the model's embeddings have %d rows: a request with "
        "an id of %d%s or more is refused; use the checkpoint's own tokenizer, or resize the "
        "model's embeddings and train them",
        last,
        rows.embedding,
        rows.embedding,
        f" ({names[0]!r})" if names and names[0] else "",
    )


def _folder(model_config: ModelConfig) -> Path | None:
    """Return the checkpoint's folder, or that of the repository in the local cache."""
    path = Path(model_config.model)
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(
        model_config.model, "config.json", revision=model_config.revision
    )
    return Path(config).parent if isinstance(config, str) else None


def _rows(tensors: Mapping[str, TensorInfo], module: str, default: int) -> int:
    # Of several (a second tower), the larger: too large a number is found by the worker.
    return max(_sizes(tensors, module), default=default)


def _sizes(tensors: Mapping[str, TensorInfo], module: str) -> Iterator[int]:
    """Yield the rows of the weights of ``module`` that stand outside layers."""
    for name, info in tensors.items():
        owner, _, _ = name.rpartition(".")
        of_module = owner == module or owner.endswith(f".{module}")
        if of_module and name.endswith(_ROWS_FIRST) and info.shape and layer_of(name) is None:
            yield info.shape[0]
