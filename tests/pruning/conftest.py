from __future__ import annotations

import numpy as np
import pytest

from megalite.data.indexed_writer import IndexedWriter


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Token files of a vocabulary of 99."""
    prefix = str(tmp_path_factory.mktemp("tokens") / "data")
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 99, 2_000))
    return prefix
