"""Draws which keys a query sees, for the documentation and for those who want to look."""

import numpy as np


def picture(seen):
    """Text of a boolean (queries, keys): ``#`` where the query (row) sees the key (column), ``.`` elsewhere."""
    return "\n".join(" ".join("#" if x else "." for x in row) for row in np.asarray(seen, bool))
