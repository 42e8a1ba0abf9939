"""Does a newcomer find and reach a seed over every kind of network, or say at once why not?"""

from __future__ import annotations

import os
import shutil

import pytest

from . import address_cells
from .address_cells import NETWORKS, TOOLS, Cell

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0 or not all(map(shutil.which, TOOLS)), reason=f"needs root and {TOOLS}"),
]

BEYOND = "is beyond this machine, which needs --key-file, or --insecure"
ALONE = "nodes of other machines are found with their key file"


@pytest.mark.timeout(2 * address_cells.DEADLINE_S)
def test_is_each_cell_a_complete_fetch_or_a_line_that_says_why() -> None:
    """A node without a key talks to its own machine; all others fetch, whether they listen or not."""
    cells = address_cells.play_all()
    assert len({(c.network, c.key, c.listens, c.mdns) for c in cells}) == len(NETWORKS) * 8 == len(cells)
    wrong = [str(cell) for cell in cells if not _is_right(cell)]
    assert not wrong, "\n".join(wrong)


def _is_right(cell: Cell) -> bool:
    if cell.key or cell.listens:
        return not cell.error
    return (ALONE if cell.mdns else BEYOND) in cell.error
