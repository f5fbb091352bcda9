import pytest
import torch

from hiera.config import Config, parse
from hiera.run import Run
from hiera.train import fit, main
from tests.training import make_folder, small_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("photos"))


class Probe(torch.nn.Module):
    """Stands where the model stands: says how it was called, and answers with given logits."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images, **options):
        device = images.device.type
        self.call = options, images, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return self.answer


PLAIN = {"mixup": 0.0, "cutmix": 0.0, "randaugment": 0.0, "erasing": 0.0}


@pytest.mark.filterwarnings("ignore:unreadable images")
@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", False), ("bf16", torch.bfloat16), ("fp16", torch.float16), (None, False)]
)
def test_options_reach_the_model_and_the_loss(precision, dtype, data):
    """Broken on purpose: nothing else here went red without the mask ratio, the smoothing or the autocast."""
    run = Run(small_run(data, precision=precision, mask_ratio=0.75))
    batch = next(iter(run.loader()))
    probe = Probe((torch.tensor(3.5), None, None, None))
    assert run.loss(probe, batch, 0) == 3.5
    options, images, autocast = probe.call
    assert options == {"mask_ratio": 0.75}
    assert autocast == dtype
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (batch.images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.allclose(images, pixels, atol=1e-6)

    run = Run(small_run(data, objective="classify", precision=precision, label_smoothing=0.3, **PLAIN))
    batch = next(iter(run.loader()))
    logits = torch.randn(4, 2, dtype=torch.float64)
    probe = Probe(logits.float())
    targets = torch.eye(2, dtype=torch.float64)[batch.labels] * 0.7 + 0.15
    expected = -(targets * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()
    assert run.loss(probe, batch, 0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert probe.call[2] == dtype


def test_drop_path_and_weight_decay_reach_their_places(data):
    run = Run(small_run(data, drop_path=0.4, weight_decay=0.3, layer_decay=0.5, objective="classify"))
    assert run.model.config["drop_path_rate"] == 0.4
    assert run.model.config["input_size"] == (64, 96)
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.0, 0.3}
    assert min(group["lr_scale"] for group in run.optimizer.param_groups) == 0.5 ** (len(run.model.blocks) + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": None}, "either steps or epochs"),
        ({"epochs": 3}, "either steps or epochs"),
        ({"objective": "detect"}, "objective must be one of .*'detect'"),
        ({"precision": "int8"}, "precision must be one of .*'int8'"),
        ({"size": (1, 2, 3)}, r"size must be .*\(1, 2, 3\)"),
        ({"batch": 0}, "batch must be positive, got 0"),
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"mask_ratio": 1.0}, "mask_ratio must be between 0 and 1, got 1.0"),
        ({"drop_path": 1.5}, "drop_path must be in 0 .. 1, got 1.5"),
        ({"resume": True}, "resume needs checkpoint_dir"),
        ({"data": ""}, "data must name a folder"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small_run(**({"data": "x"} | options))


def test_what_the_run_finds_out_is_refused_in_words(data, tmp_path, capsys):
    for options, message in (
        ({"warmup": 6}, "warmup must be .* less than steps=6, got 6"),
        ({"size": (64, 70)}, "70"),
        ({"model": "hiera_mimi_128"}, "hiera_mini_128"),
        ({"model": "hiera_base_16x224"}, "hiera_base_16x224 cannot take images of 64x96 pixels"),
        ({"data": str(tmp_path)}, "no image below"),
        ({"objective": "classify", "data": str(tmp_path)}, "one folder per class"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(small_run(**({"data": data} | options)))
    assert main(["--data", str(tmp_path), "--steps", "1"]) == 1
    assert "error: no image below" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        parse(["--data", "x", "--steps", "1", "--epochs", "2"])
    assert "give either steps or epochs" in capsys.readouterr().err


def test_the_command_line_and_the_config_are_the_same():
    assert parse(["--data", "d", "--steps", "3"]) == Config(data="d", steps=3)
    line = "--data d --objective classify --model mae_hiera_tiny_224 --size 96 128 --epochs 1.5 --no-progress --lr 0.1"
    config = parse([*line.split(), "--accelerate", "--precision", "fp16", "--seed", "7", "--drop-path", "0"])
    assert (config.model, config.size, config.epochs, config.progress) == ("hiera_tiny_224", (96, 128), 1.5, False)
    assert (config.accelerate, config.compile, config.drop_path, config.seed) == (True, False, 0.0, 7)
    assert parse(["--data", "d", "--steps", "3", "--size", "96"]).size == (96, 96)
