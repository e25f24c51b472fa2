"""Training crops that bring the soft maps of their images along."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import Dataset

from tag2mask.data.augment import Crops, Sample
from tag2mask.data.maps import map_path, read_maps
from tag2mask.ops.place import into_crop


class MapCrops(Dataset[Sample]):
    """The samples of `crops` with one more side map, [K h w] in 0..1: what the crop shows of the image's soft maps.

    folder: of the maps, as `data.maps` writes them. side: its name. num_classes: K; classes without a map are 0, and so
    is padding. grid: (h, w). Raises UserError if the maps of an image are missing or broken.
    """

    def __init__(self, crops: Crops, folder: Path, *, side: str, num_classes: int, grid: tuple[int, int]) -> None:
        self.crops, self.folder = crops, folder
        self.side, self.num_classes, self.grid = side, num_classes, grid

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        sample = self.crops[place]
        stored = read_maps(map_path(self.folder, self.crops.samples.names[sample.index]))
        shown = torch.zeros(self.num_classes, *self.grid)
        if len(stored.classes):
            assert sample.place is not None
            maps, _ = into_crop(torch.from_numpy(stored.maps).float()[None], sample.place[None], self.grid)
            shown[torch.from_numpy(stored.classes)] = maps[0]
        sample.side[self.side] = shown
        return sample
