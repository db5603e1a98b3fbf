import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from liqlab import clock
from liqlab.events import Columns
from liqlab.journal import RESERVED, ROW_BYTES, Entry, Journal, JournalError
from liqlab.journalfile import pack

T0 = 1_737_908_829_829
MB = 1 << 20
Rows = list[tuple[object, ...]]


def batch(n: int = 50, seed: int = 1, at_ms: int = 0, symbols: int = 400) -> Columns:
    """Events as the writer cuts them from a table: the lists hold names that do not occur."""
    rng = clock.generator(seed)
    return Columns(
        T0 + at_ms + np.sort(rng.integers(0, 1_000, n)),
        rng.integers(0, 3, n).astype(np.int8),
        rng.integers(0, symbols, n),
        rng.integers(0, 2, n).astype(np.int8),
        *rng.lognormal(3, 3, (3, n)),
        ["binance", "bybit", "okx", "never"],
        [f"S{i}-é" for i in range(symbols + 1)],
    )


def plain(events: Columns) -> Rows:
    """Rows with names in place of codes, floats bit for bit."""
    return list(
        zip(
            events.ts_ms.tolist(),
            [events.exchanges[code] for code in events.exchange],
            [events.symbols[code] for code in events.symbol],
            events.side.tolist(),
            *(column.view(np.int64).tolist() for column in (events.price, events.size, events.notional)),
            strict=True,
        )
    )


def contents(entries: Iterable[Entry]) -> dict[int, Rows]:
    """Number -> rows; the numbers must ascend."""
    listed = [(entry.seq, plain(entry.events)) for entry in entries]
    assert [seq for seq, _ in listed] == sorted({seq for seq, _ in listed})
    return dict(listed)


def seqs(entries: Iterable[Entry]) -> list[int]:
    return list(contents(entries))


def files(path: Path) -> dict[str, int]:
    return {found.name.removeprefix(path.name): found.stat().st_size for found in path.parent.glob(path.name + "*")}


def fill(journal: Journal, seq: int, n: int) -> int:
    """Append until nothing more fits; return the last number."""
    events = batch(n)
    with suppress(JournalError):
        while True:
            journal.append(seq + 1, events)
            seq += 1
    return seq


class Nursery:
    """A process that forks children; each runs some lines on a journal, until SIGKILL ends it."""

    SCRIPT = """
import os, signal, sys, traceback
from tests.test_journal import *
for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            os.write(1, b"%d\\n" % os.getpid())
            exec(eval(line))
            os.kill(os.getpid(), signal.SIGKILL)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print("end", os.waitpid(child, 0)[1], flush=True)
"""

    def __init__(self) -> None:
        root = Path(__file__).parents[1]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT], stdin=pipe, stdout=pipe, text=True, cwd=root
        )

    def run(self, path: Path, code: str, *, kill_after_s: float | None = None) -> list[int]:
        """Run `code` with a journal `j`; return the numbers that it said."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        code = f"say = lambda seq: os.write(1, b'%d\\n' % seq)\nj = Journal({str(path)!r}, max_bytes=64 << 20)\n{code}"
        self.process.stdin.write(f"{code!r}\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        said = []
        while not (line := self.process.stdout.readline()).startswith("end"):
            assert line, "the nursery has ended"
            said.append(int(line))
            if kill_after_s is not None and len(said) == 1:
                threading.Timer(kill_after_s, os.kill, (child, signal.SIGKILL)).start()
        assert line == f"end {signal.SIGKILL.value}\n"
        return said


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.process.communicate()


FILLED = {seq: (20 + seq % 3 * 150, seq) for seq in range(1, 121)}


@pytest.fixture(scope="module")
def filled(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What SIGKILL left of a journal with 120 batches: half of them are in the database, the rest only in its -wal."""
    path = tmp_path_factory.mktemp("filled") / "journal.db"
    code = """for seq, what in FILLED.items():
        j.append(seq, batch(*what))
        if seq == 60: j._db.execute("PRAGMA wal_checkpoint").fetchall()
    """
    nursery.run(path, code)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "journal.db"


def test_a_batch_comes_back_as_it_was(path: Path) -> None:
    odd = batch(4)
    odd.price[:] = [5e-324, 1.7976931348623157e308, 0.1 + 0.2, 1e-7]
    given = {3: batch(1), 7: odd, 8: batch(5_000), 2**53: batch(9_000, symbols=70_000)}  # codes of 1, 2 and 4 bytes
    journal = Journal(path, max_bytes=8 * MB)
    for seq, events in given.items():
        journal.append(seq, events, ahead=seq == 7)
    for _ in range(2):
        got = journal.pending()
        assert contents(got) == {seq: plain(events) for seq, events in given.items()}
        assert [entry.seq for entry in got if entry.ahead] == [7]
        assert (journal.waiting, journal.waiting_batches, journal.last_seq) == (14_005, 4, 2**53)
        assert len(got[0].events.symbols) == 1  # only what occurs
        assert seqs(journal.pending(2)) == [3, 7]
        writer = journal.writer
        journal.close()
        journal = Journal(path, max_bytes=8 * MB)
        assert (journal.recovery, journal.writer) == (None, writer)
    journal.close()


def test_a_full_journal_refuses_says_how_much_waits_and_accepts_again(path: Path) -> None:
    journal = Journal(path, max_bytes=20_000)
    kept = fill(journal, 0, 50)
    assert 5 < kept < 12
    assert journal.bytes <= 20_000
    with pytest.raises(JournalError, match=rf"full: {kept * 50} events wait .* of 20,000 bytes .*raise journal\.max_"):
        journal.append(kept + 1, batch(50))
    assert contents(journal.pending()) == {seq: plain(batch(50)) for seq in range(1, kept + 1)}

    journal.acknowledge(3)
    journal.append(kept + 1, batch(50))
    assert seqs(journal.pending()) == list(range(4, kept + 2))
    journal.acknowledge(kept + 1)
    assert (journal.waiting, journal.waiting_batches, journal.bytes, journal.pending()) == (0, 0, 0, [])
    with pytest.raises(JournalError, match=r"needs 183,\d+; nothing was dropped; raise journal"):
        journal.append(kept + 2, batch(5_000))
    journal.close()


def test_the_window_of_wal_is_kept_and_what_left_it_makes_room(path: Path) -> None:
    journal = Journal(path, mode="wal", max_bytes=MB, window_ms=10_000)
    for seq in range(1, 21):  # one a second
        journal.append(seq, batch(20, seed=seq, at_ms=seq * 1_000))
    assert seqs(journal.replay()) == list(range(1, 21))  # all of it waits: nothing may go
    journal.acknowledge(15)
    assert seqs(journal.pending()) == list(range(16, 21))
    newest_ms = max(int(batch(20, seed=seq, at_ms=seq * 1_000).ts_ms.max()) for seq in range(1, 21))
    in_window = [
        seq for seq in range(1, 16) if batch(20, seed=seq, at_ms=seq * 1_000).ts_ms.max() >= newest_ms - 10_000
    ]
    assert 4 <= len(in_window) <= 6
    assert seqs(journal.replay()) == in_window + list(range(16, 21))

    journal.append(21, batch(20, at_ms=21_000), acknowledged=True)
    journal.append(22, batch(20, at_ms=22_000))
    journal.acknowledge(22, alone=True)
    assert seqs(journal.pending()) == list(range(16, 21))
    # Far later and full: what is acknowledged makes room, what waits does not.
    journal.max_bytes = journal.bytes + 100
    journal.append(23, batch(20, at_ms=90_000))
    assert seqs(journal.replay()) == [*range(16, 21), 23]
    with pytest.raises(JournalError, match="window of 10 s"):
        journal.append(24, batch(500, at_ms=99_000))
    journal.close()


@pytest.mark.parametrize("reopen", [False, True])
def test_forgotten_acknowledgements_wait_again(path: Path, reopen: bool) -> None:
    journal = Journal(path, mode="wal", max_bytes=MB)
    for seq in range(1, 7):
        journal.append(seq, batch(10, seed=seq), acknowledged=seq == 5)
    journal.acknowledge(3)
    assert (journal.waiting, seqs(journal.pending())) == (20, [4, 6])
    assert journal.forget_acknowledgements() == 40
    if reopen:
        journal.close()
        journal = Journal(path, mode="wal", max_bytes=MB)
    assert (journal.waiting, seqs(journal.pending())) == (60, [1, 2, 3, 4, 5, 6])
    journal.acknowledge(6)
    assert (journal.waiting, seqs(journal.replay())) == (0, [1, 2, 3, 4, 5, 6])
    journal.close()


def test_spool_drops_what_wal_had_kept(path: Path) -> None:
    with_window = Journal(path, mode="wal", max_bytes=MB)
    for seq in range(1, 5):
        with_window.append(seq, batch(10))
    with_window.acknowledge(2)
    with_window.close()
    journal = Journal(path, max_bytes=MB)
    journal.append(5, batch(10), acknowledged=True)
    assert journal.forget_acknowledgements() == 0
    assert seqs(journal.replay()) == seqs(journal.pending()) == [3, 4]
    assert journal.last_seq == 5
    journal.close()


def test_a_number_is_used_once(path: Path, nursery: Nursery) -> None:
    journal = Journal(path, max_bytes=MB)
    journal.append(4, batch(1))
    with pytest.raises(JournalError, match="holds a batch 4 already"):
        journal.append(4, batch(2))
    journal.append(9, batch(1))
    journal.acknowledge(6)
    with pytest.raises(JournalError, match="above 9"):
        journal.append(5, batch(1))
    with pytest.raises(ValueError, match="no events"):
        journal.append(10, batch(0))
    assert (seqs(journal.pending()), journal.waiting) == ([9], 1)
    journal.reserve(17)
    journal.close()
    journal = Journal(path, max_bytes=MB)
    assert journal.last_seq == 17  # though nothing above 9 came here
    journal.close()

    nursery.run(path, "j.append(18, batch(1)); j.reserve(600)")
    journal = Journal(path, max_bytes=MB)
    assert journal.recovery is None
    assert 600 <= journal.last_seq <= 600 + RESERVED
    journal.close()
    (path.parent / "journal.db-mark").unlink()
    last, journal = journal.last_seq, Journal(path, max_bytes=MB)
    assert journal.last_seq > last + RESERVED  # nothing tells which were in use
    assert seqs(journal.pending()) == [9, 18]
    journal.close()


def test_a_second_opener_is_refused(path: Path) -> None:
    journal = Journal(path, max_bytes=MB)
    journal.append(1, batch())
    with pytest.raises(JournalError, match="in use by another writer; stop that one"):
        Journal(path, max_bytes=MB)
    other = sqlite3.connect(path, timeout=0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("DELETE FROM entries")
    other.close()
    journal.close()
    with pytest.raises(JournalError, match="closed"):
        journal.append(2, batch())

    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("SELECT count(*) FROM entries").fetchone()
    with pytest.raises(JournalError, match="another program has it open"):
        Journal(path, max_bytes=MB)
    other.close()
    journal = Journal(path, max_bytes=MB)
    assert (journal.recovery, seqs(journal.pending())) == (None, [1])
    journal.close()


def test_threads_may_share_it(path: Path) -> None:
    journal = Journal(path, mode="wal", max_bytes=8 * MB, window_ms=0)

    def append(first: int) -> None:
        for seq in range(first, 400, 4):
            journal.append(seq, batch(5, at_ms=seq))
            journal.acknowledge(seq, alone=True)

    threads = [threading.Thread(target=append, args=(first,)) for first in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = len(seqs(journal.replay()))
    assert held < 100  # the window is no time at all
    assert journal._db.execute("SELECT count(*) FROM done").fetchone()[0] == held
    assert (journal.waiting, journal.forget_acknowledgements()) == (0, 5 * held)
    journal.close()


def test_the_file_stays_small(path: Path) -> None:
    limit, seq, peak = MB, 0, dict.fromkeys(("", "-wal"), 0)
    journal = Journal(path, max_bytes=limit)
    for cycle in range(50):
        held = seq
        seq = fill(journal, seq, 30 + cycle * 31 % 400)
        assert journal.bytes > limit * 0.9
        peak = {end: max(size, files(path)[end]) for end, size in peak.items()}
        for done in range(held, seq + 1, 7):
            journal.acknowledge(done)
        journal.acknowledge(seq)
    assert peak[""] < 2 * limit + MB
    assert peak["-wal"] < 8 * MB
    journal.close()
    assert "-wal" not in files(path)

    journal = Journal(path, max_bytes=20 * MB)  # what a burst has taken is given back
    for extra in range(1, 90):
        journal.append(seq + extra, batch(5_000))
    grown = journal._db.execute("PRAGMA page_count").fetchone()[0] * 4096
    for extra in range(1, 80):
        journal.acknowledge(seq + extra)
    assert journal._db.execute("PRAGMA page_count").fetchone()[0] * 4096 < grown / 2
    for extra in range(90, 170):
        journal.append(seq + extra, batch(5_000))
    journal.acknowledge(seq + 169)
    journal.close()
    assert files(path)[""] < grown / 4


# Damage


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for end in files(source):
        (target / (source.name + end)).write_bytes((source.parent / (source.name + end)).read_bytes())
    return target / source.name


def test_a_hundred_kinds_of_damage(filled: Path, tmp_path: Path) -> None:
    given = {seq: plain(batch(*what)) for seq, what in FILLED.items()}
    clean = Journal(copied(filled, tmp_path / "clean"), max_bytes=64 * MB)
    assert contents(clean.pending(1_000)) == given
    clean.close()
    kept, left, reported = np.zeros(100), np.ones(100), 0
    for case in range(100):
        rng = clock.generator(case)
        end = ("", "-wal")[case % 2]
        hurt = copied(filled if case % 4 else clean.path, tmp_path / str(case))
        target = hurt.with_name(hurt.name + end)
        content = bytearray(target.read_bytes())
        match case // 2 % 5:
            case 0:
                place = int(rng.integers(0, len(content)))
                left[case] = place / len(content)
                del content[place:]
            case 1:
                for place in rng.integers(0, len(content), 5):
                    content[place] ^= int(rng.integers(1, 256))
            case 2:
                place = int(rng.integers(0, len(content) - 8192))
                content[place : place + 8192] = rng.bytes(8192)
            case 3:
                content[int(rng.integers(0, 100))] ^= int(rng.integers(1, 256))
            case 4:
                place = int(rng.integers(0, len(content)))
                left[case] = place / len(content)
                content[place:] = bytes(len(content) - place)
        target.write_bytes(content)

        journal = Journal(hurt, max_bytes=64 * MB)
        got = contents(journal.pending(1_000))
        assert all(given[seq] == rows for seq, rows in got.items()), case
        assert journal.waiting == sum(map(len, got.values())), case
        missing = len(given) - len(got)
        if journal.recovery is None:
            assert missing == 0, case
        else:
            reported += 1
            assert journal.recovery.lost_batches == missing, case
            assert (journal.recovery.kept_batches, journal.recovery.kept_events) == (len(got), journal.waiting), case
            aside = journal.recovery.set_aside
            assert aside is not None
            assert aside.with_name(aside.name + end).read_bytes() == bytes(content), case
            assert aside.name in journal.recovery.sentence
        # It goes on as if nothing had been, under the same name and with new numbers.
        assert journal.writer == clean.writer
        assert journal.last_seq >= 120
        journal.append(journal.last_seq + 1, batch(3))
        journal.close()
        again = Journal(hurt, max_bytes=64 * MB)
        assert again.recovery is None, case
        assert len(again.pending(1_000)) == len(got) + 1
        again.close()
        kept[case] = len(got) / len(given)
    assert reported > 80
    assert kept[1::2].min() == 0.5  # a -wal takes nothing along but itself
    assert (kept[::2] > left[::2] - 0.1).all()  # what damage has not touched is read
    assert kept[6::10].tolist() == [1.0] * 10  # the first page can be had anew


@pytest.mark.parametrize("content", [b"", b"x", b"not a database\n" * 1_000, bytes(100_000)])
def test_a_file_that_is_no_database_is_set_aside(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    journal = Journal(path, max_bytes=MB)
    assert journal.recovery is not None
    assert journal.recovery.set_aside is not None
    assert journal.recovery.set_aside.read_bytes() == content
    assert journal.recovery.lost_batches is None  # nothing tells
    journal.append(1, batch())
    journal.close()


def test_another_programs_database_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE trades (id)")
    other.commit()
    other.close()
    content = path.read_bytes()
    with pytest.raises(JournalError, match="database of another program; name another file"):
        Journal(path, max_bytes=MB)
    assert path.read_bytes() == content


def test_an_empty_file_does_not_cost_its_wal(filled: Path, tmp_path: Path) -> None:
    path = copied(filled, tmp_path / "copy")
    path.write_bytes(b"")
    wal = path.with_name("journal.db-wal").read_bytes()
    journal = Journal(path, max_bytes=64 * MB)
    assert journal.recovery is not None
    assert "it is empty" in journal.recovery.sentence
    assert set(seqs(journal.pending(1_000))) >= set(range(65, 121))
    (aside,) = path.parent.glob("*.damaged-*-wal")
    assert aside.read_bytes() == wal
    journal.close()


@pytest.mark.parametrize("gone", [["", "-wal"], ["-wal"], [""], ["-mark"]])
def test_missing_files_are_noticed(filled: Path, tmp_path: Path, gone: list[str]) -> None:
    path = copied(filled, tmp_path / "copy")
    for end in gone:
        path.with_name(path.name + end).unlink()
    journal = Journal(path, max_bytes=64 * MB)
    got = seqs(journal.pending(1_000))
    if gone == ["-mark"]:
        assert (journal.recovery, got) == (None, list(FILLED))
    else:
        assert journal.recovery is not None
        assert journal.recovery.lost_batches == 120 - len(got) >= 50
    journal.close()


def test_damaged_bookkeeping_loses_no_batch(path: Path) -> None:
    journal = Journal(path, mode="wal", max_bytes=MB)
    for seq in (1, 2, 3, 4):
        journal.append(seq, batch(seed=seq), acknowledged=seq == 4)
    journal.acknowledge(1)
    writer = journal.writer
    journal.close()
    (path.parent / "journal.db-mark").write_bytes(b"garbage")
    with sqlite3.connect(path) as db:
        db.execute("UPDATE state SET floor = 3")
        db.execute("INSERT INTO done VALUES (2, 99)")
    db.close()
    journal = Journal(path, mode="wal", max_bytes=MB)
    assert journal.recovery is not None
    assert seqs(journal.pending()) == [1, 2, 3]  # a repeat does no harm
    assert journal.writer == writer  # every entry has it
    journal.close()


def test_a_batch_that_goes_bad_while_open_does_not_hide_the_next(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(path, max_bytes=MB)
    for seq in (1, 5, 6, 7):
        journal.append(seq, batch(seed=seq))
    journal._db.execute("UPDATE entries SET payload = substr(payload, 2) WHERE seq = 5")
    for _ in range(2):
        assert seqs(journal.pending()) == [1, 6, 7]
    assert journal.unreadable == 1
    assert "batch 5 is damaged" in caplog.text
    journal.close()


def test_what_append_returned_for_survives_a_kill(path: Path, nursery: Nursery) -> None:
    def events(seq: int) -> Rows:
        return plain(batch(1 + seq % 200, seed=seq % 1000))

    given: dict[int, Rows] = {}
    code = """seq = j.last_seq
    while True:
        seq += 1
        j.append(seq, batch(1 + seq % 200, seed=seq % 1000))
        say(seq)
    """.replace("\n    ", "\n")
    rng = clock.generator(3)
    for _ in range(20):
        said = nursery.run(path, code, kill_after_s=float(rng.uniform(0, 0.1)))
        given |= {seq: events(seq) for seq in said}
        journal = Journal(path, max_bytes=64 * MB)
        assert journal.recovery is None
        got = contents(journal.pending(10**6))
        unsaid = set(got) - set(given)
        assert unsaid <= {said[-1] + 1}  # its append had not returned
        assert got == given | {seq: events(seq) for seq in unsaid}
        middle = sorted(got)[len(got) // 2]
        journal.acknowledge(middle)
        given = {seq: rows for seq, rows in got.items() if seq > middle}
        journal.close()
    assert len(given) > 20


@pytest.mark.parametrize("where", ["file/journal.db", "folder"])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(JournalError, match=f"{where}.*name another with journal.path"):
        Journal(tmp_path / where, max_bytes=MB)


def test_a_full_disk_refuses_and_keeps_what_is_there(path: Path, nursery: Nursery) -> None:
    code = """import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    seq = 0
    with pytest.raises(JournalError, match="disk") as refused:
        while True:
            j.append(seq + 1, batch(400))
            seq += 1
    assert f'{seq * 400:,} events wait in it; check that its disk has room' in str(refused.value)
    with pytest.raises(JournalError, match="disk"):
        j.append(seq + 1, batch(400))
    assert seqs(j.pending(10**6)) == list(range(1, seq + 1))
    with pytest.raises(JournalError, match="disk"):
        j.acknowledge(3)
    assert (j.waiting, j.waiting_batches) == (seq * 400, seq)
    assert j.pending(1)[0].seq == 1
    say(seq)
    """.replace("\n    ", "\n")
    (accepted,) = nursery.run(path, code)
    assert accepted > 20
    journal = Journal(path, max_bytes=64 * MB)
    assert journal.recovery is None
    assert seqs(journal.pending(10**6)) == list(range(1, accepted + 1))
    journal.append(accepted + 1, batch(400))
    journal.close()


class Model(RuleBasedStateMachine):
    """The journal against a dict and a set."""

    mode: Literal["spool", "wal"] = "spool"

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.held: dict[int, tuple[int, int, int]] = {}  # number -> events, newest_ms, bytes
        self.waits: set[int] = set()
        self.last = 0
        self.open()

    def open(self) -> None:
        self.journal = Journal(Path(self.folder.name) / "j.db", mode=self.mode, max_bytes=12_000, window_ms=3_000)
        assert self.journal.recovery is None

    def teardown(self) -> None:
        self.journal.close()
        self.folder.cleanup()

    def prune(self, newest_ms: int) -> None:
        newest_ms = max(newest_ms, *[at_ms for _, at_ms, _ in self.held.values()], 0)
        if self.mode == "wal":
            self.held = {
                seq: value for seq, value in self.held.items() if seq in self.waits or value[1] >= newest_ms - 3_000
            }

    def sum(self, field: int, of: Iterable[int]) -> int:
        return sum(self.held[seq][field] for seq in of)

    @rule(gap=st.integers(1, 3), n=st.integers(1, 60), at_s=st.integers(0, 20), known=st.booleans())
    def append(self, gap: int, n: int, at_s: int, known: bool) -> None:
        self.last = seq = self.last + gap
        events = batch(n, seed=n, at_ms=at_s * 1_000)
        newest_ms, size = int(events.ts_ms.max()), len(pack(1, False, events, "w" * 16).payload) + ROW_BYTES
        if known and self.mode == "spool":
            size = 0
        if self.sum(2, self.held) + size > 12_000:
            self.prune(newest_ms)
        if self.sum(2, self.held) + size > 12_000:
            with pytest.raises(JournalError, match=f"is full: {self.sum(0, self.waits):,} events wait"):
                self.journal.append(seq, events, acknowledged=known)
            return
        self.journal.append(seq, events, acknowledged=known)
        if size:
            self.held[seq] = (n, newest_ms, size)
            self.waits |= set() if known else {seq}

    @rule(data=st.data(), alone=st.booleans())
    def acknowledge(self, data: st.DataObject, alone: bool) -> None:
        seq = data.draw(st.integers(0, self.last))
        self.journal.acknowledge(seq, alone=alone)
        taken = {found for found in self.waits if found == seq or (not alone and found < seq)}
        self.waits -= taken
        if self.mode == "spool":
            self.held = {found: value for found, value in self.held.items() if found not in taken}
        self.prune(0)

    @rule()
    def forget(self) -> None:
        assert self.journal.forget_acknowledgements() == self.sum(0, set(self.held) - self.waits)
        self.waits = set(self.held)

    @rule()
    def reopen(self) -> None:
        self.journal.close()
        self.open()
        assert self.journal.last_seq == self.last

    @invariant()
    def agrees(self) -> None:
        journal = self.journal
        assert seqs(journal.pending()) == sorted(self.waits)
        assert {entry.seq: len(entry.events) for entry in journal.replay()} == {
            seq: self.held[seq][0] for seq in sorted(self.held)
        }
        assert (journal.waiting, journal.waiting_batches) == (self.sum(0, self.waits), len(self.waits))
        assert journal.bytes == self.sum(2, self.held)


class WalModel(Model):
    mode = "wal"


TestSpoolModel = Model.TestCase
TestWalModel = WalModel.TestCase
TestSpoolModel.settings = TestWalModel.settings = hypothesis_settings(max_examples=40, stateful_step_count=40)
