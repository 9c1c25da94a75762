import functools
import hashlib
import io
import json
import threading
import warnings
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from metadist.commands import data as commands
from metadist.errors import DataError
from metadist.tasks.class_pool import PoolRow, read_pool
from metadist.tasks.importers import file_tree as file_tree_module
from metadist.tasks.importers import omniglot as omniglot_module
from metadist.tasks.importers.file_tree import FileTree
from metadist.tasks.importers.folder import SplitFile, SplitFractions, SplitLists, import_folder, shuffled
from metadist.tasks.importers.omniglot import Archive, Release, import_omniglot
from metadist.tasks.inspect import inspect_pool

# --- A small Omniglot ---------------------------------------------------------------------------

PARTS = {
    "images_background": [("Greek", 3), ("Latin_(old)", 3)],
    "images_evaluation": [("Ionic", 4)],
}
CHARACTERS = sorted(
    f"{alphabet}/character0{number + 1}"
    for alphabets in PARTS.values()
    for alphabet, characters in alphabets
    for number in range(characters)
)
SIZES = {"train": 6, "val": 1, "test": 3}


def drawing(part, alphabet, character, drawer):
    """105 x 105 pixels of 1 bit, white but for a black square whose place tells drawings apart."""
    pixels = np.full((105, 105), True)
    x, y = 7 * character, 20 * drawer + 5 * len(alphabet) + (part == "images_evaluation")
    pixels[y : y + 10, x : x + 10] = False
    return pixels


def omniglot_files(part):
    files = {}
    for alphabet, characters in PARTS[part]:
        for character in range(1, characters + 1):
            for drawer in (1, 2):
                file = io.BytesIO()
                Image.fromarray(drawing(part, alphabet, character, drawer)).save(file, "PNG")
                files[f"{part}/{alphabet}/character{character:02}/0{character}_{drawer:02}.png"] = file.getvalue()
    return files


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tree(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def release(url="http://localhost/{name}.zip", **changes):
    """The small data set's digests, by the words that define them."""
    archives = []
    for part in PARTS:
        lines = [f"{name}\0{hashlib.sha256(content).hexdigest()}\n" for name, content in omniglot_files(part).items()]
        content = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
        archives.append(Archive(name=part, url=url.format(name=part), md5="0" * 32, content_sha256=content))
    return Release(**{"archives": tuple(archives), "finn": SIZES, "vinyals": SIZES} | changes)


def as_zips(root):
    for part in PARTS:
        write_zip(root / f"{part}.zip", omniglot_files(part))


def as_directories(root):
    for part in PARTS:
        write_tree(root, omniglot_files(part))


def as_nested_zips(root):
    as_zips(root / "omniglot" / "python")


def as_doubled_directories(root):
    for part in PARTS:
        write_tree(root / "python" / part, omniglot_files(part))


def as_zips_with_a_mac_among_their_makers(root):
    for part in PARTS:
        files = {f"{part}/": b"", f"__MACOSX/{part}/._x.png": b"mac", f"{part}/.DS_Store": b"mac", "readme.txt": b"hi"}
        write_zip(root / f"{part}.zip", files | {f"./{name}": data for name, data in omniglot_files(part).items()})


def as_one_zip_and_one_directory(root):
    write_zip(root / "images_background.zip", dict(reversed(omniglot_files("images_background").items())))
    write_tree(root, omniglot_files("images_evaluation"))


@pytest.fixture
def omniglot(tmp_path):
    as_zips(tmp_path / "omniglot")
    return tmp_path / "omniglot"


@pytest.mark.parametrize(
    "lay_out",
    [
        as_zips,
        as_directories,
        as_nested_zips,
        as_doubled_directories,
        as_zips_with_a_mac_among_their_makers,
        as_one_zip_and_one_directory,
    ],
)
def test_omniglot_is_the_same_pool_however_it_is_packed(tmp_path, omniglot, lay_out):
    lay_out(tmp_path / "source")
    import_omniglot(tmp_path / "expected.parquet", source=omniglot, release=release())
    import_omniglot(tmp_path / "pool.parquet", source=tmp_path / "source", release=release())
    assert (tmp_path / "pool.parquet").read_bytes() == (tmp_path / "expected.parquet").read_bytes()


def test_omniglot_has_one_class_a_character_and_ink_is_255_on_0(tmp_path, omniglot):
    import_omniglot(tmp_path / "pool.parquet", source=omniglot, size=105, release=release())
    pool = read_pool(str(tmp_path / "pool.parquet"))
    assert pool.classes == CHARACTERS
    assert pool.superclasses == [name.split("/")[0] for name in CHARACTERS]
    assert pool.sizes().tolist() == [2] * 10
    assert pq.read_table(tmp_path / "pool.parquet")["class"].to_pylist()[::2] == CHARACTERS
    # unscaled, a drawing is its own negative; the examples of a class are those of drawers 1 and 2
    start = pool.starts[CHARACTERS.index("Latin_(old)/character02")]
    for drawer in (1, 2):
        expected = np.where(drawing("images_background", "Latin_(old)", 2, drawer), 0, 255)
        np.testing.assert_array_equal(pool.examples[start + drawer - 1, 0], expected)


def test_omniglot_is_scaled_as_grey_unless_the_nearest_pixel_is_asked_for(tmp_path, omniglot):
    values = {}
    for resample in ("lanczos", "nearest"):
        import_omniglot(tmp_path / "pool.parquet", source=omniglot, size=28, resample=resample, release=release())
        pool = read_pool(str(tmp_path / "pool.parquet"))
        assert pool.examples.shape == (20, 1, 28, 28)
        values[resample] = pool.examples
    # a 10 x 10 square is 100 / 105**2 of the picture, and scaling keeps shares
    np.testing.assert_allclose(values["lanczos"].mean(axis=(1, 2, 3)), 255 * 100 / 105**2, rtol=0.05)
    assert set(np.unique(values["nearest"])) == {0, 255}
    assert len(np.unique(values["lanczos"])) > 10
    corner = Image.fromarray(drawing("images_background", "Greek", 1, 1)).convert("L").resize((28, 28), 1)
    np.testing.assert_array_equal(values["lanczos"][0, 0], 255 - np.asarray(corner))


def test_omniglot_summary_counts_classes_with_their_rotations(tmp_path, omniglot):
    summary = import_omniglot(tmp_path / "pool.parquet", source=omniglot, release=release())
    assert summary.pool == str(tmp_path / "pool.parquet")
    assert (summary.examples, summary.shape) == (20, (1, 28, 28))
    assert summary.classes == SIZES
    assert summary.classes_with_rotations == {"train": 24, "val": 4, "test": 12}
    assert summary.sources == [str(omniglot / f"{part}.zip") for part in PARTS]


def splits_of(path):
    pool = read_pool(str(path))
    return dict(zip(pool.classes, pool.splits, strict=True))


def test_finn_split_is_the_seeded_order_of_characters(tmp_path, omniglot):
    found = []
    for seed in (1, 2):
        import_omniglot(tmp_path / "pool.parquet", source=omniglot, seed=seed, release=release())
        order = shuffled(CHARACTERS, seed)
        expected = dict.fromkeys(order[:6], "train") | {order[6]: "val"} | dict.fromkeys(order[7:], "test")
        found.append(splits_of(tmp_path / "pool.parquet"))
        assert found[-1] == expected
    assert found[0] != found[1]


def test_an_alphabet_that_is_held_out_lies_in_test_whole_and_nothing_else_moves(tmp_path, omniglot):
    for number, hold_out in enumerate(([], ["Latin_(old)"])):
        import_omniglot(tmp_path / f"{number}.parquet", source=omniglot, hold_out=hold_out, release=release())
    before, after = splits_of(tmp_path / "0.parquet"), splits_of(tmp_path / "1.parquet")
    held_out = {name for name in before if name.startswith("Latin_(old)/")}
    assert any(before[name] != "test" for name in held_out)
    assert after == before | dict.fromkeys(held_out, "test")


def test_an_alphabet_that_is_none_is_refused_with_the_nearest_one(tmp_path, omniglot):
    with pytest.raises(DataError, match=r"got 'latin'\. Did you mean 'Latin_"):
        import_omniglot(tmp_path / "pool.parquet", source=omniglot, hold_out=["latin"], release=release())


def test_shuffling_depends_on_names_and_seed_alone_and_never_changes():
    # pinned: words of Philox4x64-10 with key 1, which NumPy promises not to change
    assert "".join(shuffled("abcdefghij", 1)) == "dfcjhaigbe"
    assert "".join(shuffled("jihgfedcba", 1)) == "dfcjhaigbe"
    assert "".join(shuffled("abcdefghij", 2)) == "beagdfchij"


VINYALS = {"train": CHARACTERS[:6], "val": CHARACTERS[9:], "test": CHARACTERS[6:9]}


@pytest.mark.parametrize("name", ["vinyals_split_{}.txt", "{}.txt"])
@pytest.mark.parametrize("rotations", [[""], ["/rot000", "/rot090", "/rot180", "/rot270"]], ids=["plain", "rotated"])
def test_vinyals_split_comes_from_lists_with_or_without_rotations(tmp_path, omniglot, name, rotations):
    for split, characters in VINYALS.items():
        lines = [character + rotation for character in characters for rotation in rotations]
        (omniglot / name.format(split)).write_text("\r\n".join(lines) + "\n\n")
    import_omniglot(tmp_path / "pool.parquet", source=omniglot, split="vinyals", release=release())
    expected = {character: split for split, characters in VINYALS.items() for character in characters}
    assert splits_of(tmp_path / "pool.parquet") == expected


@pytest.mark.parametrize(
    ("lists", "fault"),
    [
        (VINYALS | {"val": None}, r"needs the list vinyals_split_val\.txt or val\.txt there"),
        (VINYALS | {"train": CHARACTERS[:5]}, r"train\.txt: must list the 6 train characters .*, got 5\. Get the list"),
        (VINYALS | {"val": ["Klingon/character01"]}, r"got 1; 'Klingon/character01' are no characters\."),
        (VINYALS | {"val": [CHARACTERS[0]]}, r"got 1; 'Greek/character01' are in another list too\."),
        (VINYALS | {"val": ["\ud800"]}, r"val\.txt: not a readable list"),
    ],
)
def test_bad_vinyals_lists_are_refused(tmp_path, omniglot, lists, fault):
    for split, characters in lists.items():
        if characters is not None:
            text = "\n".join(characters).encode("utf-8", "surrogatepass")
            (omniglot / f"vinyals_split_{split}.txt").write_bytes(text)
    with pytest.raises(DataError, match=fault):
        import_omniglot(tmp_path / "pool.parquet", source=omniglot, split="vinyals", release=release())
    assert not (tmp_path / "pool.parquet").exists()


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "directory"])
def test_omniglot_with_other_content_is_refused(tmp_path, packed):
    source = tmp_path / "source"
    expected = release().archives[1].content_sha256
    (as_zips if packed else as_directories)(source)
    files = omniglot_files("images_evaluation")
    files["images_evaluation/Ionic/character04/04_02.png"] += b"\0"
    part = source / ("images_evaluation.zip" if packed else "images_evaluation")
    write_zip(part, files) if packed else write_tree(source, files)
    with pytest.raises(DataError) as caught:
        import_omniglot(tmp_path / "pool.parquet", source=source, release=release())
    message = str(caught.value)
    assert message.startswith(f"{part}: the images must have the content digest {expected}, got ")
    assert "(8 PNG files). Get images_evaluation.zip again from http://localhost/images_evaluation.zip" in message
    assert "--download" in message


def test_omniglot_with_a_missing_image_is_refused(tmp_path, omniglot):
    files = omniglot_files("images_background")
    files.popitem()
    write_zip(omniglot / "images_background.zip", files)
    with pytest.raises(DataError, match=r"images_background\.zip: .* \(11 PNG files\)"):
        import_omniglot(tmp_path / "pool.parquet", source=omniglot, release=release())


def test_the_official_archive_is_known_by_its_md5(tmp_path, omniglot):
    archives = []
    for archive in release().archives:
        md5 = hashlib.md5((omniglot / f"{archive.name}.zip").read_bytes()).hexdigest()
        archives.append(Archive(name=archive.name, url=archive.url, md5=md5, content_sha256="0" * 64))
    official = release(archives=tuple(archives))
    assert import_omniglot(tmp_path / "pool.parquet", source=omniglot, release=official).examples == 20


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda source: None, r"source: no such directory\. Correct --source, or import with --download"),
        (lambda source: source.mkdir(), r"holds neither images_background\.zip nor the directory images_background"),
        (
            lambda source: as_zips(source) or (source / "images_evaluation.zip").unlink(),
            "neither images_evaluation.zip",
        ),
        (lambda source: as_zips(source) or (source / "images_evaluation.zip").write_bytes(b"PK"), "not a readable zip"),
    ],
    ids=["no directory", "empty directory", "one part", "no zip"],
)
def test_an_omniglot_that_is_not_there_is_asked_for(tmp_path, make, fault):
    make(tmp_path / "source")
    with pytest.raises(DataError, match=fault):
        import_omniglot(tmp_path / "pool.parquet", source=tmp_path / "source", release=release())


def test_omniglot_needs_just_one_of_source_and_cache(tmp_path, omniglot):
    for places in ({}, {"source": omniglot, "cache": tmp_path}):
        with pytest.raises(DataError, match="either a source directory or a cache"):
            import_omniglot(tmp_path / "pool.parquet", release=release(), **places)


@pytest.fixture
def web(tmp_path):
    """A directory, the address that serves it, and the requests that came."""
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "web"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield tmp_path / "web", f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


def test_omniglot_is_downloaded_once_and_then_taken_from_the_cache(tmp_path, web):
    directory, url, requests = web
    as_zips(directory)
    for split, characters in VINYALS.items():
        (directory / f"{split}.txt").write_text("\n".join(characters))
    served = release(f"{url}/{{name}}.zip", vinyals_url=url + "/{split}.txt")
    archives = tuple(
        Archive(
            name=archive.name,
            url=archive.url,
            md5=hashlib.md5((directory / f"{archive.name}.zip").read_bytes()).hexdigest(),
            content_sha256=archive.content_sha256,
        )
        for archive in served.archives
    )
    served = release(archives=archives, vinyals_url=url + "/{split}.txt")
    for _ in range(2):
        import_omniglot(tmp_path / "pool.parquet", cache=tmp_path / "cache", split="vinyals", release=served)
        assert splits_of(tmp_path / "pool.parquet")["Latin_(old)/character03"] == "val"
        assert len(requests) == 5


# --- Zip archives -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png", "C:\\x.png", "..\\x.png", "\\x.png"])
def test_a_member_that_leads_out_of_its_archive_is_refused(tmp_path, name):
    write_zip(tmp_path / "a.zip", {"a/x.png": b"", name: b""})
    with pytest.raises(DataError, match=r"a\.zip: member .* leads outside of the archive"):
        FileTree(tmp_path / "a.zip")


def test_a_large_file_is_refused_in_an_archive_and_in_a_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(file_tree_module, "MAX_MEMBER_BYTES", 10)
    files = {"a/small.png": bytes(10), "a/large.png": bytes(11)}
    write_zip(tmp_path / "a.zip", files)
    with pytest.raises(DataError, match=r"member 'a/large\.png' has 11 bytes, more than 10"):
        FileTree(tmp_path / "a.zip")
    tree = FileTree(write_tree(tmp_path / "tree", files))
    assert tree.read("a/small.png") == bytes(10)
    with pytest.raises(DataError, match=r"large\.png: has 11 bytes, more than 10"):
        tree.read("a/large.png")


def test_an_archive_with_two_members_of_one_name_is_refused(tmp_path):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("a/x.png", b"1")
        archive.writestr("a/x.png", b"2")
    with pytest.raises(DataError, match=r"holds 'a/x\.png' more than once"):
        FileTree(tmp_path / "a.zip")


def test_directories_and_what_systems_hide_are_no_files_of_an_archive(tmp_path):
    names = ["a/", "a/x.png", "./b/y.png", "__MACOSX/a/x.png", "a/.DS_Store", ".git/z.png"]
    assert FileTree(write_zip(tmp_path / "a.zip", dict.fromkeys(names, b""))).names == ["./b/y.png", "a/x.png"]


def test_the_content_digest_is_that_of_its_definition(tmp_path):
    tree = FileTree(write_tree(tmp_path / "tree", {"1.png": b"one", "2.png": b"two"}))
    lines = [f"{name}\0{hashlib.sha256(content).hexdigest()}\n" for name, content in (("p/a", b"two"), ("p/b", b"one"))]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert tree.content_digest({"p/b": "1.png", "p/a": "2.png"}) == expected


def test_a_damaged_member_is_named(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a/x.png": b"some bytes"})
    path.write_bytes(path.read_bytes().replace(b"some bytes", b"same bytes"))
    with FileTree(path) as tree, pytest.raises(DataError, match=r"a\.zip: a/x\.png: cannot be read \(Bad CRC-32"):
        tree.read("a/x.png")


def test_a_directory_that_links_to_its_parent_is_listed_once(tmp_path):
    write_tree(tmp_path / "root", {"a/x.png": b"", "b/y.png": b"", ".hidden/z.png": b""})
    (tmp_path / "root" / "a" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "c").symlink_to(tmp_path / "root" / "b")
    assert FileTree(tmp_path / "root").names == ["a/x.png", "b/y.png", "c/y.png"]


# --- Anybody's images ---------------------------------------------------------------------------


def picture(value, mode="RGB", size=(8, 8), file_format="PNG", **options):
    file = io.BytesIO()
    Image.new("L", size, value).convert(mode).save(file, file_format, **options)
    return file.getvalue()


CLASSES = ["ant", "bee", "cat", "dog", "eel"]
FLAT = {f"{name}/{number}.png": picture(10 * row + number) for row, name in enumerate(CLASSES) for number in range(2)}


@pytest.mark.parametrize(
    "layout",
    [
        "{name}/{number}.png",
        "{name}/images/{number}.PNG",
        "tiny-imagenet-200/train/{name}/images/{name}_{number}.png",
        "{name}/{number}/deep/x.png",
    ],
)
@pytest.mark.parametrize("packed", [True, False], ids=["zip", "directory"])
def test_classes_are_the_directories_below_those_that_all_images_share(tmp_path, layout, packed):
    files = {}
    for row, name in enumerate(CLASSES):
        for number in range(2):
            files[layout.format(name=name, number=number)] = picture(10 * row + number)
    files |= {"notes.txt": b"", "__MACOSX/ant/._0.png": b"mac"}
    source = write_zip(tmp_path / "a.zip", files) if packed else write_tree(tmp_path / "a", files)
    summary = import_folder(tmp_path / "pool.parquet", source=source)
    pool = read_pool(summary.pool)
    assert pool.classes == CLASSES
    assert pool.examples[:, 0, 0, 0].tolist() == [0, 1, 10, 11, 20, 21, 30, 31, 40, 41]
    assert (summary.examples, summary.shape, summary.ignored_files) == (10, (3, 8, 8), 1)
    # 5 classes: round(0.16 * 5) = 1 val, round(0.2 * 5) = 1 test
    assert summary.classes == {"train": 3, "val": 1, "test": 1}


def test_a_prefix_names_the_directory_of_classes_where_there_are_several(tmp_path):
    files = {f"set/train/{name}": content for name, content in FLAT.items()} | {"set/val/1.png": picture(1)}
    source = write_zip(tmp_path / "a.zip", files)
    summary = import_folder(tmp_path / "pool.parquet", source=source, prefix="set/train/")
    assert read_pool(summary.pool).classes == CLASSES
    assert summary.ignored_files == 1


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"a/notes.txt": b""}, r"holds no image \(\.png, \.jpg"),
        (FLAT | {"x.png": picture(1)}, r"x\.png: the image lies in no class directory"),
        (
            {"ant/1.png": picture(1), "ant/2.png": picture(2)},
            "1.png: the image lies in no class directory below 'ant/'",
        ),
        ({f"{split}/{name}": b"" for split in ("train", "val") for name in FLAT}, "'train', 'val' look like splits"),
        (FLAT | {"bee/1.png": b"GIF89a"}, r"bee/1\.png: not a readable image"),
        (FLAT | {"bee/1.png": FLAT["bee/1.png"][:-30]}, r"bee/1\.png: not a readable image"),
        (
            FLAT | {"cat/1.png": picture(1, size=(9, 7))},
            r"cat/1\.png: the image has 9 x 7 pixels, while ant/0\.png has 8 x 8",
        ),
        (FLAT | {"cat/1.png": picture(1, "I;16")}, r"cat/1\.png: the image has 16 or 32 bits a channel"),
    ],
    ids=["no image", "outside", "one class", "splits", "broken", "truncated", "sizes", "16 bits"],
)
def test_a_bad_folder_is_refused_by_the_name_of_the_file(tmp_path, files, fault):
    source = write_tree(tmp_path / "source", files)
    with pytest.raises(DataError, match=fault) as caught:
        import_folder(tmp_path / "pool.parquet", source=source)
    assert str(caught.value).startswith(str(source))
    assert not (tmp_path / "pool.parquet").exists()


def test_a_folder_that_is_not_there_is_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"none: no such directory or zip archive\. Correct --source"):
        import_folder(tmp_path / "pool.parquet", source=tmp_path / "none")


def test_an_image_with_too_many_pixels_is_refused(tmp_path):
    source = write_tree(tmp_path / "source", FLAT | {"eel/1.png": picture(1, "1", (4097, 4096))})
    with pytest.raises(DataError, match=r"eel/1\.png: the image has 4097 x 4096 pixels"):
        import_folder(tmp_path / "pool.parquet", source=source, size=8)


def stored(path):
    """The bytes of each class's first image."""
    rows = pq.read_table(path).to_pylist()
    return {row["class"]: row["image"] for row in reversed(rows)}


def test_files_that_fit_are_kept_and_others_become_png(tmp_path):
    files = {
        "png/1.png": picture(1),
        "jpeg/1.jpeg": picture(2, file_format="JPEG"),
        "bmp/1.bmp": picture(3, file_format="BMP"),
        "grey/1.jpg": picture(4, "L", file_format="JPEG"),
        "palette/1.gif": picture(5, "P", file_format="GIF"),
        "small/1.png": picture(6, size=(4, 4)),
        "wide/1.webp": picture(7, size=(32, 8), file_format="WEBP", lossless=True),
    }
    import_folder(tmp_path / "pool.parquet", source=write_tree(tmp_path / "source", files), size=8, color="rgb")
    kept = stored(tmp_path / "pool.parquet")
    assert kept["png"] == files["png/1.png"]
    assert kept["jpeg"] == files["jpeg/1.jpeg"]
    for name, value in (("bmp", 3), ("grey", 4), ("palette", 5), ("small", 6), ("wide", 7)):
        with Image.open(io.BytesIO(kept[name])) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (8, 8))
            assert image.getextrema() == ((value, value),) * 3


@pytest.mark.parametrize(
    ("modes", "color", "channels"),
    [
        (("L", "1", "LA"), "auto", 1),
        (("L", "RGB", "L"), "auto", 3),
        (("L", "L", "L"), "rgb", 3),
        (("RGB", "RGBA", "L"), "grey", 1),
    ],
)
def test_a_pool_is_grey_where_all_images_are_or_where_it_is_told_to_be(tmp_path, modes, color, channels):
    files = {f"{name}/1.png": picture(255, mode) for name, mode in zip(("a", "b", "c"), modes, strict=True)}
    source = write_tree(tmp_path / "source", files)
    summary = import_folder(tmp_path / "pool.parquet", source=source, color=color)
    assert summary.shape == (channels, 8, 8)
    np.testing.assert_array_equal(read_pool(summary.pool).examples, np.full((3, channels, 8, 8), 255))


def test_a_photograph_is_turned_upright(tmp_path):
    # EXIF orientation 6: the first row of the file is the right-hand side of the picture
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((8, 16), np.uint8)
    pixels[0] = 255
    turned = io.BytesIO()
    Image.fromarray(pixels).save(turned, "JPEG", quality=100, exif=exif)
    files = {f"{name}/1.jpg": turned.getvalue() for name in ("a", "b")} | {"c/1.png": picture(0, "L", (8, 16))}
    summary = import_folder(tmp_path / "pool.parquet", source=write_tree(tmp_path / "source", files))
    assert summary.shape == (1, 16, 8)
    upright = read_pool(summary.pool).examples[0, 0]
    assert upright[:, -1].min() > 200
    assert upright[:, :-1].max() < 50


@pytest.mark.parametrize(
    ("fractions", "sizes"),
    [
        ((0.64, 0.16, 0.2), (64, 16, 20)),
        ((0.5, 0.25, 0.25), (50, 25, 25)),
        ((0.994, 0.003, 0.003), (98, 1, 1)),
        ((0.8, 0.2, 0), (80, 20, 0)),
        ((1, 0, 0), (100, 0, 0)),
    ],
)
def test_fractions_divide_classes_and_no_wanted_split_is_empty(fractions, sizes):
    classes = [f"c{number:02}" for number in range(100)]
    split = SplitFractions(train=fractions[0], val=fractions[1], test=fractions[2], seed=5)
    assigned = split.assign(classes)
    assert sorted(assigned) == classes
    found = [entry.split for entry in assigned.values()]
    assert tuple(found.count(name) for name in ("train", "val", "test")) == sizes
    assert split.assign(classes[::-1]) == assigned
    if sizes[0] < 100:
        assert (
            SplitFractions(train=fractions[0], val=fractions[1], test=fractions[2], seed=6).assign(classes) != assigned
        )


@pytest.mark.parametrize(
    ("fractions", "fault"),
    [
        ((0.6, 0.2, 0.3), r"a sum of 1, got 0\.6,0\.2,0\.3\. Try"),
        ((1.2, -0.2, 0.0), "must be >= 0"),
        ((0.0, 0.5, 0.5), "train > 0"),
        ((float("nan"), 0.5, 0.5), "must be >= 0"),
        ((0.1, 0.45, 0.45), "leave no training class of the 2 found"),
    ],
)
def test_impossible_fractions_are_refused(fractions, fault):
    with pytest.raises(DataError, match=fault):
        SplitFractions(train=fractions[0], val=fractions[1], test=fractions[2]).assign(["a", "b"])


@pytest.mark.parametrize(
    "text",
    [
        "class,split,superclass\nant,train,x\nbee,val,\ncat,test,y\n",
        '\ufeffclass,wnid,split,superclass\r\nant,"n, 1",train,x\r\nbee,,val,\r\ncat,,test,y\r\n',
        "words,wnid,split,superclass\n,ant,train,x\n,bee,val,\n,cat,test,y\n",
        "name,n,split,superclass\nant,1,train,x\nant,2,train,x\nbee,3,val,\n\ncat,4,test,y\n",
    ],
    ids=["class", "class with a byte order mark", "wnid", "first column, a row an example"],
)
def test_a_csv_file_gives_each_class_its_split_and_superclass(tmp_path, text):
    (tmp_path / "classes.csv").write_bytes(text.encode())
    assigned = SplitFile(path=tmp_path / "classes.csv").assign(["ant", "bee", "cat"])
    assert assigned == {"ant": ("train", "x"), "bee": ("val", None), "cat": ("test", "y")}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "needs the column 'split', found none"),
        ("class;split\nant;train\n", "needs the column 'split', found 'class;split'"),
        ("class,split\nant,train\nbee,training\n", "line 3: .* got 'bee' and 'training'"),
        ("class,split\nant\n", "line 2: .* got 'ant' and ''"),
        ("class,split\n,train\n", "line 2: .* got '' and 'train'"),
        ("class,split\nant,train\nbee,val\nant,test\n", "line 4: class 'ant' is given test, and train before"),
        ("class,split\nant,train\nbee,val\nemu,val\n", r"1 listed classes have no images \('emu'\)"),
        ("class,split\nant,train\n", r"1 classes with images are not listed \('bee'\)\. .* --only-listed"),
        ("class,split\n", "lists no class"),
        ('class,split\nant,"train\n', "not valid CSV"),
        ("class,split\nant,tr\udcffain\n", "not readable text"),
        (None, "not readable text"),
    ],
)
def test_a_bad_csv_file_is_refused_by_line(tmp_path, text, fault):
    if text is not None:
        (tmp_path / "classes.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=fault) as caught:
        SplitFile(path=tmp_path / "classes.csv").assign(["ant", "bee"])
    assert str(caught.value).startswith(str(tmp_path / "classes.csv"))


def test_long_lists_of_missing_classes_are_cut_short(tmp_path):
    (tmp_path / "classes.csv").write_text("class,split\n" + "".join(f"x{number},val\n" for number in range(9)))
    with pytest.raises(DataError, match=r"9 listed classes have no images \('x0', 'x1', 'x2' and 6 more\)"):
        SplitFile(path=tmp_path / "classes.csv").assign(["ant"])


def test_lists_give_each_class_its_split(tmp_path):
    (tmp_path / "a.txt").write_text("ant\n\n bee \n")
    (tmp_path / "b.txt").write_text("cat\n")
    paths = {"train": tmp_path / "a.txt", "test": tmp_path / "b.txt"}
    expected = {"ant": ("train", None), "bee": ("train", None), "cat": ("test", None)}
    assert SplitLists(paths=paths).assign(["ant", "bee", "cat"]) == expected
    with pytest.raises(DataError, match=r"not listed \('dog'\)"):
        SplitLists(paths=paths).assign(["ant", "bee", "cat", "dog"])
    assert SplitLists(paths=paths, only_listed=True).assign(["ant", "bee", "cat", "dog"]) == expected
    with pytest.raises(DataError, match=r"b\.txt: class 'cat' is listed for test and for val"):
        SplitLists(paths={"val": tmp_path / "b.txt", "test": tmp_path / "b.txt"}).assign(["cat"])
    with pytest.raises(DataError, match="is given for the split 'dev'"):
        SplitLists(paths={"dev": tmp_path / "b.txt"}).assign(["cat"])


def test_unlisted_classes_are_left_out_only_where_that_is_asked_for(tmp_path):
    (tmp_path / "classes.csv").write_text("class,split,superclass\nant,train,insects\neel,val,fish\n")
    source = write_tree(tmp_path / "source", FLAT)
    split = SplitFile(path=tmp_path / "classes.csv", only_listed=True)
    summary = import_folder(tmp_path / "pool.parquet", source=source, split=split)
    pool = read_pool(summary.pool)
    assert (pool.classes, pool.splits, pool.superclasses) == (["ant", "eel"], ["train", "val"], ["insects", "fish"])
    assert (summary.left_out_classes, summary.classes) == (3, {"train": 1, "val": 1, "test": 0})


# --- The commands -------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(commands.data, list(map(str, arguments)))


@pytest.fixture
def small_release(monkeypatch):
    monkeypatch.setattr(commands, "import_omniglot", functools.partial(import_omniglot, release=release()))


def test_the_omniglot_command_prints_one_json_object(tmp_path, omniglot, small_release):
    out = tmp_path / "pool.parquet"
    result = run("import", "omniglot", "--source", omniglot, "--out", out, "--size", 14, "--seed", 3, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["pool"], summary["shape"], summary["classes"]) == (str(out), [1, 14, 14], SIZES)
    order = shuffled(CHARACTERS, 3)
    assert [splits_of(out)[name] for name in order] == ["train"] * 6 + ["val"] + ["test"] * 3


def test_the_omniglot_command_writes_below_data_and_prints_a_table(omniglot, small_release, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = run("import", "omniglot", "--source", omniglot)
    assert result.exit_code == 0, result.output
    assert "data/omniglot.parquet: 20 images, 1 x 28 x 28" in result.stdout
    assert "rotate_classes" in result.stdout
    assert len(read_pool("data/omniglot.parquet").classes) == 10


def test_the_omniglot_command_downloads_to_its_cache(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(commands, "import_omniglot", lambda out, **options: calls.append(options) or 1 / 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    run("import", "omniglot", "--download")
    run("import", "omniglot", "--download", "--cache", tmp_path / "mine", "--resample", "nearest", "--split", "vinyals")
    assert [call["cache"] for call in calls] == [tmp_path / "home" / "metadist" / "omniglot", tmp_path / "mine"]
    assert [call["source"] for call in calls] == [None, None]
    assert [call["resample"] for call in calls] == ["lanczos", "nearest"]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["omniglot"], "Give either --source DIR, where the Omniglot archives lie, or --download"),
        (["omniglot", "--source", "d", "--download"], "Give either --source DIR"),
        (["omniglot", "--source", "d", "--cache", "c"], "Give --download, or leave --cache out"),
        (["omniglot", "--source", "d", "--split", "vinyals", "--seed", "1"], "--seed changes nothing"),
        (["omniglot", "--source", "d", "--size", "0"], "--size"),
        (["folder"], "Missing option '--source'"),
        (["folder", "--source", "d", "--split-file", "f", "--split-list", "l"], "Give only one of"),
        (["folder", "--source", "d", "--split-fractions", "1,0,0", "--split-file", "f"], "Give only one of"),
        (["folder", "--source", "d", "--split-fractions", "0.5"], "three numbers with commas between them, got '0.5'"),
        (["folder", "--source", "d", "--split-fractions", "a,b,c"], "three numbers with commas"),
        (["folder", "--source", "d", "--split-file", "f", "--seed", "1"], "--seed changes nothing"),
        (["folder", "--source", "d", "--only-listed"], "--only-listed needs --split-file or --split-list"),
        (["folder", "--source", "d", "--split-list", "a", "--split-list", "b"], "--split-list must be one directory"),
        (["folder", "--source", "d", "--split-list", "val=a", "--split-list", "val=b"], "once each, got 'val=b'"),
    ],
)
def test_impossible_options_are_usage_errors_that_say_what_to_do(arguments, fault):
    result = run("import", *arguments)
    assert result.exit_code == 2
    assert fault in " ".join(result.output.split())


@pytest.mark.parametrize("way", ["fractions", "file", "list", "directory"])
def test_the_folder_command_splits_as_it_is_told(tmp_path, way):
    source = write_tree(tmp_path / "source", FLAT)
    names = {"train": ["ant", "cat", "eel"], "val": ["bee"], "test": ["dog"]}
    rows = "".join(f"{name},{split}\n" for split, members in names.items() for name in members)
    (tmp_path / "classes.csv").write_text("class,split\n" + rows)
    for split, members in names.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(members))
    options = {
        "fractions": ["--split-fractions", "0.6,0.2,0.2", "--seed", 4],
        "file": ["--split-file", tmp_path / "classes.csv"],
        "list": [part for split in names for part in ("--split-list", f"{split}={tmp_path / split}.txt")],
        "directory": ["--split-list", tmp_path],
    }[way]
    out = tmp_path / "pool.parquet"
    result = run(
        "import", "folder", "--source", source, "--out", out, "--size", 4, "--color", "grey", "--json", *options
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["shape"] == [1, 4, 4]
    if way == "fractions":
        order = shuffled(CLASSES, 4)
        names = {"train": order[:3], "val": order[3:4], "test": order[4:]}
    assert splits_of(out) == {name: split for split, members in names.items() for name in members}


def test_the_folder_command_tells_what_it_left_out(tmp_path):
    source = write_tree(tmp_path / "source", FLAT | {"ant/notes.txt": b""})
    (tmp_path / "classes.csv").write_text("class,split\nant,train\n")
    options = ["--split-file", tmp_path / "classes.csv", "--only-listed", "--out", tmp_path / "pool.parquet"]
    result = run("import", "folder", "--source", source, *options)
    assert "1 other files ignored" in result.stdout
    assert "4 classes left out" in result.stdout


def test_the_folder_command_takes_a_prefix_and_only_what_lists_name(tmp_path):
    files = {f"train/{name}": content for name, content in FLAT.items()} | {"val/emu/1.png": picture(1)}
    (tmp_path / "mine.txt").write_text("dog\ncat\n")
    options = ["--prefix", "train", "--split-list", f"val={tmp_path / 'mine.txt'}", "--only-listed"]
    out = tmp_path / "pool.parquet"
    result = run("import", "folder", "--source", write_tree(tmp_path / "source", files), "--out", out, *options)
    assert result.exit_code == 0, result.exception
    assert splits_of(out) == {"cat": "val", "dog": "val"}


def test_the_commands_raise_our_errors_for_the_command_line_to_print(tmp_path):
    result = run("import", "folder", "--source", tmp_path / "none")
    assert isinstance(result.exception, DataError)


def test_every_option_says_what_it_does():
    for command in [*commands.import_group.commands.values(), commands.inspect_command]:
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or parameter.help, f"{command.name} {parameter.name}"


# --- The real Omniglot --------------------------------------------------------------------------

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "omniglot"


real_data = pytest.mark.skipif(
    not (REAL / "images_background.zip").is_file(), reason=f"needs the Omniglot archives in {REAL}"
)


@real_data
@pytest.mark.long
def test_the_real_omniglot_has_1623_characters_of_20_drawings(tmp_path):
    # importing verifies the content digests of both archives
    sizes = {"train": 1100, "val": 100, "test": 423}
    summary = import_omniglot(tmp_path / "pool.parquet", source=REAL)
    assert (summary.examples, summary.shape, summary.classes) == (32460, (1, 28, 28), sizes)
    found = inspect_pool(summary.pool)
    assert (found["classes"], found["examples"]) == (1623, 32460)
    for name, size in sizes.items():
        part = found["splits"][name]
        assert (part["classes"], part["examples"], part["max_shots_plus_queries"]) == (size, 20 * size, 20)
        assert part["max_ways_with_rotations"] == 4 * size == summary.classes_with_rotations[name]


@real_data
def test_the_real_vinyals_lists_name_every_character_once(tmp_path, monkeypatch):
    def one_vector_a_character(drawings, splits, *_):
        return (PoolRow(name, None, splits[name], features=[1.0]) for name in drawings)

    monkeypatch.setattr(omniglot_module, "_rows", one_vector_a_character)
    summary = import_omniglot(tmp_path / "pool.parquet", source=REAL, split="vinyals")
    pool = read_pool(summary.pool)
    assert [pool.splits.count(split) for split in ("train", "val", "test")] == [1028, 172, 423]
    # the validation alphabets that the list of Snell et al. (2017) opens with
    for alphabet in ("Hebrew", "Mkhedruli_(Georgian)", "Armenian", "Early_Aramaic"):
        assert {split for name, split in splits_of(summary.pool).items() if name.startswith(alphabet)} == {"val"}
