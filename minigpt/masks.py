"""Who may attend to whom, as arithmetic on positions that numpy arrays and torch tensors both understand.

Shapes: B rows, T queries, S keys; the leading axes are free. True means: this query sees this key.
"""

from typing import Any, NamedTuple


def visible(queries_T, keys_S, window: int = 0):
    """Mask (..., T, S): a key at or before the query, and with a window fewer than `window` positions before it."""
    queries_T1, keys_1S = queries_T[..., :, None], keys_S[..., None, :]
    seen_TS = keys_1S <= queries_T1
    return seen_TS & (keys_1S > queries_T1 - window) if window else seen_TS


def same_document(tokens_BT, separator: int):
    """Mask (B, T, T): query and key stand in one document. A separator opens a document and belongs to it."""
    documents_BT = (tokens_BT == separator).cumsum(1)
    return documents_BT[:, :, None] == documents_BT[:, None, :]


class Documents(NamedTuple):
    """Several documents a row, each read as if it were alone: where each token stands in its own, and which that is.

    A separator tells where documents begin too, but lets positions count on through the row: the same for rotary
    positions, another model for learned ones.
    """

    positions_BT: Any  # from 0 in each document
    documents_BT: Any  # equal for the tokens of one document
    starts: Any = None  # for an attention that wants no mask: where each document begins, all rows laid end to end

    def mask(self, window: int = 0):
        """(B, T, T): at or before the query, in the window, in one document."""
        same_BTT = self.documents_BT[:, :, None] == self.documents_BT[:, None, :]
        return visible(self.positions_BT, self.positions_BT, window) & same_BTT
