"""From rows to plays: which rows are good, and what is said of the others."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topk_grpc.cli.mapping import Mapping, PlayColumns, to_plays
from topk_grpc.cli.sources import open_source
from topk_grpc.cli.tabular import Problem, read
from topk_grpc.errors import InputError

NOW_MS = 1_800_000_000_000
T = "2014-06-16 18:28:34"
T_MS = 1_402_943_314_000

Plays = list[tuple[str, int, int, str]]


def unpack(columns: PlayColumns) -> Plays:
    def text(data: bytes, offsets: list[int], place: int) -> str:
        return data[offsets[place] : offsets[place + 1]].decode()

    data, offsets = bytes(columns.song_data), columns.song_offsets.tolist()
    out: Plays = []
    for place in range(len(columns)):
        chart = ""
        if columns.chart_data is not None and columns.chart_offsets is not None:
            chart = text(bytes(columns.chart_data), columns.chart_offsets.tolist(), place)
        count = 1 if columns.counts is None else int(columns.counts[place])
        out.append((text(data, offsets, place), int(columns.played_at_ms[place]), count, chart))
    return out


def plays_of(
    tmp_path: Path, content: str | bytes, mapping: Mapping, name: str = "a.csv"
) -> tuple[Plays, list[Problem]]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    plays: Plays = []
    problems: list[Problem] = []
    with open_source(str(path)) as source:
        for batch in read(source, mapping.names):
            columns, found = to_plays(batch, mapping, NOW_MS)
            plays += unpack(columns)
            problems += found
            assert columns.plays == sum(count for _, _, count, _ in unpack(columns))
            for index in range(len(columns)):
                assert 0 <= columns.place(index) < batch.rows
    return plays, problems


def test_maps_songs_times_charts_and_counts(tmp_path: Path) -> None:
    text = f"a,b,t,c,n\nX,Y,{T},KGB,3\n by ,,{T},,1\n"
    plays, problems = plays_of(tmp_path, text, Mapping(("a", "b"), "t", "c", "n"))
    assert plays == [("X - Y", T_MS, 3, "KGB"), (" by  - ", T_MS, 1, "")]
    assert not problems


def test_one_column_may_serve_twice(tmp_path: Path) -> None:
    assert plays_of(tmp_path, f"a,t\nX,{T}\n", Mapping(("a", "a"), "t", "a"))[0] == [("X - X", T_MS, 1, "X")]


BAD = {
    "empty song": (f",{T},,1", "a", "the song is empty"),
    "song too long": (f"{'é' * 64}x,{T},,1", "a", "129 bytes"),
    "missing time": ("X,,,1", "t", "missing"),
    "malformed time": ("X,yesterday,,1", "t", "ISO 8601"),
    "time in 1970": ("X,86400,,1", "t", "1970"),
    "future": ("X,2060-01-01,,1", "t", "future"),
    "chart too long": (f"X,{T},{'c' * 65},1", "c", "64 is the most"),
    "count missing": (f"X,{T},,", "n", "missing"),
    "count zero": (f"X,{T},,0", "n", "1 to"),
    "count negative fraction": (f"X,{T},,-1.5", "n", "whole number"),
    "count negative zero": (f"X,{T},,-0", "n", "1 to"),
    "count two signs": (f"X,{T},,+-2", "n", "whole number"),
    "count too low": (f"X,{T},,{-(1 << 55) - 1}", "n", "below 0"),
    "count fraction": (f"X,{T},,1.5", "n", "whole number"),
    "count hexadecimal": (f"X,{T},,0x10", "n", "whole number"),
    "count too large": (f"X,{T},,{1 << 56}", "n", "1 to"),
    "count beyond 64 bits": (f"X,{T},,{1 << 80}", "n", "1 to"),
}
MAPPING = Mapping(("a",), "t", "c", "n")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_told_and_the_others_stay(tmp_path: Path, name: str) -> None:
    row, column, said = BAD[name]
    plays, (problem,) = plays_of(tmp_path, f"a,t,c,n\nbefore,{T},,1\n{row}\nafter,{T},C,2.0\n", MAPPING)
    assert plays == [("before", T_MS, 1, ""), ("after", T_MS, 2, "C")]
    assert (problem.row, problem.column) == (2, column)
    assert said in problem.message
    assert str(problem).startswith(f"row 2, column '{column}': ")


def test_what_is_no_utf8_is_a_bad_row(tmp_path: Path) -> None:
    lines = [b"a,t,c", b"Bj\xf6rk,%b,", b"x,%b,\xff", b"\xc3\xb6,%b,\xc3\xb6"]
    content = b"\n".join(line.replace(b"%b", T.encode()) for line in lines)
    plays, problems = plays_of(tmp_path, content, Mapping(("a",), "t", "c"))
    assert plays == [("ö", T_MS, 1, "ö")]
    assert [(problem.row, problem.column, problem.value) for problem in problems] == [
        (1, "a", "Bj\\xf6rk"),
        (2, "c", "\\xff"),
    ]
    assert "not UTF-8" in problems[0].message


def test_broken_lines_of_ndjson_are_bad_rows(tmp_path: Path) -> None:
    lines = f'{{"a": "X", "t": "{T}"}}\noops\n{{"a": 7, "t": {T_MS}}}\n{{"a": {{}}, "t": 1}}\n{{"t": {T_MS}}}\n'
    plays, problems = plays_of(tmp_path, lines, Mapping(("a",), "t"), "a.ndjson")
    assert plays == [("X", T_MS, 1, ""), ("7", T_MS, 1, "")]
    assert [(problem.row, problem.column) for problem in problems] == [(2, ""), (4, "a"), (5, "a")]


def test_a_mapping_checks_itself() -> None:
    with pytest.raises(InputError, match="--time-unit is 'minutes'"):
        Mapping(("a",), "t", time_unit="minutes")
    with pytest.raises(InputError, match="--song"):
        Mapping((), "t")


def test_the_producer_is_content_and_mapping() -> None:
    digest = "00" * 16
    mappings = [
        Mapping(("a",), "t"),
        Mapping(("a", "b"), "t"),
        Mapping(("a",), "b"),
        Mapping(("a",), "t", "c"),
        Mapping(("a",), "t", None, "c"),
        Mapping(("a",), "t", time_unit="s"),
    ]
    ids = [mapping.producer_id(digest) for mapping in mappings] + [mappings[0].producer_id("11" * 16)]
    assert len(set(ids)) == len(ids)
    # Written down: another id for the same file would count it again after an update.
    assert ids[0] == "ingest-b44e00f1f0d0b740128385fd36e58dbc"


NAME = st.text(string.ascii_letters + "é日 -'", max_size=6)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(NAME, NAME, st.sampled_from([T, "", "x"]), st.sampled_from(["1", "7", "", "0", "3.0", "-2"])),
        max_size=30,
    )
)
def test_good_rows_pass_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str, str]]
) -> None:
    lines = ["a,c,t,n", *(",".join(f'"{cell}"' for cell in row) for row in rows)]
    plays, problems = plays_of(tmp_path_factory.mktemp("m"), "\n".join(lines), MAPPING)
    good = [song != "" and when == T and count in {"1", "7", "3.0", "-2"} for song, _, when, count in rows]
    expected = [
        (song, T_MS, int(float(count)), chart) for (song, chart, _, count), fine in zip(rows, good, strict=True) if fine
    ]
    assert plays == expected
    assert [problem.row for problem in problems] == [row for row, fine in enumerate(good, start=1) if not fine]
