"""The column of a data set that holds right answers, by their names or by their numbers."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence


class AnswerColumn:
    """Reads right answers: names or numbers, the same for all records of a data set.

    A label space may have numbers as names ("1" to "4"). What a single record means by 2 is not
    known then: `settle` looks at all of them.

    Args:
      eval_name: the eval's, for messages.
      key: the key of config.evals.NAME that says the column ("label").
      column: the name of the column.
      names: the names of a record's possible answers, in the order of their numbers; [] where they
        have none.
      size: how many possible answers a record has.
    """

    def __init__(
        self,
        eval_name: str,
        key: str,
        column: str,
        names: Callable[[Mapping], Sequence[str]],
        size: Callable[[Mapping], int],
    ):
        self._eval_name = eval_name
        self._key = key
        self._column = column
        self._names = names
        self._size = size
        self._holds_names: bool | None = None  # None: not settled

    def settle(self, evaluated: Sequence[Mapping], *splits: Sequence[Mapping]) -> None:
        """Finds out whether the column holds names or numbers.

        Args:
          evaluated: the records that are evaluated.
          splits: all records of the data set, read only as far as they are needed.

        Raises:
          ValueError: a value that is neither; names in some records and numbers in others; numbers
            that never are 0, and so may count from 1.
        """
        all_names = all(self._is_name(record) for record in evaluated)
        all_numbers = all(self._is_number(record) for record in evaluated)
        if not all_names and not all_numbers:
            self._refuse(evaluated)
        if all_names and all_numbers:
            all_names = self._are_names(itertools.chain(*splits))

        self._holds_names = all_names
        if not all_names:
            self._check_zero(evaluated, itertools.chain(*splits))

    def index(self, record: Mapping) -> int:
        """The number of a record's right answer, from 0.

        Raises:
          ValueError: no such column, or another value than the possible ones.
        """
        is_valid = self._is_name if self._holds_names else self._is_number
        if not is_valid(record):
            self._refuse([record])
        text = self._text(record)
        return list(self._names(record)).index(text) if self._holds_names else int(text)

    def _text(self, record: Mapping) -> str:
        """What the column holds, "" for a value that is neither a name nor a number."""
        if self._column not in record:
            raise ValueError(
                f"the eval {self._eval_name!r}: records have no column {self._column!r} "
                f"(config.evals.{self._eval_name}.{self._key}); they have {sorted(record)}"
            )
        value = record[self._column]
        return str(value) if isinstance(value, (str, int, float)) else ""

    def _is_name(self, record: Mapping) -> bool:
        return self._text(record) in self._names(record)

    def _is_number(self, record: Mapping) -> bool:
        # isdecimal() keeps out -1, which data sets write for unknown, and True.
        text = self._text(record)
        return text.isdecimal() and int(text) < self._size(record)

    def _are_names(self, records: Iterable[Mapping]) -> bool:
        """Whether values that are both names and numbers are names: the first record whose value is
        only one of the two says it. Without such a record they are names.
        """
        for record in records:
            is_name = self._is_name(record)
            if is_name != self._is_number(record):
                return is_name
        return True

    def _refuse(self, records: Sequence[Mapping]) -> None:
        """Raises ValueError for a value that is not what it is expected to be."""
        for record in records:
            is_expected = self._is_name(record) or self._is_number(record)
            if self._holds_names is not None or not is_expected:
                by_number = f"{list(range(self._size(record)))}, or {self._naming(record)}"
                valid = list(self._names(record)) or by_number
                raise ValueError(
                    f"the eval {self._eval_name!r}: a record's {self._key} is "
                    f"{record[self._column]!r:.60}; wanted one of {valid}"
                )

        # Each is a name or a number, but not all are the same.
        names = [self._text(record) for record in records if self._is_name(record)]
        numbers = [self._text(record) for record in records if not self._is_name(record)]
        raise ValueError(
            f"the eval {self._eval_name!r}: the column {self._column!r} holds the name "
            f"{names[0]!r} in a record and the number {numbers[0]} in another; wanted names in all "
            "of them, or numbers"
        )

    def _naming(self, record: Mapping) -> str:
        """What helps where choices without names don't count from 0."""
        ones = tuple(str(i + 1) for i in range(self._size(record)))
        return f"name the choices (config.evals.{self._eval_name}.answers = {ones})"

    def _check_zero(self, evaluated: Sequence[Mapping], others: Iterable[Mapping]) -> None:
        """Raises ValueError for numbers that never are 0: they may count from 1, and each would
        stand for its neighbour.
        """
        seen = set()
        for records in (evaluated, others):
            for record in records:
                text = self._text(record)
                if text.isdecimal():
                    seen.add(int(text))
                    if int(text) == 0:
                        return

        names = list(self._names(evaluated[0]))
        advice = self._naming(evaluated[0])
        if names:
            advice = f"write the names, {names}, as the column has them"
        raise ValueError(
            f"the eval {self._eval_name!r}: the column {self._column!r} holds the numbers "
            f"{sorted(seen)} and never 0. Numbers count from 0, up to "
            f"{self._size(evaluated[0]) - 1}; if these count from 1, or no record has 0, {advice}"
        )
