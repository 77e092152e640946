"""Files as they come: CSV, NDJSON and Parquet, whole and broken."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from topk_grpc.cli.sources import open_source
from topk_grpc.cli.tabular import BATCH_ROWS, Problem, read
from topk_grpc.errors import InputError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def rows_of(file: str, names: list[str], **options: Any) -> list[tuple[Any, ...]]:
    with open_source(file, options.pop("file_format", "auto")) as source:
        out: list[tuple[Any, ...]] = []
        for batch in read(source, names, **options):
            assert not batch.broken
            out += zip(*(batch.columns[name].to_pylist() for name in names), strict=True)
        return out


def error_of(file: str, names: list[str], **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        rows_of(file, names, **options)
    return str(caught.value)


ROWS = [(b"a", b"1"), (b"b", b"2")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.csv", b"song,t,other\na,1,x\nb,2,y\n"),
        ("no_newline_at_end.csv", b"song,t\na,1\nb,2"),
        ("crlf.csv", b"song,t\r\na,1\r\nb,2\r\n"),
        ("bom.csv", b"\xef\xbb\xbfsong,t\na,1\nb,2\n"),
        ("blank_lines.csv", b"\n\nsong,t\n\na,1\n\n\nb,2\n\n"),
        ("quoted.csv", b'"song","t"\n"a","1"\n"b","2"\n'),
        ("spaces_in_header.csv", b" song , t\na,1\nb,2\n"),
        ("tabs.tsv", b"song\tt\na\t1\nb\t2\n"),
        ("other_columns_twice.csv", b"x,song,x,t\n1,a,2,1\n1,b,2,2\n"),
        ("lines.ndjson", b'{"song": "a", "t": 1}\n\n{"t": "2", "song": "b", "more": [1]}\n'),
        ("lines.jsonl", b'\xef\xbb\xbf{"song": "a", "t": 1}\r\n{"t": 2, "song": "b"}'),
        ("no_suffix", b'{"song": "a", "t": 1}\n{"t": 2, "song": "b"}\n'),
        ("no_suffix_either", b"song,t\na,1\nb,2\n"),
    ],
)
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_reads_every_shape(tmp_path: Path, name: str, content: bytes, packed: str) -> None:
    if packed == ".gz":
        half = len(content) // 2
        content = gzip.compress(content[:half]) + gzip.compress(content[half:])  # as `cat a.gz b.gz` does
    elif packed == ".zst":
        content = pa.compress(content, "zstd", asbytes=True)
    assert rows_of(write(tmp_path / (name + packed), content), ["song", "t"]) == ROWS


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_reads_parquet(tmp_path: Path, packed: str) -> None:
    table = pa.table({"song": ["a", "b"], "t": pa.array([1, 2], pa.int64()), "other": [None, 1.5]})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    content = gzip.compress(buffer.getvalue()) if packed else buffer.getvalue()
    assert rows_of(write(tmp_path / ("plays.parquet" + packed), content), ["song", "t"]) == [("a", 1), ("b", 2)]
    assert rows_of(write(tmp_path / "named_otherwise.bin", content), ["song", "t"]) == [("a", 1), ("b", 2)]
    assert "no column 'sang': it has song, t, other. Did you mean 'song'?" in error_of(
        str(tmp_path / ("plays.parquet" + packed)), ["sang"]
    )


def test_delimiter_is_chosen_or_found_in_the_name(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "song;t\na;1\nb;2\n")
    assert rows_of(file, ["song", "t"], delimiter=";") == ROWS
    assert "say --delimiter" in error_of(file, ["song", "t"])
    assert rows_of(write(tmp_path / "b.csv", "song\tt\na\t1\nb\t2\n"), ["song", "t"], delimiter="\\t") == ROWS
    assert "--delimiter is ';;'" in error_of(file, ["song"], delimiter=";;")


def test_quoted_cells_hold_anything(tmp_path: Path) -> None:
    cells = ["a,b", "line\nbreak", 'say ""twice""', " spaces ", "Sigur Rós", "日本"]
    text = "song,t\n" + "".join(f'"{cell}",1\n' for cell in cells)
    found = rows_of(write(tmp_path / "a.csv", text), ["song", "t"])
    assert [song.decode() for song, _ in found] == [cell.replace('""', '"') for cell in cells]


def test_cells_that_are_no_utf8_are_kept_for_their_row(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "a.csv", b"song,t\nBj\xf6rk,1\nb,2\n"), ["song", "t"])[0][0] == b"Bj\xf6rk"
    lines = b'{"song": "Bj\xf6rk", "t": 1}\n{"song": "\\ud800", "t": 2}\n'
    songs = [song for song, _ in rows_of(write(tmp_path / "a.ndjson", lines), ["song", "t"])]
    assert songs == [b"Bj\xf6rk", "\ud800".encode("utf-8", "surrogatepass")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing_column.csv", b"title,time\na,1\n", ["no column 'song'", "title, time"]),
        ("twice.csv", b"song,t,song\na,1,b\n", ["2 columns 'song'"]),
        ("empty.csv", b"", ["empty"]),
        ("blank.csv", b"\n\n", ["empty"]),
        ("ragged.csv", b"song,t\na,1\nb,2,3\n", ["row 2", "3 cells", "header 2", "--skip-bad", "b,2,3"]),
        ("short.csv", b"song,t\na\n", ["row 1", "1 cells"]),
        ("open_quote.csv", b"song,t\n" + b'"a,1\n' + b"b,2\n" * 2_000_000, ["close every quote"]),
        ("long_row.csv", b"song,t\n" + b'"' + b"a" * 9_000_000 + b'",1\n', ["more than 4 MiB"]),
        ("array.json", b'[{"song": "a"}]', ["one JSON array", "jq"]),
        ("missing_key.ndjson", b'{"title": "a"}\n{"t": 1}\n', ["no column 'song'", "title, t"]),
        ("no_parquet.parquet", b"song,t\n", ["no Parquet file"]),
        ("broken.parquet", b"PAR1" + b"x" * 100, ["cannot be read as Parquet"]),
        ("cut.csv.gz", gzip.compress(b"song,t\n" + b"a,1\n" * 1000, mtime=0)[:-20], ["cannot be read"]),
        ("damaged.csv.gz", b"\x1f\x8b" + b"x" * 50, ["cannot be read"]),
    ],
)
def test_explains_what_cannot_be_read(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    message = error_of(write(tmp_path / name, content), ["song", "t"])
    assert name in message
    for part in expected:
        assert part in message


def test_explains_what_cannot_be_opened(tmp_path: Path) -> None:
    assert "No such file" in error_of(str(tmp_path / "none.csv"), ["song"])
    assert "directory" in error_of(str(tmp_path), ["song"])
    assert "--format is 'xml'" in error_of(write(tmp_path / "a.csv", "song\n"), ["song"], file_format="xml")


def test_a_file_without_rows_has_none(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "a.csv", "song,t\n"), ["song", "t"]) == []
    assert rows_of(write(tmp_path / "a.ndjson", ""), ["song", "t"]) == []


def test_ragged_rows_are_left_out_with_their_numbers(tmp_path: Path) -> None:
    lines = [f"s{row},{row}" if row % 1000 else f"s{row}" for row in range(1, 30_001)]
    file = write(tmp_path / "a.csv", "song,t\n" + "\n".join(lines) + "\n")
    problems: list[Problem] = []
    with open_source(file) as source:
        batches = list(read(source, ["song", "t"], on_ragged=problems.append))
    assert [problem.row for problem in problems] == list(range(1000, 30_001, 1000))
    assert [batch.rows for batch in batches] == [BATCH_ROWS] * 3 + [30_000 - 30 - 3 * BATCH_ROWS]
    for batch in batches:
        songs = batch.columns["song"].to_pylist()
        for place in (0, 1, 997, 998, 999, 1000, batch.rows - 1):
            assert songs[place] == f"s{batch.row_number(place)}".encode()


def test_broken_lines_keep_their_place(tmp_path: Path) -> None:
    lines = [
        '{"song": "a", "t": 1}',
        "{oops",
        "[1]",
        '{"song": ["x"], "t": 2}',
        '{"t": true, "song": "y"}',
        '{"song": null}',
    ]
    file = write(tmp_path / "a.ndjson", "\n\n".join(lines))
    with open_source(file) as source:
        (batch,) = read(source, ["song", "t"])
    assert batch.rows == 6
    assert batch.columns["song"].to_pylist() == [b"a", None, None, None, b"y", None]
    assert batch.columns["t"].to_pylist() == [b"1", None, None, b"2", None, None]
    assert [(place, problem.row, problem.column) for place, problem in batch.broken.items()] == [
        (1, 3, ""),
        (2, 5, ""),
        (3, 7, "song"),
        (4, 9, "t"),
    ]
    assert [batch.row_number(place) for place in range(6)] == [1, 3, 5, 7, 9, 11]  # lines, as an editor counts


@pytest.mark.parametrize("rows", [0, 1, BATCH_ROWS - 1, BATCH_ROWS, BATCH_ROWS + 1, 3 * BATCH_ROWS])
@pytest.mark.parametrize("kind", ["csv", "ndjson", "parquet"])
def test_batches_begin_at_multiples(tmp_path: Path, rows: int, kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        table = pa.table({"song": [f"s{row}" for row in range(rows)], "t": pa.array(range(rows), pa.int64())})
        parquet.write_table(table, file, row_group_size=5000)
    elif kind == "csv":
        write(file, "song,t\n" + "".join(f"s{row},{row}\n" for row in range(rows)))
    else:
        write(file, "".join(json.dumps({"song": f"s{row}", "t": row}) + "\n" for row in range(rows)))
    with open_source(str(file), hashed=True) as source:
        batches = list(read(source, ["song", "t"]))
        digest = source.digest()
    assert [batch.index for batch in batches] == list(range(len(batches)))
    assert [batch.rows for batch in batches[:-1]] == [BATCH_ROWS] * (len(batches) - 1)
    assert sum(batch.rows for batch in batches) == rows
    for batch in batches:
        first = batch.columns["song"][0].as_py()
        assert (first if isinstance(first, str) else first.decode()) == f"s{batch.index * BATCH_ROWS}"
        assert batch.row_number(0) == batch.index * BATCH_ROWS + 1
    with open_source(str(file), hashed=True) as source:
        assert source.digest() == digest  # whether rows were read or not


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    text = b"song,t\na,1\n"
    files = [
        write(tmp_path / "a.csv", text),
        write(tmp_path / "b.csv.gz", gzip.compress(text)),
        write(tmp_path / "c.csv.zst", pa.compress(text, "zstd", asbytes=True)),
    ]

    def digest(file: str) -> str:
        with open_source(file, hashed=True) as source:
            return source.digest()

    assert len({digest(file) for file in files}) == 1
    assert digest(files[0]) != digest(write(tmp_path / "d.csv", text + b"b,2\n"))


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "song,t\na,1\n")
    with open_source(file) as source:
        source.check_unchanged()
        with Path(file).open("a") as more:
            more.write("b,2\n")
        with pytest.raises(InputError, match="changed while it was read"):
            source.check_unchanged()


CELL = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(CELL, CELL, CELL), max_size=20), ends=st.sampled_from(["\n", "\r\n"]))
def test_what_a_csv_writer_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]], ends: str
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=ends, quoting=csv.QUOTE_ALL)
    writer.writerows([("song", "t", "x,y"), *rows])
    file = write(tmp_path_factory.mktemp("csv") / "a.csv", text.getvalue())
    found = rows_of(file, ["x,y", "song", "t"])
    assert [tuple(cell.decode() for cell in row) for row in found] == [(c, a, b) for a, b, c in rows]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["song", "t", "x"]), CELL | st.none() | st.integers()), max_size=20)
)
def test_what_json_writes_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    rows = [{"song": "first", "t": 1}, *rows]
    file = write(tmp_path_factory.mktemp("json") / "a.ndjson", "\n".join(json.dumps(row) for row in rows))

    def cell(value: Any) -> bytes | None:
        return None if value is None else str(value).encode()

    assert rows_of(file, ["song", "t"]) == [(cell(row.get("song")), cell(row.get("t"))) for row in rows]


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200))
@pytest.mark.parametrize("suffix", ["csv", "ndjson", "parquet", "csv.gz"])
def test_garbage_is_an_input_error_or_rows(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes
) -> None:
    head = {"csv": b"song,t\n", "ndjson": b'{"song":"a","t":1}\n', "parquet": b"PAR1", "csv.gz": b"\x1f\x8b\x08\x00"}
    file = write(tmp_path_factory.mktemp("garbage") / f"a.{suffix}", head[suffix] + content)
    try:
        with open_source(file, hashed=True) as source:
            for batch in read(source, ["song", "t"]):
                assert batch.rows
            source.digest()
    except InputError:
        pass
