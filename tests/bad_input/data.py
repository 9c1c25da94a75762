"""Wrong class pools, and pools that do not fit their config."""

from tests.bad_input.builders import (
    CONV,
    FEW_SHOT,
    Prepare,
    command,
    images,
    png,
    pool,
    pool_file,
    setting,
    vectors,
)

NAN, INF = float("nan"), float("inf")

WRONG_DATA: dict[str, tuple[Prepare, str]] = {
    "conv4 on vectors": (
        pool(config=CONV),
        "model.name: conv4 needs images ... have the shape [3] ... Use model.name: mlp.",
    ),
    "image too small for four poolings": (
        pool(images(8, 8), config=CONV),
        "model.downsample: max_pool halves images of [8, 8] to nothing in block 4 of 4 ... Use larger images",
    ),
    "more ways than training classes": (
        pool(None, "task.ways=4"),
        "pool.parquet: task.ways = 4 is more than the 3 classes of split 'train' ... Lower task.ways",
    ),
    "more ways than test classes": (
        pool(None, "task.ways=3", then=()),
        "pool.parquet: task.ways = 3 is more than the 2 classes of split 'test'. Lower task.ways, or move classes",
    ),
    "shots and queries above a class": (
        pool(None, "task.shots=3"),
        "pool.parquet: class 'a' (train) has 3 examples ... 3 + 1 = 4 ... Lower them",
    ),
    "pool that is not there": (
        setting("task.pool=nope.parquet", config=FEW_SHOT),
        "nope.parquet: no such class pool ... metadist data import",
    ),
    "pool that is a directory": (
        setting("task.pool=.", config=FEW_SHOT),
        ".: not a readable Parquet file ... Import or copy it again.",
    ),
    "pool at an address of no kind": (
        setting("task.pool=foo://a/b", config=FEW_SHOT),
        "foo://a/b: not a place that can be opened ... Use a local path, s3://",
    ),
    "pool without its classes": (
        pool(without=("class",)),
        "pool.parquet: a class pool needs the column 'class', found 'split', 'features' ... Add it",
    ),
    "pool without its splits": (
        pool(without=("split",)),
        "pool.parquet: a class pool needs the column 'split' ... Add it",
    ),
    "pool without inputs": (
        pool(without=("features",)),
        "pool.parquet: a class pool needs one of the columns 'image' ... 'features' ... Name the one",
    ),
    "truncated pool": (
        pool_file(lambda content: content[: len(content) // 2]),
        "pool.parquet: not a readable Parquet file ... Import or copy it again.",
    ),
    "pool of another format": (
        pool_file(lambda content: b"class,split\n"),
        "pool.parquet: not a readable Parquet file ... Import or copy it again.",
    ),
    "pool file without content": (
        pool_file(lambda content: b""),
        "pool.parquet: not a readable Parquet file ... Import or copy it again.",
    ),
    "NaN in features": (
        pool(vectors(spoil={4: [0.0, NAN, 0.0]})),
        "pool.parquet: class 'b', row 4 of the file: features hold NaN or infinity ... Impute or remove",
    ),
    "infinity in features": (
        pool(vectors(spoil={4: [0.0, INF, 0.0]})),
        "class 'b', row 4 of the file: features hold NaN or infinity ... Impute or remove",
    ),
    "vectors of two lengths": (
        pool(vectors(spoil={7: [0.0, 1.0]})),
        "pool.parquet: class 'c', row 7 of the file: the vector has 2 numbers, the first one has 3 ... pad or remove",
    ),
    "images of two sizes": (
        pool(images(16, 16, {4: png(16, 12)}), config=CONV),
        "class 'b', row 4 of the file: the image is 12 x 16 ... 16 x 16 ... --size",
    ),
    "image that is none": (
        pool(images(16, 16, {5: b"GIF"}), config=CONV),
        "class 'b', row 5 of the file: not a readable image ... Replace or remove it.",
    ),
    "class in two splits": (
        pool([*vectors(), {"class": "a", "split": "test", "features": [0.0, 0.0, 0.0]}]),
        "pool.parquet: class 'a' lies in more than one split (test, train) ... give each class one split",
    ),
    "split of another name": (
        pool([*vectors(), {"class": "z", "split": "dev", "features": [0.0, 0.0, 0.0]}]),
        "pool.parquet: column 'split' must hold train, val or test, got 'dev' ... Rename it.",
    ),
    "rotated vectors": (
        pool(None, "task.rotate_classes=true"),
        "pool.parquet: task.rotate_classes needs square images, got vectors ... Set it to false.",
    ),
    "rotated images that are no squares": (
        pool(images(16, 20), "task.rotate_classes=true", config=CONV),
        "task.rotate_classes needs square images, got 20 x 16 pixels ... Set it to false.",
    ),
    "pool to look at that is not there": (
        command("data", "inspect", "nope.parquet"),
        "nope.parquet: no such class pool ... metadist data import",
    ),
}
