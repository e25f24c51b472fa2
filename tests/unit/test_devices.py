"""Devices and processes of a run."""

import pytest
import timm
import torch
from torch import nn

from tag2mask.engine import Devices, Training, fit
from tag2mask.errors import UserError


@pytest.fixture(scope="module")
def devices():
    return Devices("cpu")


class TestDevices:
    def test_one_cpu(self, devices):
        assert (devices.device.type, devices.rank, devices.world, devices.main) == ("cpu", 0, 1, True)
        assert devices.name.startswith("cpu")
        assert list(devices.share(3)) == [0, 1, 2]
        assert devices.any(True)
        assert not devices.any(False)
        assert devices.peak_mb() > 10
        model = nn.Linear(1, 1)
        assert devices.prepare(model) is model

    def test_share_of_several(self, devices):
        class Several:
            world, share = 3, Devices.share

        shares = []
        for rank in range(3):
            own = Several()
            own.rank = rank
            shares.append(list(own.share(8)))
        assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]

    @pytest.mark.parametrize(
        ("device", "where"), [("cuda", "torch.cuda.is_available"), ("mps", "torch.backends.mps.is_available")]
    )
    def test_a_device_that_is_not_there(self, monkeypatch, device, where):
        monkeypatch.setattr(where, lambda: False)
        with pytest.raises(UserError, match=f"^--device {device}: .* use --device auto or cpu$"):
            Devices(device)

    def test_norms_of_several_gpus_keep_the_activations_inside_them(self, tmp_path):
        """timm's norms may hold an activation, which torch's own conversion to global statistics forgets."""

        class Converted(Exception):
            pass

        class TwoGpus:
            world, device = 2, torch.device("cuda")

            def prepare(self, model):
                raise Converted(model)

        model, images = timm.create_model("test_efficientnet").eval(), torch.randn(1, 3, 64, 64)
        before = model(images)
        with pytest.raises(Converted) as caught:
            fit(model, [0, 1], list, Training(steps=1, batch=2), tmp_path, TwoGpus())
        (converted,) = caught.value.args
        assert not any(type(m).__name__.startswith("BatchNorm") for m in converted.modules())
        assert torch.allclose(before, converted(images), atol=1e-6)
