"""The matrix in two environments: one writes the checkpoints, another loads them.

    python -m parity.written write FOLDER    with transformers, the oracle
    python -m parity.written load FOLDER     with an older mlx-lm and transformers

So families are compared that the older transformers does not have, or computes otherwise. A
checkpoint has to load right, or to be refused by ``parity.refused`` or for want of a module.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "index.json"


def write(folder: Path) -> None:
    """Write every cell, with its logits beside it."""
    import torch
    import transformers

    import vllm_moe_compat
    from parity.forms import CELLS, build

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    index = []
    with vllm_moe_compat.applied():
        for number, (family, form) in enumerate(CELLS):
            cell = build(family, form)
            place = folder / f"{number:04}"
            place.mkdir(parents=True)
            cell.write(place)
            np.save(folder / f"{number:04}.npy", cell.reference.logits)
            index.append(
                {
                    "family": family.name,
                    "module": family.module,
                    "form": form.name,
                    "tolerance": max(family.tolerance, form.tolerance),
                }
            )
    (folder / INDEX).write_text(json.dumps(index))


def load(folder: Path) -> int:
    """Load every cell, print what is not right, and the numbers; return how many are amiss."""
    import vllm_moe_compat
    from parity.available import is_installed
    from parity.reference import Reference
    from parity.refused import REFUSED
    from parity.verdict import judge
    from vllm_moe_compat.families.installed import OLDER

    words: Counter[str] = Counter()
    amiss = 0
    with vllm_moe_compat.applied():
        for number, cell in enumerate(json.loads((folder / INDEX).read_text())):
            key = (cell["family"], cell["form"])
            logits = np.load(folder / f"{number:04}.npy")
            reference = Reference({}, {}, {}, logits)
            found = judge(folder / f"{number:04}", reference, cell["tolerance"])
            gone = not is_installed(cell["module"])
            expected = "not supported" if gone else REFUSED.get(key)
            word = "no module" if gone and found.word == "refused" else found.word
            words[word] += 1
            if (found.word, expected) != ("right", None) and (
                found.word != "refused" or expected is None or expected not in found.why
            ):
                amiss += 1
                print(f"{key[0]}, {key[1]}: {found}", flush=True)
    for old in OLDER:
        if is_installed(old.module) and not old.is_lacking:
            amiss += 1
            print(f"{old.module} does without the rows' older({old.sign!r}) now: take it out")
    names = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "transformers"))
    print(f"{names}: {', '.join(f'{n} {word}' for word, n in sorted(words.items()))}")
    return amiss


def main() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("write", "load"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.action == "load":
        return load(options.folder) > 0
    return write(options.folder)


if __name__ == "__main__":
    sys.exit(main())
