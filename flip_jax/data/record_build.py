"""Writing many records at once: pictures decoded in threads, unusable ones rejected and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, TypeVar

from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import Record

Draft = TypeVar("Draft")  # what a record is made from


class Rejected(Exception):
    """A row that cannot become a record; args: reason, "file: detail"."""


class Finished(NamedTuple):
    split: str
    record: Record
    encoded_again: bool  # its picture


@dataclass
class BuildReport:
    """What became of the rows."""

    written: Counter[str] = field(default_factory=Counter)  # records by split
    encoded_again: int = 0
    rejected: dict[str, list[str]] = field(default_factory=dict)  # reason -> "file: detail"

    @property
    def rejections(self) -> int:
        return sum(len(names) for names in self.rejected.values())

    def check(self, max_bad_fraction: float) -> None:
        """Refuses too many rejections.

        Raises:
          ValueError: more than `max_bad_fraction` of the rows were rejected, or all of them.
        """
        rows = self.written.total() + self.rejections
        if self.rejections > max_bad_fraction * rows or self.rejections == rows > 0:
            raise ValueError(
                f"{self.rejections} of {rows} rows were rejected, allowed share "
                f"{max_bad_fraction}; nothing was written. Mend the table or raise "
                f"--max-bad-fraction.\n{self}"
            )

    def __str__(self) -> str:
        splits = ", ".join(f"{count} {split}" for split, count in sorted(self.written.items()))
        lines = [
            f"{self.written.total()} records ({splits}), {self.encoded_again} pictures encoded "
            f"again, {self.rejections} rows rejected"
        ]
        for reason, names in sorted(self.rejected.items()):
            lines.append(f"  {reason}: {len(names)}")
            lines += [f"    {name}" for name in names[:10]]
            if len(names) > 10:
                lines.append(f"    and {len(names) - 10} more")
        return "\n".join(lines)


def check_numbers(*, captions: int, max_bad_fraction: float, threads: int) -> None:
    """Refuses what would stop a build, or let everything pass, once it is running.

    Raises:
      ValueError: a number out of range.
    """
    for name, value, least in (("captions", captions, 0), ("threads", threads, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction={max_bad_fraction}: must be from 0 to 1")


def write_records(
    writer: RecordWriter,
    report: BuildReport,
    drafts: Iterator[Draft],
    finish: Callable[[Draft], Finished],
    threads: int,
) -> None:
    """Finishes drafts in threads and writes them in their order.

    Args:
      writer: takes the records.
      report: counts them; takes the rejected ones.
      drafts: a few per thread are held at a time.
      finish: makes the record; raises `Rejected` where that is impossible.
      threads: finish so many at a time; does not change the result.
    """

    def attempt(draft: Draft) -> Finished | Rejected:
        try:
            return finish(draft)
        except Rejected as rejected:
            return rejected

    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(drafts, 64 * threads)):
            for done in pool.map(attempt, chunk):
                if isinstance(done, Rejected):
                    reason, detail = done.args
                    report.rejected.setdefault(reason, []).append(detail)
                    continue
                writer.write(done.split, done.record)
                report.written[done.split] += 1
                report.encoded_again += done.encoded_again
