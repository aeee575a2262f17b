"""A session together with what it holds, so that a prompt is computed only from where it differs.

A key is a number for a position (`Prompt.keys`): the id of its token or, in an image, one made of the image's content.
"""

from __future__ import annotations

import numpy as np

import ms4

BLOCK = 128  # positions that sessions can hold in common: the block of the kv cache


class Timeline:
    """A session and the keys of the positions that it holds.  Used by one thread at a time."""

    def __init__(self, session: ms4.Session) -> None:
        self.session = session
        self.n_ctx = session.n_ctx
        self._keys = np.empty(256, np.int64)  # the first `length` count
        self.length = 0
        if session.length:
            session.rewind(0)  # nobody knows the keys of what it holds

    @property
    def keys(self) -> np.ndarray:
        return self._keys[: self.length]

    def common(self, keys: np.ndarray) -> int:
        """The length of the common prefix."""
        return common_prefix(self.keys, keys)

    def append(self, keys: np.ndarray) -> None:
        """Notes what the engine has appended to the session."""
        length = self.length + len(keys)
        if length > len(self._keys):
            self._keys = np.concatenate([self.keys, np.empty(max(length, self.length), np.int64)])
        self._keys[self.length : length] = keys
        self.length = length

    def rewind(self, length: int) -> None:
        """Forgets everything after the first `length` positions."""
        if length != self.length:
            self.session.rewind(length)
            self.length = length

    def fork(self, other: Timeline, n: int) -> None:
        """Becomes the first n positions of another timeline, which both then hold in common."""
        self.session.share(other.session, n)
        self.length = 0
        self.append(other.keys[:n])

    def close(self) -> None:
        self.session.close()


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Its length, of two arrays of keys."""
    n = min(len(one), len(other))
    differ = np.flatnonzero(one[:n] != other[:n])
    return int(differ[0]) if len(differ) else n
