import math

import numpy as np
import pytest
import torch

import hiera
from hiera.augment import FineTuneAugment, _BetaGenerator
from hiera.data import MEAN, STD
from hiera.recipe import layer_of, learning_rate, make_optimizer, recipe_for


def test_learning_rate_rises_linearly_then_falls_as_half_a_cosine():
    """Values from the definition at points where the cosine is known."""
    rates = [learning_rate(step, 110, 10, 2.0) for step in range(110)]
    assert rates[:10] == pytest.approx([2 * k / 11 for k in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)  # half way down
    assert rates[10 + 100 // 3 * 2] == pytest.approx(2 * (1 + math.cos(math.pi * 0.66)) / 2)
    assert rates[35] == pytest.approx(2 * (1 + math.sqrt(0.5)) / 2)  # a quarter
    assert 0 < rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 1, 0, 3.0) == 3.0


@pytest.mark.parametrize(("step", "steps", "warmup"), [(0, 10, 10), (0, 10, -1), (10, 10, 0), (-1, 10, 0)])
def test_learning_rate_refuses_what_lies_outside(step, steps, warmup):
    with pytest.raises(ValueError, match="must be"):
        learning_rate(step, steps, warmup, 1.0)


def test_published_settings_are_found_by_the_models_name():
    assert recipe_for("mae", "mae_hiera_huge_224").drop_path == 0.3
    assert recipe_for("mae", "mae_hiera_tiny_224").drop_path == 0.0
    mae = recipe_for("mae", "mae_hiera_base_224")
    assert (mae.lr, mae.lr_batch, mae.betas, mae.weight_decay, mae.layer_decay) == (8e-4, 4096, (0.9, 0.95), 0.05, 1.0)
    base, plus = recipe_for("classify", "hiera_base_224"), recipe_for("classify", "hiera_base_plus_224")
    assert (base.lr, base.layer_decay, base.lr_batch, base.betas) == (2e-3, 0.7, 1024, (0.9, 0.999))
    assert plus.lr == 1e-3, "base_plus must not be taken for base"
    assert recipe_for("classify", "hiera_mini_128") == recipe_for("classify", "hiera_tiny_224")


@pytest.mark.parametrize("name", ["hiera_mini_128", "mae_hiera_mini_128"])
def test_parameters_are_grouped_by_layer_and_decay(name):
    model = hiera.create_model(name)
    optimizer = make_optimizer(model, 1.0, (0.9, 0.95), 0.05, 0.5)
    where = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(where) == len(list(model.parameters()))
    depth = len(model.blocks)
    for key, parameter in model.named_parameters():
        group = where[id(parameter)]
        plain = key.endswith(".bias") or "norm" in key or key == "pos_embed"
        assert group["weight_decay"] == (0.0 if plain else 0.05), key
        if key.startswith(("patch_embed", "pos_embed")):
            layer = 0
        elif key.startswith("blocks."):
            layer = 1 + int(key.split(".")[1])
        else:
            layer = depth + 1
        assert group["lr_scale"] == pytest.approx(0.5 ** (depth + 1 - layer)), key
    assert layer_of("decoder_blocks.0.mlp.fc1.weight", depth) == depth + 1


def constant_images(count, classes, size=(32, 48)):
    """Image i is class i % classes, and every one of its pixels has the value 40 * class."""
    labels = torch.arange(count) % classes
    images = (40 * labels).to(torch.uint8)[:, None, None, None].expand(count, 3, *size).contiguous()
    return images, labels


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_say_what_share_of_each_class_the_mixed_image_holds(mixup, cutmix):
    """Independent of how it is mixed: with constant images the mean pixel is the targets' expectation.

    Broken on purpose: the two libraries' shares mean opposite things; without `1 - share_of_first` cutmix fails here.
    """
    images, labels = constant_images(12, 4)
    augment = FineTuneAugment(4, randaugment=0, erasing=0, mixup=mixup, cutmix=cutmix)
    mixed_some, cut_some = False, False
    for seed in range(20):
        torch.manual_seed(seed)
        x, targets = augment(images, labels)
        assert (x.shape, x.dtype) == (images.shape, torch.float32)
        assert torch.allclose(targets.sum(1), torch.ones(12), atol=1e-6)
        assert (targets >= 0).all()
        values = x * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        expected = (targets * torch.arange(4) * 40 / 255).sum(1)
        assert torch.allclose(values.mean((1, 2, 3)), expected, atol=1e-5)
        mixed_some |= bool(((targets > 0.01) & (targets < 0.99)).any())
        cut_some |= bool((x.flatten(1).std(1) > 0.3).any())
    assert mixed_some
    assert cut_some == bool(cutmix)


def test_mixing_shares_follow_the_recipes_beta_distribution():
    torch.manual_seed(0)
    shares = np.concatenate([_BetaGenerator(0.8)((1000, 3, 8, 8))["mixup_lambdas"].numpy() for _ in range(40)])
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.002)  # a uniform share would have 0.083


def test_augmentation_can_be_turned_off_and_is_a_function_of_the_seed():
    images, labels = constant_images(6, 3)
    off = FineTuneAugment(3, randaugment=0, erasing=0, mixup=0, cutmix=0)
    x, targets = off(images, labels)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    assert torch.allclose(x, (images / 255 - mean) / std, atol=1e-6)
    assert torch.equal(targets, torch.eye(3)[labels])
    full = FineTuneAugment(3)
    noise = torch.randint(0, 256, (6, 3, 32, 48), dtype=torch.uint8)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(full(noise, labels))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    assert all(torch.isfinite(x).all() for x, _ in results)


def test_erasing_and_randaugment_act_alone():
    noise = torch.randint(1, 255, (16, 3, 32, 48), dtype=torch.uint8)
    labels = torch.zeros(16, dtype=torch.long)
    plain, _ = FineTuneAugment(2, 0, 0, 0, 0)(noise, labels)
    torch.manual_seed(0)
    erased, _ = FineTuneAugment(2, 0, 1.0, 0, 0)(noise, labels)
    changed = (erased != plain).any(1)
    assert (changed.flatten(1).float().mean(1) > 0.01).all()
    assert (erased.permute(0, 2, 3, 1)[changed] == 0).all(), "erased pixels have the mean colour, 0 after normalisation"
    torch.manual_seed(0)
    assert (FineTuneAugment(2, 9, 0, 0, 0)(noise, labels)[0] != plain).any()
