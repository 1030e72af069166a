"""Who may attend to whom, as arithmetic on positions that numpy arrays and torch tensors both understand.

Shapes: T queries, S keys; the leading axes are free. True means: this query sees this key.
"""


def visible(queries_T, keys_S, window: int = 0):
    """Mask (..., T, S): a key at or before the query, and with a window fewer than `window` positions before it."""
    queries_T1, keys_1S = queries_T[..., :, None], keys_S[..., None, :]
    seen_TS = keys_1S <= queries_T1
    return seen_TS & (keys_1S > queries_T1 - window) if window else seen_TS


def same_document(tokens_BT, separator: int):
    """Mask (B, T, T): query and key stand in one document. A separator opens a document and belongs to it."""
    documents_BT = (tokens_BT == separator).cumsum(1)
    return documents_BT[:, :, None] == documents_BT[:, None, :]
