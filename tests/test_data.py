import itertools
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from hiera.data import (
    BatchStream,
    ImageFolder,
    batches,
    derived_seed,
    find_classes,
    find_images,
    normalise,
    random_crop,
    read_image,
)
from tests.training import make_folder, picture


def names(paths, root):
    return [os.path.relpath(path, root) for path in paths]


def test_images_are_found_below_links_in_order_and_hidden_ones_are_not(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for name in ("b/2.JPG", "b/10.png", "a/x/y.Tiff", "z.webp", ".trash/1.png", "b/._2.jpg", "notes.txt", "b/noext"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    elsewhere.mkdir()
    (elsewhere / "linked.png").touch()
    (root / "link").symlink_to(elsewhere)
    (root / "a" / "loop").symlink_to(root)
    assert names(find_images(root), root) == ["a/x/y.Tiff", "b/10.png", "b/2.JPG", "link/linked.png", "z.webp"]


def test_an_empty_or_absent_folder_is_a_clear_error(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"no image below .*\.jpg"):
        find_images(tmp_path)
    for find in (find_images, find_classes):
        with pytest.raises(ValueError, match=r"must be a folder, got '.*notes.txt'"):
            find(tmp_path / "notes.txt")


def test_class_folders_in_order_of_name(tmp_path):
    for name in ("dog/1.png", "cat/deep/2.png", "cat/1.png", "stray.png", ".git/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths, labels, classes = find_classes(tmp_path)
    assert classes == ["cat", "dog"]
    assert list(zip(names(paths, tmp_path), labels, strict=True)) == [
        ("cat/1.png", 0),
        ("cat/deep/2.png", 0),
        ("dog/1.png", 1),
    ]
    (tmp_path / "eel").mkdir()
    with pytest.raises(ValueError, match=r"no image below .*eel"):
        find_classes(tmp_path)
    with pytest.raises(ValueError, match=r"one folder per class below .*cat.*found"):
        find_classes(tmp_path / "cat")


# What a pixel must become, by the definition of each mode and not by Pillow's conversion.
GREY16 = np.array([[0, 257, 65535], [32896, 128 * 257, 1000]], dtype=np.uint16)
MODES = {
    "L": (Image.fromarray(np.uint8([[0, 7, 255]])), "png", [[[0] * 3, [7] * 3, [255] * 3]]),
    "1": (Image.fromarray(np.array([[True, False]])), "png", [[[255] * 3, [0] * 3]]),
    "RGBA": (
        Image.fromarray(np.uint8([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 255, 51]]])),
        "png",
        [[[10, 20, 30], [255, 255, 255], [204, 224, 255]]],
    ),
    "LA": (Image.fromarray(np.uint8([[[40, 255], [40, 0]]])), "png", [[[40] * 3, [255] * 3]]),
    "I;16": (Image.fromarray(GREY16), "png", np.repeat((GREY16 / 257).round()[..., None], 3, -1)),
    "I;16 tiff": (Image.fromarray(GREY16), "tiff", np.repeat((GREY16 / 257).round()[..., None], 3, -1)),
    "F": (Image.fromarray(np.float32([[0, 0.5, 1]])), "tiff", [[[0] * 3, [128] * 3, [255] * 3]]),
    "F to 255": (Image.fromarray(np.float32([[0, 99.6, 300]])), "tiff", [[[0] * 3, [100] * 3, [255] * 3]]),
    "F broken": (Image.fromarray(np.float32([[np.nan, 2, 9]])), "tiff", [[[0] * 3, [2] * 3, [9] * 3]]),
    "CMYK": (Image.fromarray(np.uint8([[[255, 0, 0, 0]]]), "CMYK"), "tiff", [[[0, 255, 255]]]),
}


@pytest.mark.parametrize("name", MODES)
def test_every_kind_of_pixel_becomes_rgb(name, tmp_path):
    image, suffix, expected = MODES[name]
    image.save(tmp_path / f"x.{suffix}")
    found = read_image(str(tmp_path / f"x.{suffix}"))
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_palettes_with_and_without_transparency_and_the_first_frame_of_several(tmp_path):
    palette = Image.fromarray(np.uint8([[0, 1, 2]]), "P")
    palette.putpalette([9, 8, 7, 200, 100, 50, 1, 2, 3])
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "clear.png", transparency=1)
    assert np.asarray(read_image(str(tmp_path / "plain.png"))).tolist() == [[[9, 8, 7], [200, 100, 50], [1, 2, 3]]]
    assert np.asarray(read_image(str(tmp_path / "clear.png"))).tolist() == [[[9, 8, 7], [255, 255, 255], [1, 2, 3]]]
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "two.tiff", save_all=True, append_images=frames[1:])
    assert np.asarray(read_image(str(tmp_path / "two.tiff")))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [  # EXIF 2.3, tag 0x0112: what has to be done to the stored rows and columns
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: a.swapaxes(0, 1)[:, ::-1]),
        (7, lambda a: a.swapaxes(0, 1)[::-1, ::-1]),
        (8, lambda a: a.swapaxes(0, 1)[::-1]),
    ],
)
def test_exif_orientation_is_applied(orientation, upright, tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "x.png"))), upright(stored))


def box_of(image, size, scale, seed):
    """The box that random_crop cut, read off an image whose red and green are column and row."""
    crop = random_crop(image, size, scale, np.random.default_rng(seed))
    assert crop.size == size[::-1]
    values = np.asarray(crop).astype(float)
    h, w = size
    columns, rows = values[:, :, 0].mean(0), values[:, :, 1].mean(1)
    mirrored = columns[0] > columns[-1]
    # The inner half of the crop is free of the filter's border effects: slope there = source pixels per crop pixel.
    slope_x = abs(np.polyfit(np.arange(w)[w // 4 : -w // 4], columns[w // 4 : -w // 4], 1)[0])
    slope_y = np.polyfit(np.arange(h)[h // 4 : -h // 4], rows[h // 4 : -h // 4], 1)[0]
    centre = columns[w // 4 : -w // 4].mean(), rows[h // 4 : -h // 4].mean()
    return slope_x * w, slope_y * h, centre, mirrored


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_random_crop_keeps_to_its_share_ratio_and_frame(size):
    height, width = 200, 240
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    shares, ratios, centres, flips = [], [], [], []
    for seed in range(300):
        w, h, (cx, cy), mirrored = box_of(image, size, (0.2, 0.8), seed)
        shares.append(w * h / (width * height))
        ratios.append(w / h / (size[1] / size[0]))
        centres.append((cx, cy))
        flips.append(mirrored)
        assert w / 2 - 2 <= cx <= width - w / 2 + 1
        assert h / 2 - 2 <= cy <= height - h / 2 + 1
    assert 0.19 < min(shares) < 0.25
    assert 0.7 < max(shares) < 0.82
    assert 0.74 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.35
    assert 120 < sum(flips) < 180
    assert np.std(centres, axis=0).min() > 10


@pytest.mark.parametrize(("width", "height"), [(1, 1), (400, 3), (2, 333)])
def test_thin_and_tiny_images_are_cut_too(width, height):
    image = Image.new("RGB", (width, height), (10, 200, 30))
    for seed in range(5):
        crop = np.asarray(random_crop(image, (32, 40), (0.2, 1.0), np.random.default_rng(seed)))
        assert crop.shape == (32, 40, 3)
        assert (crop == [10, 200, 30]).all()


@pytest.mark.parametrize(("images", "batch", "world"), [(11, 4, 1), (11, 4, 3), (3, 8, 2), (1, 2, 1)])
def test_every_image_comes_once_per_epoch_whatever_the_batch(images, batch, world):
    steps = 24
    ranks = [list(BatchStream(images, batch, steps, seed=5, rank=r, world=world)) for r in range(world)]
    stream = [pair for step in range(steps) for rank in ranks for pair in rank[step]]
    assert [position for position, _ in stream] == list(range(steps * batch * world))
    order = [index for _, index in stream]
    for epoch in range(len(order) // images):
        assert sorted(order[epoch * images : (epoch + 1) * images]) == list(range(images))
    if images > 3:
        assert order[:images] != order[images : 2 * images]
        assert order[:batch] != [i for _, i in next(iter(BatchStream(images, batch, 1, seed=6, world=world)))]


def test_a_stream_that_starts_later_is_the_rest_of_the_whole_one():
    whole = list(BatchStream(11, 4, 20, seed=3))
    for start in (0, 1, 7, 20):
        rest = BatchStream(11, 4, 20, start=start, seed=3)
        assert list(rest) == whole[start:]
        assert len(rest) == 20 - start


def folder(tmp_path, **how):
    paths, labels, _ = find_classes(make_folder(tmp_path / "data", 7))
    return ImageFolder(paths, labels, (32, 48), (0.2, 1.0), **how)


def test_batches_are_a_function_of_seed_and_step_not_of_workers(tmp_path):
    dataset = folder(tmp_path, seed=1)

    def run(workers, start=0, dataset=dataset):
        return list(batches(dataset, BatchStream(len(dataset), 4, 6, start, seed=1), workers))

    alone, crowd, rest = run(0), run(2), run(1, start=4)
    for a, b in itertools.chain(zip(alone, crowd, strict=True), zip(alone[4:], rest, strict=True)):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert (a.paths, a.unreadable) == (b.paths, b.unreadable)
    assert alone[0].images.shape == (4, 3, 32, 48)
    assert alone[0].images.dtype == torch.uint8
    crops = {b.images[i].numpy().tobytes() for b in alone for i in range(4)}
    assert len(crops) == 24, "an image must be cropped anew each time it comes"
    other = run(0, dataset=ImageFolder(dataset.paths, dataset.labels, (32, 48), (0.2, 1.0), seed=2))
    assert not torch.equal(alone[0].images, other[0].images)


def test_unreadable_files_give_their_place_to_the_next(tmp_path):
    """Broken on purpose: with `return None` for a bad file the collation fails; with index - 1 the label is wrong."""
    data = tmp_path / "data"
    for name in ("a", "b"):
        (data / name).mkdir(parents=True)
        picture(1).save(data / name / "2_good.jpg")
    whole = (data / "a" / "2_good.jpg").read_bytes()
    (data / "a" / "1_cut.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "b" / "3_empty.png").touch()
    (data / "b" / "4_png.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    paths, labels, _ = find_classes(data)
    (data / "b" / "5_gone.png").touch()
    paths, labels = [*paths, str(data / "b" / "5_gone.png")], [*labels, 1]
    os.remove(paths[-1])
    dataset = ImageFolder(paths, labels, (32, 32), (0.2, 1.0))
    expected = {0: 1, 1: 1, 2: 2, 3: 1, 4: 1, 5: 1}
    for index, stand_in in expected.items():
        _, label, path, unreadable = dataset[0, index]
        assert (path, label) == (paths[stand_in], labels[stand_in])
        skipped = (index + i for i in range((stand_in - index) % len(paths)))
        assert set(unreadable) == {paths[i % len(paths)] for i in skipped}
        assert all(why.split(":")[0].endswith(("Error", "NotFoundError")) for why in unreadable.values())
    batch = next(iter(batches(dataset, BatchStream(6, 6, 1), workers=2)))
    assert set(batch.unreadable) == {paths[i] for i in (0, 3, 4, 5)}
    with pytest.raises(ValueError, match=r"none of the 2 images can be read; the first, .*1_cut"):
        ImageFolder([paths[0], paths[3]], None, (32, 32), (0.2, 1.0))[0, 0]


def test_normalise_is_imagenets():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (images.numpy().transpose(0, 2, 3, 1) / 255.0 - mean) / std
    np.testing.assert_allclose(normalise(images).numpy(), expected.transpose(0, 3, 1, 2), rtol=0, atol=2e-6)
    assert normalise(images).dtype == torch.float32


def test_derived_seeds_are_apart_and_fit_a_generator():
    seeds = {derived_seed(a, b, c) for a in range(8) for b in range(4) for c in range(50)}
    assert len(seeds) == 8 * 4 * 50
    assert all(0 <= s < 2**63 for s in seeds)
    assert len({s % 2**32 for s in seeds}) > 1590  # the CPU generator looks at 32 bits only
    assert math.log2(max(seeds)) > 62
