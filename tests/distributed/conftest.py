"""What the recipes of these tests lie beside, and caches of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cases import Places


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    folder = tmp_path_factory.mktemp("places")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTRECIPES_HOME", str(folder / "home"))
        patch.setenv("HF_HOME", str(folder / "hf"))
        yield Places(folder)
