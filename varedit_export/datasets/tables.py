"""Read tables in Parquet or Arrow files, as the hub has data sets, a picture at a time."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from varedit_export.datasets.rows import LARGEST, Kind, row_errors
from varedit_export.errors import DatasetError
from varedit_runtime.errors import needs_extra, readable_size, shown

LARGEST_GROUP = 2**31  # bytes of a group of rows, which is read as a whole

_ROWS, _ROW = 16, 256  # that are read at a time; bytes of one beside its texts
_NESTED = 64  # bytes of a list, even an empty one: a few bytes of a file may say millions


class Table:
    """A file of rows. Columns of pictures are read when one of them is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: dict[str, tuple[int, Any]] = {}  # by column, the group of rows read last

    @cached_property
    def _file(self) -> Any:
        """The file, as groups of rows: those of Parquet, or the batches of an Arrow stream."""
        with needs_extra("evaluate"):
            import pyarrow as pa
            from pyarrow import parquet
        if self.path.suffix == ".parquet":
            return parquet.ParquetFile(self.path)
        with pa.memory_map(str(self.path)) as source:
            try:
                return pa.ipc.open_stream(source).read_all().combine_chunks()
            except pa.ArrowInvalid:
                return pa.ipc.open_file(source).read_all().combine_chunks()

    def rows(self, kind: type[Kind], nested: bool = False) -> list[Kind]:
        """Return all rows without their pictures: structs whose fields are columns.

        nested: whether columns may hold lists and structs. Raises DatasetError if a column is
        missing or of another type.
        """
        assert issubclass(kind, msgspec.Struct)
        names = [field.encode_name for field in msgspec.structs.fields(kind)]
        with row_errors(str(self.path)):
            if missing := set(names) - set(self.names):
                raise DatasetError(f"there is no column {', '.join(sorted(missing))}")
            found = self._read_rows(names, nested)
        return [self._row(place, row, kind) for place, row in enumerate(found)]

    def _read_rows(self, names: Sequence[str], nested: bool) -> list[dict[str, Any]]:
        """Return the rows of plain columns: what is repeated is short in a file, and long here."""
        for field in self._file.schema_arrow if self._parquet else self._file.schema:
            if field.name in names and _is_nested(field.type) and not nested:
                raise DatasetError(f"the column {field.name} holds no plain values")
        if nested and self._parquet:
            self._check_lists(names)
        size, found = 0, list[dict[str, Any]]()
        for piece in self._pieces(names):
            piece.validate(full=True)
            for row in piece.to_pylist():
                size += _size(row)
                found.append(row)
            _check(size)
        return found

    def _check_lists(self, names: Sequence[str]) -> None:
        """Raise DatasetError if columns of lists have too many values: one row may have all."""
        metadata, count = self._file.metadata, 0
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if f"{column.path_in_schema}.".startswith(tuple(f"{name}." for name in names)):
                    count += column.num_values
        _check(count * _NESTED)

    def _pieces(self, names: Sequence[str]) -> Any:
        """Return columns, some rows at a time."""
        if self._parquet:
            return self._file.iter_batches(_ROWS, columns=names)
        return self._file.select(names).to_batches(_ROWS)

    def _row(self, place: int, row: Any, kind: type[Kind]) -> Kind:
        with row_errors(self.name(place)):
            return msgspec.convert(row, kind)

    def name(self, place: int) -> str:
        """Return what a row is called in errors."""
        return f"{self.path.name}, row {place}"

    @property
    def names(self) -> Sequence[str]:
        """The names of all columns. Raises DatasetError."""
        with row_errors(str(self.path)):
            return self._file.schema_arrow.names if self._parquet else self._file.column_names

    def picture(self, column: str, place: int) -> Callable[[], bytes]:
        """Return what reads a row's picture. It raises DatasetError if there is none."""

        def read() -> bytes:
            found = self._cell(column, place)
            content = found.get("bytes") if isinstance(found, dict) else found
            if not isinstance(content, bytes):
                raise DatasetError(f"{column} has no picture")
            return content

        return read

    def empty(self, column: str, place: int) -> bool:
        """Return whether a row has no picture in a column. Raises DatasetError."""
        with row_errors(self.name(place)):
            found = self._cell(column, place)
            return (found.get("bytes") if isinstance(found, dict) else found) is None

    @property
    def _parquet(self) -> bool:
        return self.path.suffix == ".parquet"

    def _place(self, place: int) -> tuple[int, int]:
        """Return the group of rows that has a row, and its place there."""
        if not self._parquet:
            return 0, place
        metadata = self._file.metadata
        for group in range(metadata.num_row_groups):
            if place < (count := metadata.row_group(group).num_rows):
                return group, place
            place -= count
        raise DatasetError("the file has fewer rows than it says")

    def _cell(self, column: str, place: int) -> Any:
        if column not in self.names:
            raise DatasetError(f"there is no column {shown(column)}")
        group, offset = self._place(place)
        return self._column(group, column)[offset].as_py()

    def _column(self, group: int, column: str) -> Any:
        """Return a column of a group of rows."""
        kept = self._kept.get(column)
        if kept is None or kept[0] != group:
            self._kept.pop(column, None)  # before the next one takes memory
            read = self._read(group, column)
            read.validate(full=True)
            kept = self._kept[column] = (group, read)
        return kept[1]

    def _read(self, group: int, column: str) -> Any:
        if not self._parquet:
            return self._file[column]
        import pyarrow as pa

        size = self._file.metadata.row_group(group).total_byte_size
        if size > LARGEST_GROUP:
            raise DatasetError(f"a group of rows has {readable_size(size)}: write smaller ones")
        pieces, size = list[Any](), 0
        for piece in self._file.iter_batches(_ROWS, row_groups=[group], columns=[column]):
            pieces.append(piece.column(0))
            size += piece.nbytes  # a picture in many rows is stored once
            if size > LARGEST_GROUP:
                told = f"a group of rows has over {readable_size(LARGEST_GROUP)}"
                raise DatasetError(f"{told} in memory: write smaller ones")
        return pa.chunked_array(pieces)


def _is_nested(kind: Any) -> bool:
    """Return whether values of an Arrow type hold others, also those of a dictionary."""
    inner = (getattr(kind, name, None) for name in ("value_type", "storage_type"))
    return kind.num_fields > 0 or any(_is_nested(one) for one in inner if one is not None)


def _check(size: int) -> None:
    if size > LARGEST:
        raise DatasetError(f"its texts and lists have over {readable_size(LARGEST)}")


def _size(value: Any) -> int:
    """Return about how many bytes a value of a row takes."""
    if isinstance(value, dict):
        return _ROW + sum(map(_size, value.values()))
    if isinstance(value, list):
        return _NESTED + sum(map(_size, value))
    return len(value) if isinstance(value, str) else 8


def tables(folder: Path, patterns: Sequence[str]) -> list[Table]:
    """Return the tables of the first pattern that matches files of a folder, or of its `data`.

    Raises DatasetError if none does.
    """
    for pattern in patterns:
        for inside in (folder, folder / "data"):
            if found := sorted(path for path in inside.glob(pattern) if path.is_file()):
                return [Table(path) for path in found]
    raise DatasetError(f"{folder} has no {' or '.join(patterns)}, nor has its folder data")
