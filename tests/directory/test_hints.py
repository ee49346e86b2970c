"""What is given to save(), or asked of restore(), in the wrong place: no state is lost without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import DEADLINE_S, options

import ckpt

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize("nothing", [{}, {"state": None}, {"replicated": None, "sharded": None}], ids=len)
def test_nothing_is_no_checkpoint(nothing: dict[str, Any], tmp_path: Path) -> None:
    with ckpt.Checkpointer(tmp_path, options=options()) as checkpointer:
        with pytest.raises(TypeError, match=r"nothing to save.*state=.*replicated=.*sharded="):
            checkpointer.save(1, **nothing)
        assert checkpointer.steps() == []
        assert checkpointer.save(2, {}).result(DEADLINE_S) and checkpointer.steps() == [2]
