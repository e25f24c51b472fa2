"""The CAM stage against the naive loop: seconds for the same maps, and how far the maps are apart.

The naive loop is what released code does: image by image, one forward pass per scale and mirror image, all K classes
resized to the full image and summed in numpy. Both sides run the same network on the same drawn images. The loop is
timed twice: as a script of its own would run it, and with the memory settings that `Devices` makes for CPUs.

    python benchmarks/cams.py --images 12 --size 320 --classes 20
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from tag2mask.backbones import BackboneSettings
from tag2mask.baselines import CAM
from tag2mask.core import Objective
from tag2mask.data.augment import normalise
from tag2mask.data.maps import map_size
from tag2mask.data.scenes import Scenes
from tag2mask.engine import Devices
from tag2mask.ops.cams import max_norm
from tag2mask.stages.cams import multi_scale

SCALES = (0.5, 1.0, 1.5, 2.0)
Maps = Sequence[np.ndarray] | Sequence[torch.Tensor]


def naive(objective: Objective, images: torch.Tensor, tags: torch.Tensor) -> list[np.ndarray]:
    """[K H W] maps of every image, zero for classes without a tag."""
    found = []
    height, width = images.shape[-2:]
    for image, tag in zip(images, tags, strict=True):
        total = np.zeros((len(tag), height, width), np.float32)
        for scale in SCALES:
            size = (round(height * scale), round(width * scale))
            scaled = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)
            for mirror in (False, True):
                with torch.no_grad():
                    cams = objective.look(scaled.flip(-1) if mirror else scaled).cams.relu()
                full = F.interpolate(cams, size=(height, width), mode="bilinear", align_corners=False)[0]
                total += (full.flip(-1) if mirror else full).cpu().numpy() * tag.numpy()[:, None, None]
        found.append(total / (total.max(axis=(1, 2), keepdims=True) + 1e-5))
    return found


def ours(objective: Objective, images: torch.Tensor, tags: torch.Tensor, batch: int) -> list[torch.Tensor]:
    """[P h w] maps of the tagged classes of every image."""
    found: list[torch.Tensor] = []
    for start in range(0, len(images), batch):
        part = slice(start, start + batch)
        found += multi_scale(objective, images[part], tags[part], scales=SCALES, flip=True)[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--classes", type=int, default=20, help="K; 20 as in VOC, 80 as in COCO")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--backbone", default="mobilenetv2_100")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    net = CAM(options.classes, backbone=BackboneSettings(name=options.backbone, weights=None))
    objective = Objective(net, num_classes=options.classes).eval()
    samples = Scenes(images=max(8, options.images), test=1, size=options.size).split("train")
    images = normalise(
        torch.from_numpy(np.stack([samples.image(i) for i in range(options.images)])).permute(0, 3, 1, 2)
    )
    tags = torch.zeros(options.images, options.classes, dtype=torch.uint8)
    tags[torch.arange(options.images), torch.arange(options.images) % options.classes] = 1
    tags[torch.arange(options.images), (torch.arange(options.images) * 7 + 3) % options.classes] = 1

    times: dict[str, list[float]] = {"naive loop": [], "naive loop, our memory settings": [], "ours": []}

    def clock(name: str, work: Callable[[], Maps]) -> Maps:
        start = time.perf_counter()
        result = work()
        times[name].append(time.perf_counter() - start)
        return result

    naive(objective, images[:1], tags[:1])  # warm-up
    for _ in range(options.repeats):
        clock("naive loop", lambda: naive(objective, images, tags))
    Devices("cpu")
    ours(objective, images[: options.batch], tags[: options.batch], options.batch)
    for _ in range(options.repeats):  # taking turns, so that a busy machine slows both
        theirs = clock("naive loop, our memory settings", lambda: naive(objective, images, tags))
        mine = clock("ours", lambda: ours(objective, images, tags, options.batch))

    apart = []
    for full, small, tag in zip(theirs, mine, tags, strict=True):
        wanted = torch.from_numpy(full[tag.bool().numpy()])[None]
        shrunk = F.interpolate(wanted, size=map_size(wanted.shape[-2:]), mode="bilinear", align_corners=False)
        apart.append(float((max_norm(shrunk[0]) - small.float()).abs().mean()))
    print(f"{options.images} images of {options.size} px, {options.classes} classes, {options.backbone}, ", end="")
    print(f"{torch.get_num_threads()} threads, the best of {options.repeats}")
    for name, values in times.items():
        print(f"{name:<32} {min(values):6.2f} s   {min(values) / min(times['ours']):.2f} x ours")
    print(f"mean difference of the maps {np.mean(apart):.4f} (ours are kept at stride 4 in half precision)")


if __name__ == "__main__":
    main()
