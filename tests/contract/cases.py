"""The objectives under contract, and small data to try them on. A new baseline or method is one line in PAIRS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tag2mask import schema
from tag2mask.backbones.class_tokens import ClassTokenViT
from tag2mask.baselines import BASELINES
from tag2mask.core import FULL, Batch, Method, Objective, Progress, View
from tag2mask.data.augment import Sample, collate
from tag2mask.engine import Devices, Training, fit
from tag2mask.methods import METHODS
from tag2mask.ops.gather import sum_over_processes


class Example(Method):
    """A method with one of everything: a second view, a head, an epoch counter, prototypes that are gathered.

    It holds the harness itself to account while there are few real methods, and shows what a method looks like.
    """

    views = (FULL, View(scale=0.5))

    def __init__(self, *, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def bind(self, net, num_classes):
        self.head = nn.Conv2d(net.dims["last"], 8, kernel_size=1)
        self.register_buffer("prototypes", torch.zeros(num_classes, 8))
        self.register_buffer("seen", torch.zeros(num_classes))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.long))

    def losses(self, batch, outs, progress):
        full, half = (outs[view] for view in self.views)
        regions = self._regions(full, batch.tags)
        present = batch.tags * self.seen
        scores = torch.einsum("bkd,jd->bkj", F.normalize(regions, dim=-1), F.normalize(self.prototypes, dim=-1))
        wrong = F.cross_entropy(scores.flatten(0, 1) / self.temperature, self._own(batch), reduction="none").view_as(
            present
        )
        other = self._regions(half, batch.tags)
        apart = (1 - F.cosine_similarity(regions, other, dim=-1)) * batch.tags
        self._regions_seen, self._tags_seen = regions.detach(), batch.tags
        return {"own": (wrong * present).sum(1).mean(), "scale": progress.done * apart.sum(1).mean()}

    def on_epoch_start(self, epoch):
        self.epochs.fill_(epoch + 1)

    @torch.no_grad()
    def after_step(self, net):
        count = sum_over_processes(self._tags_seen.sum(0))
        mean = (
            sum_over_processes((self._regions_seen * self._tags_seen[..., None]).sum(0)) / count.clamp(min=1)[:, None]
        )
        self.prototypes.lerp_(mean, 0.5 * (count > 0).float()[:, None])
        self.seen.copy_(torch.maximum(self.seen, (count > 0).float()))

    @torch.no_grad()
    def cams(self, out, tags):
        return out.best * tags[:, :, None, None]

    def _regions(self, out, tags):
        weight = F.softplus(out.cams) * tags[:, :, None, None]
        weight = weight / weight.sum(dim=(2, 3), keepdim=True).clamp(min=1e-5)
        return torch.einsum("bkhw,bdhw->bkd", weight, self.head(out.features["last"]))

    @staticmethod
    def _own(batch):
        images, classes = batch.tags.shape
        return torch.arange(classes, device=batch.tags.device).repeat(images)


class Local(Example):
    """What goes wrong with several processes: each remembers only the images that it has seen itself."""

    @torch.no_grad()
    def after_step(self, net):
        self.prototypes.lerp_((self._regions_seen * self._tags_seen[..., None]).mean(0), 0.5)


METHODS_HERE: dict[str, Any] = {**METHODS, "example": Example, "local": Local}


@dataclass(frozen=True)
class Pair:
    """A baseline and the methods on it, with settings that suit images of 64 pixels, and without dropout.

    untrained: parameters (beginnings of names) that rightly get no gradient. background: where a class axis with one
    place more than there are classes keeps the background, by state entry (beginning of its name): "first" or "last".
    leaks: why a method may send gradients into the maps of classes that no image of the batch has. title: where
    the same baseline and methods come twice.
    """

    net: str
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    untrained: tuple[str, ...] = ()
    background: Mapping[str, str] = field(default_factory=dict)
    leaks: str = ""
    title: str = ""

    @property
    def slow(self) -> bool:
        """Two methods at once, or another setting of one: `make test-all` has them under contract."""
        return len(self.methods) > 1 or bool(self.title and self.methods)

    def __str__(self) -> str:
        return self.title or "+".join((self.net, *self.methods))


SEAM, EPS_PCM = {"scale": 0.5, "dropout": 0.0}, {"pcm": True, "size": 32}
EPS_LAST, HSC_FIRST = {"net.classifier": "last"}, {"methods.hsc.": "first"}
PPC, HSC = {"ppc": {"size": None, "scale": 0.5}}, {"hsc": {"size": 32}}
OAA = {"width": 16, "std": 0.2, "grid": 8, "drop": 0.8, "drop_above": 0.0}
CPAL = {"cpal": {"dim": 16, "bank": 3, "prototypes": 3, "neighbours": 2}}
CPAL_BANK = {"projection": "hierarchical", "dim": 12, "background": "bank", "align": "both", "first": 0.5}
# An activation may come so close to the kink of its ReLU that 1 and 2 processes, which round differently, fall on its
# two sides; with this weight of the coarse maps none does.
RCA = {"rca": {"gate": 0.0, "clusters": 2, "coarse": 1.0}}
RCM = {"rcm_mam": {"dim": 16, "mam_epoch": 1.0, "momentum": 0.9}}
RCM_BESIDE = {"head": "beside", "scales": (1.0, 1.5), "rcm_mean": "pixels", "prototype_mean": "pixels"}
RCM_BESIDE |= {"background_threshold": 0.1, "mam_mean": "sum", "mam_weight": 0.01, "cls_others": 0.5}
RCM_BESIDE = {"rcm_mam": RCM["rcm_mam"] | RCM_BESIDE}
RCM_FIRST = {"methods.rcm_mam.support.prototypes.": "first"}
RCM_EPS = EPS_LAST | RCM_FIRST | {"methods.rcm_mam.support.net.model.classifier": "last"}
VIT = {"name": "test_vit", "weights": None, "output_stride": 8}
MCT = {"backbone": VIT}
MCT_V1 = MCT | {"maps": "attention", "refine": False}
MCT_PLUS = MCT | {"maps": "root", "positions": "exact", "repeat": 2, "decay": 0.996, "token": 1.0}
SHARES = "maps are shares of a softmax, in which every class has a part"
PAIRS = (
    Pair("cam"),
    Pair("cam", {"example": {}}),
    Pair("cam", PPC),
    Pair("cam", HSC, background=HSC_FIRST),
    Pair("seam", settings=SEAM),
    Pair("seam", PPC, SEAM),
    Pair("seam", HSC, SEAM, background=HSC_FIRST),
    Pair("oaa", settings=OAA),
    Pair("oaa", PPC, OAA),
    Pair("oaa", HSC, OAA, background=HSC_FIRST),
    Pair("eps", background=EPS_LAST),
    Pair("eps", settings=EPS_PCM, background=EPS_LAST, title="eps(pcm)"),
    Pair("eps", {"ppc": {"size": 32}}, EPS_PCM, background=EPS_LAST),
    Pair("eps", {"hsc": {"size": 32, "saliency": True}}, EPS_PCM, background=EPS_LAST | HSC_FIRST),
    Pair("mctformer", settings=MCT),
    Pair("mctformer", settings=MCT_V1, title="mctformer(v1)"),
    Pair("mctformer", settings=MCT_PLUS, title="mctformer(plus)"),
    Pair("mctformer", CPAL, MCT),
    Pair("mctformer", CPAL, MCT_PLUS, title="mctformer(plus)+cpal"),
    Pair("mctformer", PPC, MCT),
    # With a title these are among the slow ones: the tests above have a method on tokens already.
    Pair("mctformer", HSC, MCT, background=HSC_FIRST, title="mctformer+hsc"),
    Pair("mctformer", RCA, MCT, title="mctformer+rca"),
    Pair("mctformer", RCM, MCT, background=RCM_FIRST, title="mctformer+rcm_mam"),
    Pair("cam", CPAL),
    Pair("seam", CPAL, SEAM),
    Pair("oaa", CPAL, OAA),
    Pair("eps", CPAL, background=EPS_LAST, leaks=SHARES),
    Pair("eps", CPAL, EPS_PCM, background=EPS_LAST, leaks=SHARES, title="eps(pcm)+cpal"),
    Pair("cam", {"cpal": CPAL["cpal"] | CPAL_BANK}, background={"methods.cpal.": "first"}, title="cam+cpal(bank)"),
    Pair("cam", RCA),
    Pair("cam", {"rca": RCA["rca"] | {"capacity": 3, "momentum": 0.9}}, title="cam+rca(ring)"),
    Pair("seam", RCA, SEAM),
    Pair("oaa", RCA, OAA),
    Pair("eps", RCA, background=EPS_LAST),
    Pair("eps", RCA, EPS_PCM, background=EPS_LAST, title="eps(pcm)+rca"),
    Pair("cam", RCA | PPC),
    Pair("cam", RCA | HSC, background=HSC_FIRST),
    # With coarse: 0.4 a ReLU of the trunk is so near its edge in the third step that the last digit decides.
    Pair("cam", {"rca": RCA["rca"] | {"coarse": 0.3}} | CPAL),
    Pair("cam", PPC | CPAL),
    Pair("cam", HSC | CPAL, background=HSC_FIRST),
    Pair("cam", RCM, background=RCM_FIRST),
    Pair("cam", RCM_BESIDE, background=RCM_FIRST, leaks="cls_others has all classes", title="cam+rcm_mam(beside)"),
    Pair("seam", RCM, SEAM, background=RCM_FIRST),
    Pair("oaa", RCM, OAA, background=RCM_FIRST),
    Pair("eps", RCM, background=RCM_EPS, leaks=SHARES),
    Pair("eps", RCM, EPS_PCM, background=RCM_EPS, leaks=SHARES, title="eps(pcm)+rcm_mam"),
    Pair("cam", RCM | PPC, background=RCM_FIRST),
    Pair("cam", RCM | CPAL, background=RCM_FIRST),
    Pair("cam", PPC, {"backbone": VIT}, title="cam+ppc(vit)"),
    Pair("cam", CPAL, {"backbone": VIT}, title="cam+cpal(vit)"),
)

BROKEN_PAIR = Pair("cam", {"local": {}})

CLASSES = 5
BACKBONE = {"name": "test_resnet", "weights": None, "output_stride": 8, "freeze_norm": True}
SIZE = 64
# The first image shows several classes, the third none; nothing shows the last class.
TAGS = [[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]]


def build(pair: Pair, *, num_classes: int = CLASSES, bf16: bool = False, seed: int = 0) -> Objective:
    """The objective of a pair, made from settings as a recipe would, for the images of `Memory`."""
    torch.manual_seed(seed)
    net = BASELINES[pair.net]
    settings = schema.check(net, {"backbone": BACKBONE, **pair.settings}, "net")
    parts = {
        name: schema.make(METHODS_HERE[name], schema.check(METHODS_HERE[name], s, name))
        for name, s in pair.methods.items()
    }
    objective = Objective(
        schema.make(net, settings, num_classes=num_classes), parts, num_classes=num_classes, bf16=bf16
    )
    for norm in (m for m in objective.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.ones_(norm.weight)  # timm starts residual branches at zero, where nothing in them would train
    for layer in (b.attn.qkv for m in objective.modules() if isinstance(m, ClassTokenViT) for b in m.blocks):
        layer.weight.data.mul_(6)  # fresh, all attend to all alike, and rounding is what a stretched map shows
    objective.remember(torch.tensor(TAGS * 2)[:, torch.arange(num_classes) % CLASSES])
    return objective.train()


def batch_of(tags: list[list[int]] | None = None, *, seed: int = 0, size: int = SIZE) -> Batch:
    """Smooth random images with the given tags, a saliency map for those who ask, a padded corner, and places.

    What lies where: cut out, turned, and mirrored half of the time.
    """
    rows = torch.tensor(TAGS if tags is None else tags, dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    images = F.interpolate(torch.randn(len(rows), 3, 8, 8, generator=draw), size=(size, size), mode="bicubic")
    valid = torch.ones(len(rows), 1, size, size)
    valid[0, :, : size // 4] = 0
    saliency = F.interpolate(torch.rand(len(rows), 1, 8, 8, generator=draw), size=(size, size), mode="bilinear")
    scale, shift, mirror = (torch.rand(len(rows), 2, generator=draw) for _ in range(3))
    place = torch.diag_embed((1 + scale) * torch.where(mirror < 0.5, -1, 1))
    place = torch.cat([torch.where(scale[:, :1, None] < 0.5, place.flip(1), place), shift[..., None] - 0.5], dim=2)
    return Batch(images * valid, rows, torch.arange(len(rows)), valid, {"saliency": saliency * valid}, None, place)


def trained(pair: Pair, steps: int = 4, **options: Any) -> Objective:
    """An objective after a few steps, so that banks and prototypes hold something."""
    objective = build(pair, **options)
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        batch = batch_of(seed=step, tags=[*TAGS[1:], TAGS[0]])
        batch.index = batch.index.roll(-1)
        train_step(objective, optimizer, batch, step)
    return objective


def train_step(objective: Objective, optimizer: torch.optim.Optimizer, batch: Batch, step: int) -> dict[str, float]:
    """One step as `fit` does it, an epoch every two steps. Returns the losses."""
    torch.manual_seed(step)
    if step % 2 == 0:
        objective.on_epoch_start(step // 2)
    losses = objective(batch, progress_at(step))
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    objective.after_step()
    return {name: loss.item() for name, loss in losses.items()}


def progress_at(step: int) -> Progress:
    """Half-way through training and later, when every schedule is under way."""
    return Progress(epoch=step / 2, done=min(0.5 + step / 20, 1.0), seed=step + 11)


class Memory(torch.utils.data.Dataset):
    """Eight training samples that depend on (epoch, index) alone. `fails_at`: the read that ends in a crash."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.reads, self.fails_at = 0, fails_at

    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        epoch, index = place
        self.reads += 1
        if self.reads == self.fails_at:
            raise ConnectionError("the disk is gone")
        one = batch_of([TAGS[index % 4]], seed=100 * epoch + index)
        return Sample(
            one.images[0], one.tags[0], index, one.valid[0], {name: x[0] for name, x in one.side.items()}, None,
            one.place[0],
        )  # fmt: skip


def fit_in(
    out: Path, objective: Objective, *, steps: int, devices: Devices, data: Memory | None = None, save_every: int = 100
) -> dict[str, torch.Tensor]:
    """Train with `engine.fit` in a folder; the state afterwards."""
    out.mkdir(parents=True, exist_ok=True)
    training = Training(steps=steps, batch=4, lr=0.01, lr_new=2.0, clip=5.0, seed=3)
    fit(objective, data or Memory(), collate, training, out, devices, save_every=save_every, log_every=1)
    return {name: x.clone() for name, x in objective.state_dict().items()}
