"""SAM 2 in use: the image predictor, the video predictor, and the image encoder compiled; the same masks as in stock.

On a real photograph, with random weights: what the masks show means nothing, and all of the way to them is run. The
latencies are printed (`pytest -s`); on a shared CPU they are no measurement.
"""

import copy
import time

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from hiera_kernels.subclass import target_of
from hiera_kernels.swap import accelerate
from tests.families import randomise
from tests.upstream import load

CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"
# Twelve blocks, each with its attention.
COUNT = 24


def built(video=False, overrides=()):
    """The tiny model from the package's own configuration."""
    load("iopath")
    build_sam = load("sam2.build_sam")
    build = build_sam.build_sam2_video_predictor if video else build_sam.build_sam2
    torch.manual_seed(7)
    model = build(CONFIG, device="cpu", hydra_overrides_extra=list(overrides))
    randomise(model.image_encoder.trunk)
    return model


def pair(**settings):
    stock = built(**settings)
    ours = copy.deepcopy(stock)
    assert len(accelerate(ours).replaced) == COUNT
    return {"stock": stock, "accelerated": ours}


def assert_same_masks(logits):
    """Logits to fp32 rounding; a pixel may change sides only where its logit is next to nothing."""
    a, b = (np.asarray(logits[name], dtype=np.float64) for name in ("accelerated", "stock"))
    scale = np.abs(b).max()
    assert 0 < scale < np.inf
    assert np.abs(a - b).max() <= 1e-3 * scale
    assert np.abs(b[(a > 0) != (b > 0)]).max(initial=0) <= 1e-3 * scale
    return (a > 0).mean()


def test_image_predictor():
    predictor_class = load("sam2.sam2_image_predictor").SAM2ImagePredictor
    photograph = data.chelsea()  # 300 x 451
    logits, seconds = {}, {}
    for name, model in pair().items():
        predictor = predictor_class(model)
        start = time.perf_counter()
        predictor.set_image(photograph)
        seconds[name] = time.perf_counter() - start
        points = np.array([[225, 150]])
        masks, *_ = predictor.predict(points, np.array([1]), multimask_output=True, return_logits=True)
        assert masks.shape == (3, 300, 451)
        logits[name] = masks
    print(*(f"set_image, {name}: {1000 * t:.0f} ms" for name, t in seconds.items()), sep="\n")
    share = assert_same_masks(logits)
    assert 0 < share < 1, "masks of everything or of nothing would all be alike"


def test_video_predictor(tmp_path):
    """Three frames, the cat moving; at 256 px, which the video predictor allows, because every frame costs seconds."""
    cat = data.chelsea()
    for i in range(3):
        Image.fromarray(np.roll(cat, 12 * i, axis=1)[:256, :384]).save(tmp_path / f"{i}.jpg")
    logits, seconds = {}, {}
    for name, model in pair(video=True, overrides=("++model.image_size=256",)).items():
        with torch.inference_mode():
            state = model.init_state(str(tmp_path))
            model.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=[[150, 120]], labels=[1])
            start = time.perf_counter()
            found = [masks for _, _, masks in model.propagate_in_video(state)]
            seconds[name] = (time.perf_counter() - start) / len(found)
        assert len(found) == 3
        logits[name] = torch.cat(found).numpy()
    print(*(f"a frame, {name}: {1000 * t:.0f} ms" for name, t in seconds.items()), sep="\n")
    assert_same_masks(logits)


def compiled_encoder(monkeypatch, backend):
    """`compile_image_encoder=True`, as the package has it, but for the backend."""
    compile_ = torch.compile
    asked = []

    def recorded(function, **settings):
        asked.append(settings)
        return compile_(function, fullgraph=settings["fullgraph"], dynamic=settings["dynamic"], backend=backend)

    monkeypatch.setattr(torch, "compile", recorded)
    torch._dynamo.reset()
    model = built(overrides=("++model.compile_image_encoder=true",))
    assert asked
    assert asked[0]["fullgraph"]
    return model


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_image_encoder(monkeypatch, backend):
    """Compiled when it is built, accelerated afterwards, run at a size that costs little."""
    model = compiled_encoder(monkeypatch, backend)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = built().image_encoder(x)
        assert len(accelerate(model).replaced) == COUNT
        actual = model.image_encoder(x)
    assert all(target_of(block) is not None for block in model.image_encoder.trunk.blocks)
    for a, b in zip(actual["backbone_fpn"], expected["backbone_fpn"], strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
