"""How a pass over [R, N] is cut into programs: tiles of columns and rows, and strips of rows for sums over them."""

import triton

# A program holds this many elements in registers, and a pass with sums has about this many programs: a few for each
# of a GPU's multiprocessors, and partial sums that are small beside the pass.
TILE, PROGRAMS = 2048, 1024


def tile(channels: int) -> tuple[int, int]:
    """Rows and columns of a tile; no column is idle where channels divide by 64."""
    columns = channels & -channels
    columns = min(256, columns if columns >= 64 else triton.next_power_of_2(channels))
    return TILE // columns, columns


def strip(count: int, channels: int) -> int:
    """How many of `count` rows a program goes through, tile by tile, when it sums over them."""
    rows, columns = tile(channels)
    programs = max(1, PROGRAMS // triton.cdiv(channels, columns))
    return max(1, triton.cdiv(count, programs * rows)) * rows
