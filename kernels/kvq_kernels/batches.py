"""Batch sizes that decode launches are planned for, in graphs and beside them."""


def planned(requests: int) -> int:
    """As how many requests so many are planned for: 1, 2, 4, then multiples of 8, of 16 beyond 64.

    Of few plans few kernels have to be compiled, and those of graphs serve all other steps, too.
    """
    if requests <= 8:
        return 1 << (requests - 1).bit_length()
    step = 8 if requests <= 64 else 16
    return -(-requests // step) * step
