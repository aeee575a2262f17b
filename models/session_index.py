"""Finds words in sessions: an SQLite table of their texts, made from the files and never more than them.

It lies in the cache, is brought up to date before each search, and made anew if it is lost or damaged.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ms4.models import places, sessions
from ms4.models.sessions import SessionError

TABLES = """
create table if not exists files (id text primary key, changed integer, size integer);
create virtual table if not exists turns using fts5 (id unindexed, text, tokenize = "unicode61 remove_diacritics 2");
"""


@dataclass(frozen=True)
class SessionIndex:
    path: Path
    where: Path

    @classmethod
    def open(cls, path: Path | None = None, where: Path | None = None) -> SessionIndex:
        return cls(path or places.ours("CACHE") / "sessions.db", where or sessions.folder())

    def search(self, words: str, most: int = 50) -> list[tuple[str, str]]:
        """(id, where) of the sessions in which all the words stand in one turn, the best first, each once."""
        try:
            return self._search(words, most)
        except sqlite3.DatabaseError:
            self.path.unlink(missing_ok=True)
            return self._search(words, most)

    def _search(self, words: str, most: int) -> list[tuple[str, str]]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600))
        with closing(sqlite3.connect(self.path)) as base, base:
            base.executescript(TABLES)
            self._update(base)
            asked = " ".join('"' + word.replace('"', '""') + '"' for word in words.split())
            rows = base.execute(
                "select id, snippet(turns, 1, '', '', '...', 12) from turns "
                "where turns match ? order by rank limit 1000",
                (asked,),
            )
            found: dict[str, str] = {}
            for id, where in rows:
                found.setdefault(id, " ".join(where.split()))
        return list(found.items())[:most]

    def _update(self, base: sqlite3.Connection) -> None:
        """Brings the table to what the files hold now."""
        known = {id: (changed, size) for id, changed, size in base.execute("select id, changed, size from files")}
        for path in sessions.paths(self.where):
            status = path.stat()
            stamp = status.st_mtime_ns, status.st_size
            if known.pop(path.stem, None) == stamp:
                continue
            self._forget(base, path.stem)
            base.execute("insert into files values (?, ?, ?)", (path.stem, *stamp))
            try:
                turns = sessions.read(path).all_turns
            except SessionError:
                continue
            texts = [(path.stem, f"{sessions.words_of(turn.message)}\n{turn.text}") for turn in turns]
            base.executemany("insert into turns values (?, ?)", texts)
        for id in known:
            self._forget(base, id)

    @staticmethod
    def _forget(base: sqlite3.Connection, id: str) -> None:
        base.execute("delete from files where id = ?", (id,))
        base.execute("delete from turns where id = ?", (id,))
