"""The pool of the 12-in-1 authors, `hard_negative.pkl` or `hard_negative_cleaned.pkl` (spec 5.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import BadInput
from pipelines.identity import image_key
from pipelines.pickles import NUMPY, load_pickle

_IMAGES, _POOL = "train_image_list", "train_hard_pool"


def read_pool(path: Path) -> tuple[NDArray[np.str_], NDArray[np.integer[Any]]]:
    """Image keys, unicode [m], and positions among them, int [m, k], nearest first, from a pickle read by allow-list.

    Raises BadInput for a pickle of another form.
    """
    content = load_pickle(path, NUMPY)
    try:
        images, pool = content[_IMAGES], content[_POOL]
        keys = np.array([image_key(name) for name in images])
    except (TypeError, KeyError, IndexError) as error:
        wanted = f"a dictionary with {_IMAGES} and {_POOL}"
        raise BadInput(path, f"not the authors' pool: {error!r}", f"expected {wanted}") from error
    if not isinstance(pool, np.ndarray) or pool.ndim != 2 or pool.dtype.kind not in "iu":
        raise BadInput(path, f"{_POOL} is no array [images, neighbours] of integers", "is it the right file?")
    return keys, pool
