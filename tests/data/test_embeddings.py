"""Layouts of embeddings, references to them, and what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from hf_ecif.data.embeddings import (
    _open_pair,
    is_embeddings,
    is_reference,
    load_embeddings,
    place_references,
    read_vectors,
    tell,
)
from hf_ecif.data.images import fingerprint_rows, image_hashes, thumbnail
from hf_ecif.data.parquet import write_shards
from hf_ecif.data.schema import check_columns, find_columns
from hf_ecif.errors import UserError
from tests.support.embeddings import (
    vectors,
    write_captions,
    write_clip_retrieval,
    write_datacomp,
)

SHARDS = [vectors(5, seed=0), vectors(3, seed=1)]
IMAGES, TEXTS = (np.concatenate(side) for side in zip(*SHARDS, strict=True))


def is_all(source: Path, key: str | None = None, captions: str = "caption {}") -> bool:
    """Whether all rows are there, in order, with their embeddings and captions."""
    rows = load_embeddings(str(source), key)
    images, texts = read_vectors(rows["embedding"][:])
    np.testing.assert_allclose(images, IMAGES, rtol=1e-3)
    np.testing.assert_allclose(texts, TEXTS, rtol=1e-3)
    caption = find_columns(rows)[1]
    assert rows[caption][:] == [captions.format(row) for row in range(len(rows))]
    return is_embeddings(source)


class TestLayouts:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_datacomp(self, tmp_path: Path, save: object) -> None:
        folder = write_datacomp(tmp_path / "shards", SHARDS, save)
        assert is_all(folder)
        assert load_embeddings(str(folder))["uid"][:] == [f"u{row}" for row in range(8)]

    def test_one_of_two_models(self, tmp_path: Path) -> None:
        images, texts = vectors(5, 4, seed=9)
        more = {"b32_img": images, "b32_txt": texts}
        folder = write_datacomp(tmp_path, SHARDS[:1], more=more)
        with pytest.raises(
            UserError, match=r"several embeddings\. Give `embeddings_key`, .* b32, l"
        ):
            load_embeddings(str(folder))
        with pytest.raises(UserError, match=r"no embeddings 'h14'.* one of: b32, l14"):
            load_embeddings(str(folder), "h14")
        rows = load_embeddings(str(folder), "b32")
        np.testing.assert_array_equal(read_vectors(rows["embedding"][:])[1], texts)

    def test_clip_retrieval(self, tmp_path: Path) -> None:
        assert is_all(write_clip_retrieval(tmp_path / "laion", SHARDS))

    def test_ten_shards_are_in_the_order_of_their_numbers(self, tmp_path: Path) -> None:
        shards = [vectors(1, seed=number) for number in range(12)]
        rows = load_embeddings(str(write_clip_retrieval(tmp_path, shards)))
        images, _ = read_vectors(rows["embedding"][:])
        np.testing.assert_array_equal(images, np.concatenate([image for image, _ in shards]))
        assert rows["caption"][:] == [f"caption {row}" for row in range(12)]

    @pytest.mark.parametrize(
        ("names", "key"),
        [
            (("image", "text"), None),
            (("image_embeddings", "text_embeddings"), None),
            (("img", "txt"), None),
            (("vit-img", "vit-txt"), "vit"),
            (("images", "captions"), None),
        ],
    )
    def test_a_single_file_and_no_captions(
        self, tmp_path: Path, names: tuple[str, str], key: str | None
    ) -> None:
        arrays = dict(zip(names, (IMAGES, TEXTS), strict=True))
        np.savez(tmp_path / "pairs.npz", **arrays)
        assert is_all(tmp_path / "pairs.npz", key, captions="row {}")

    def test_two_files_and_a_table(self, tmp_path: Path) -> None:
        np.save(tmp_path / "image.npy", IMAGES)
        np.save(tmp_path / "text.npy", TEXTS)
        write_captions(tmp_path / "known.parquet", 8)
        assert is_all(tmp_path)

    def test_one_of_two_files(self, tmp_path: Path) -> None:
        """Its partner is found beside it."""
        np.save(tmp_path / "img_emb.npy", IMAGES)
        np.save(tmp_path / "text_emb.npy", TEXTS)
        assert is_all(tmp_path / "img_emb.npy", captions="row {}")

    def test_half_precision(self, tmp_path: Path) -> None:
        shards = [(image.astype("float16"), text.astype("float16")) for image, text in SHARDS]
        assert is_all(write_clip_retrieval(tmp_path, shards))

    def test_what_is_not_compressed_is_not_read_ahead(self, tmp_path: Path) -> None:
        """Only the pages of the rows that are asked for: here, of a file with a hole of 8 GB."""
        rows, width = 2**21, 1024
        for side in ("image", "text"):
            array = np.lib.format.open_memmap(
                tmp_path / f"{side}.npy", "w+", np.float32, (rows, width)
            )
            array[7] = 1
            del array
        assert (tmp_path / "image.npy").stat().st_blocks < 2**14
        reference = f"{tmp_path / 'image.npy'}#{7}"
        before = _resident()
        images, _ = read_vectors([reference])
        assert images.sum() == width
        assert _resident() - before < 2**26

    def test_an_archive_is_mapped_where_it_lies(self, tmp_path: Path) -> None:
        folder = write_datacomp(tmp_path, SHARDS[:1])
        for array in _open_pair(str(folder / "000.npz"), "l14_img"):
            assert isinstance(array, np.memmap)


class TestRefused:
    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no such file or folder\. Give an \.npz"):
            load_embeddings(str(tmp_path / "no"))
        with pytest.raises(UserError, match="there are no arrays of images and texts"):
            load_embeddings(str(tmp_path))
        np.savez(tmp_path / "a.npz", weights=IMAGES)
        with pytest.raises(UserError, match=r"a\.npz has no arrays of images and texts"):
            load_embeddings(str(tmp_path))

    def test_lengths_that_differ(self, tmp_path: Path) -> None:
        write_datacomp(tmp_path, [(IMAGES, TEXTS[:5])])
        with pytest.raises(UserError, match="8 embeddings of images, but there are 5 of texts"):
            load_embeddings(str(tmp_path))
        write_datacomp(tmp_path, [(IMAGES, TEXTS)])
        write_captions(tmp_path / "000.parquet", 7)
        with pytest.raises(UserError, match=r"8 embeddings, but 000\.parquet has 7 rows"):
            load_embeddings(str(tmp_path))

    def test_widths_that_differ(self, tmp_path: Path) -> None:
        write_datacomp(tmp_path, [(IMAGES, TEXTS[:, :4])])
        with pytest.raises(UserError, match="of width 8, and of texts of width 4"):
            load_embeddings(str(tmp_path))
        write_datacomp(tmp_path, [SHARDS[0], vectors(3, 4)])
        with pytest.raises(UserError, match="of width 4, and the files before it of 8"):
            load_embeddings(str(tmp_path))

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            (np.array([[None]]), "no array of numbers"),
            (np.arange(8), "must be an array of floats .* int64 and shape"),
            (np.ones((2, 2, 2)), "must be an array of floats"),
        ],
    )
    def test_arrays_of_something_else(self, tmp_path: Path, array: object, words: str) -> None:
        np.savez(tmp_path / "a.npz", image=array, text=array)
        with pytest.raises(UserError, match=words):
            load_embeddings(str(tmp_path / "a.npz"))

    def test_tables_of_other_columns(self, tmp_path: Path) -> None:
        write_datacomp(tmp_path, SHARDS)
        write_captions(tmp_path / "001.parquet", 3, "title")
        with pytest.raises(UserError, match=r"001\.parquet has other columns .*: text, title"):
            load_embeddings(str(tmp_path))

    def test_files_that_are_gone(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="moved or deleted"):
            read_vectors([f"{tmp_path}/0.npz#img/3"])
        np.savez(tmp_path / "0.npz", img=IMAGES, txt=TEXTS)
        with pytest.raises(UserError, match="has 8 rows now, and not row 8"):
            read_vectors([f"{tmp_path}/0.npz#img/8"])


class TestReferences:
    @pytest.mark.parametrize(
        ("cell", "known"),
        [
            ("a/0.npz#l14_img/17", True),
            ("img_emb_0.npy#0", True),
            ("a/0.png", False),
            ("0.npz#img/x", False),
            (None, False),
            ({"bytes": None, "path": "0.npy#1"}, False),
        ],
    )
    def test_form(self, cell: object, known: bool) -> None:
        assert is_reference(cell) == known

    def test_shown_in_place_of_a_picture(self) -> None:
        assert tell("/home/me/0.npz#l14_img/17") == "row 17 of 0.npz"
        assert thumbnail("/home/me/0.npz#l14_img/17") == (None, "no picture: row 17 of 0.npz")

    def test_results_do_not_tell_the_folders_of_this_machine(self, tmp_path: Path) -> None:
        source = write_clip_retrieval(tmp_path / "private", SHARDS)
        rows = check_columns(load_embeddings(str(source)), "embedding", "caption")
        write_shards(rows, tmp_path / "out")
        read = load_dataset("parquet", data_dir=str(tmp_path / "out"), split="train")
        assert read["embedding"][:2] == ["img_emb_0.npy#0", "img_emb_0.npy#1"]
        assert read["caption"][:] == rows["caption"][:]
        assert place_references(read, str(source))["embedding"][:] == rows["embedding"][:]

    def test_equal_contents_have_equal_hashes(self, tmp_path: Path) -> None:
        one = load_embeddings(str(write_datacomp(tmp_path / "a", SHARDS)))
        other = load_embeddings(str(write_datacomp(tmp_path / "b", SHARDS)))
        assert fingerprint_rows(one) == fingerprint_rows(other)
        assert len(image_hashes(one, "embedding") & image_hashes(other, "embedding")) == 8
        third = load_embeddings(str(write_datacomp(tmp_path / "c", [vectors(8, seed=5)])))
        assert fingerprint_rows(one) != fingerprint_rows(third)
        assert not image_hashes(one, "embedding") & image_hashes(third, "embedding")


def _resident() -> int:
    """Bytes of this process in memory that are its own."""
    with open(f"/proc/{os.getpid()}/status") as status:
        (line,) = (line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
