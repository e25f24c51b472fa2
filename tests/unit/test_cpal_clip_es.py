"""CPAL on CLIP-ES, without training: the whole against loops over images, tags, patches and prototypes."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loop_pacam import loop_bank, loop_pacam, loop_patches
from safetensors.torch import load_file, save_file
from test_clip_es import CONFIG, PATCH, images, tiny

from tag2mask import recipe
from tag2mask.backbones.clip import CLIPSettings, load_clip
from tag2mask.data.augment import normalise
from tag2mask.data.images import read_mask
from tag2mask.data.maps import Maps, map_path, map_size, read_maps, write_maps
from tag2mask.data.source import Samples
from tag2mask.engine import Devices
from tag2mask.errors import UserError
from tag2mask.pipeline import MANIFEST, Stage, write_json
from tag2mask.refine.pacam import cluster, fuse, in_the_bank, instances
from tag2mask.refine.pacam import pacam as prototype_aware
from tag2mask.stages import Context
from tag2mask.stages.cost import cost_of
from tag2mask.stages.labels import Background, labels, mask_path
from tag2mask.stages.pacam import BANK, INSTANCES, check_pacam, pacam, patch_features

NAME = "tiny-clip-for-prototypes"
CLASSES = ("ant", "bee", "cat", "dog")
TAGS = np.array(
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]], dtype=np.uint8
)  # of "cat" there is one image, of "dog" none
SIZES = [(32, 40), (40, 32), (32, 40), (32, 40), (27, 35), (40, 32), (32, 40)]
DEFAULTS = {"threshold": 0.1, "bank": 1000, "prototypes": 50, "neighbours": 20, "gamma": None, "share": 0.5}
OPTIONS = [
    {},
    {"prototypes": 2, "neighbours": 1},
    {"bank": 3, "prototypes": 2, "threshold": 0.5},
    {"bank": 2, "share": 1.0},
    {"neighbours": 2, "gamma": 0.01},
    {"gamma": 5.0, "threshold": 0.0},
    {"share": 0.0},
]


def drawn(sizes=SIZES, tags=TAGS, seed=0):
    """{(image, class): soft map [h w] in 0..1 of a blob} in half precision, as they are stored."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for b, n in zip(*np.nonzero(tags), strict=True):
        height, width = map_size(sizes[b])
        y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
        top, left, size = torch.rand(3, generator=draw).tolist()
        blob = torch.exp(-((y - top) ** 2 + (x - left) ** 2) / (0.05 + 0.1 * size))
        found[int(b), int(n)] = (blob / blob.max()).half()
    return found


def dense(stored, b, dtype=torch.float64):
    """[1 K h w] of one image, which may be without tags."""
    maps = torch.zeros(len(CLASSES), *map_size(SIZES[b]), dtype=dtype)
    for (image, n), own in stored.items():
        if image == b:
            maps[n] = own.to(dtype)
    return maps[None]


def features(clip, pixels, longest=None):
    """[1 D h w] of one image, in the precision of the network."""
    grid = clip.grid(tuple(pixels.shape[1:]), longest)
    with torch.no_grad():
        entering, _ = clip.before_last(clip.tokens(pixels[None], grid), keep=0)
        patches = clip.patches(clip.last(entering, clip.enter(entering))[0])
    return patches[0].T.reshape(1, -1, *grid)


def offline(clip, pixels, stored, *, threshold, bank, prototypes, neighbours, gamma, share):
    """{(image, class): fused map} by the functions of refine/pacam.py, one image after the other."""
    given = [(features(clip, one), dense(stored, b)) for b, one in enumerate(pixels)]
    chosen = torch.from_numpy(in_the_bank(TAGS, bank))
    rows, exist, means = (torch.cat(x) for x in zip(*(instances(*pair, threshold) for pair in given), strict=True))
    mean = means[chosen.any(dim=1)].mean(dim=0)
    known = cluster(rows.transpose(0, 1), (exist & chosen).T, mean, prototypes)
    found = {}
    for b, (own, maps) in enumerate(given):
        aware, part = prototype_aware(own, maps, known, threshold=threshold, neighbours=neighbours, gamma=gamma)
        fused = fuse(maps, aware, part, share)[0]
        found |= {(b, n): fused[n] for n in range(len(CLASSES)) if TAGS[b, n]}
    return found


@pytest.fixture(scope="module")
def pictures():
    return [images(1, size, seed=b)[0] for b, size in enumerate(SIZES)]


class TestWhole:
    @pytest.mark.parametrize("options", OPTIONS)
    def test_against_loops(self, options, pictures):
        clip, stored, settings = tiny(), drawn(), DEFAULTS | options
        exact = {pair: own.double() for pair, own in stored.items()}
        expected = loop_pacam(clip, pictures, TAGS.tolist(), exact, **settings)
        found = offline(clip, pictures, stored, **settings)
        assert found.keys() == expected.keys() == stored.keys()
        for pair, own in found.items():
            assert torch.allclose(own, expected[pair], atol=1e-9), pair
            assert own.min() >= 0 and own.max() <= 1
        if settings["share"]:
            changed = {pair for pair in found if not torch.allclose(found[pair], exact[pair], atol=1e-3)}
            assert changed == {pair for pair in stored if CLASSES[pair[1]] != "cat"}

    def test_a_class_of_one_image_and_a_map_of_zeros_keep_what_there_is(self, pictures):
        stored = drawn()
        stored[1, 0] = torch.zeros_like(stored[1, 0])
        exact = {pair: own.double() for pair, own in stored.items()}
        settings = DEFAULTS | {"prototypes": 2}
        found = offline(tiny(), pictures, stored, **settings)
        assert not found[1, 0].any()
        assert torch.equal(found[2, 2], exact[2, 2])  # the only cat
        expected = loop_pacam(tiny(), pictures, TAGS.tolist(), exact, **settings)
        assert all(torch.allclose(own, expected[pair], atol=1e-9) for pair, own in found.items())

    def test_maps_of_zeros_everywhere(self, pictures):
        stored = {pair: torch.zeros_like(own) for pair, own in drawn().items()}
        assert not any(own.any() for own in offline(tiny(), pictures, stored, **DEFAULTS).values())

    def test_a_share_of_nothing_is_the_old_map_and_of_all_the_new_one(self, pictures):
        stored = drawn()
        old = offline(tiny(), pictures, stored, **DEFAULTS | {"share": 0.0})
        new = offline(tiny(), pictures, stored, **DEFAULTS | {"share": 1.0})
        half = offline(tiny(), pictures, stored, **DEFAULTS)
        for pair, own in old.items():
            assert torch.allclose(own, stored[pair].double(), atol=1e-4)
            if CLASSES[pair[1]] != "cat":
                assert (own - new[pair]).abs().max() > 0.1
                smaller = (half[pair] - own).abs().sum(), (half[pair] - new[pair]).abs().sum()
                assert max(smaller) < (own - new[pair]).abs().sum()

    def test_the_length_and_what_all_features_share_do_not_matter_but_the_direction_does(self):
        """A patch of one kind gets the map of its kind, whatever all have in common."""
        kinds = torch.eye(3, 8, dtype=torch.float64)
        places = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 2]])
        shared = torch.full((8,), 3.0, dtype=torch.float64)
        maps = torch.zeros(2, 2, 2, 4, dtype=torch.float64)
        maps[:, 0, 0, 0], maps[:, 1, 0, 2] = 1, 1  # of what is of kind 0 and 1 one place is known
        f = (kinds[places] + shared).permute(2, 0, 1).expand(2, -1, -1, -1)
        results = []
        for factor in (1.0, 7.0):
            rows, exist, means = instances(factor * f, maps, 0.5)
            known = cluster(rows.transpose(0, 1), exist.T, means.mean(dim=0), 4)
            results.append(prototype_aware(factor * f, maps, known, threshold=0.5, neighbours=4, gamma=None)[0])
        assert torch.allclose(results[0], results[1], atol=1e-9)
        for n in (0, 1):
            assert torch.allclose(results[0][:, n][:, places == n], torch.ones(1, dtype=torch.float64), atol=1e-4)
            assert (results[0][:, n][:, places != n] < 0.2).all()


class TestBank:
    @pytest.mark.parametrize("bank", [1, 2, 3, 4, 5, 1000])
    def test_pairs_against_a_loop(self, bank):
        tags = np.random.default_rng(bank).integers(0, 2, (23, 4)).astype(np.uint8)
        tags[:, 3] = 0
        found = in_the_bank(tags, bank)
        assert set(zip(*(x.tolist() for x in np.nonzero(found)), strict=True)) == loop_bank(tags.tolist(), bank)
        assert (found.sum(axis=0) == np.minimum(tags.sum(axis=0), bank)).all() and not (found & (tags == 0)).any()

    def test_it_is_spread_over_the_training_set(self):
        found = np.flatnonzero(in_the_bank(np.ones((1000, 1), dtype=np.uint8), 10)[:, 0])
        assert found.tolist() == list(range(0, 1000, 100))


class TestFeatures:
    def test_patches_against_a_loop(self):
        clip, pixels = tiny(), images(1, (27, 35))[0]
        found = features(clip, pixels)[0]
        assert found.shape == (16, 4, 5)
        for (y, x), expected in loop_patches(clip, pixels, (4, 5)).items():
            assert torch.allclose(found[:, y, x] / found[:, y, x].norm(), expected, atol=1e-10)

    def test_their_mean_is_what_clip_compares_with_texts(self):
        clip, pixels = tiny(), images(1, (32, 32))
        mean = features(clip, pixels[0]).mean(dim=(2, 3))
        entering, _ = clip.before_last(clip.tokens(pixels, (4, 4)), keep=0)
        embedded = clip.embedding(clip.last(entering, clip.enter(entering))[0])
        assert torch.allclose(mean / mean.norm(), embedded, atol=1e-10)

    def test_of_normalised_images(self):
        clip = tiny(dtype=torch.float32)
        pixels = (images(2, (60, 44), dtype=torch.float32) * 255).round().to(torch.uint8)
        found = patch_features(clip, normalise(pixels), 40)
        assert found.shape == (2, 16, 5, 4) and not found.requires_grad
        for own, one in zip(found, pixels, strict=True):
            assert torch.allclose(own, features(clip, one / 255, longest=40)[0], atol=1e-5)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Settings of a tiny CLIP in a file."""
    import json

    import open_clip

    root = tmp_path_factory.mktemp("clip")
    (root / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(root)
    save_file(tiny(dtype=torch.float32).model.state_dict(), root / "tiny.safetensors")
    return {"name": NAME, "weights": str(root / "tiny.safetensors")}


class Killed(Exception):
    pass


class Data:
    """A data set in memory that kills whoever reads more than so many images."""

    classes = CLASSES

    def __init__(self, reads=10**9):
        self.reads = reads
        pixels = [(images(1, size, seed=b)[0] * 255).round().byte() for b, size in enumerate(SIZES)]
        self.pixels = [one.permute(1, 2, 0).contiguous().numpy() for one in pixels]

    def split(self, name):
        return Samples([f"a/{b}.x" for b in range(len(SIZES))], TAGS, self.image)

    def image(self, index):
        self.reads -= 1
        if self.reads < 0:
            raise Killed
        return self.pixels[index]


@pytest.fixture
def host(network, tmp_path):
    """A folder as clip_es leaves it."""
    folder, stored = tmp_path / "clip_es", drawn()
    write_json_in(folder, {"settings": {"clip": network, "longest": 36}})
    for b, name in enumerate(Data().split("train").names):
        classes = np.flatnonzero(TAGS[b]).astype(np.int64)
        maps = np.zeros((0, *map_size(SIZES[b])), np.float16)
        if len(classes):
            maps = np.stack([stored[b, int(n)].numpy() for n in classes])
        write_maps(map_path(folder, name), Maps(classes, maps, SIZES[b], np.full(4, b, np.float32)))
    return folder


def write_json_in(folder, value):
    folder.mkdir()
    write_json(folder / MANIFEST, value)


def run(out, host, *, data=None, **settings):
    pacam(Context(out, data or Data(), Devices("cpu"), workers=0), of=host, **settings)
    return {name: map_path(out, name).read_bytes() for name in Data().split("train").names}


class TestStage:
    def test_maps_of_every_image_against_loops(self, host, network, tmp_path):
        settings = DEFAULTS | {"prototypes": 2, "neighbours": 2, "bank": 4}
        run(tmp_path / "out", host, **settings)
        clip, data = load_clip(CLIPSettings(**network)), Data()
        pixels = [torch.from_numpy(one).permute(2, 0, 1) / 255 for one in data.pixels]
        stored = {pair: own.float() for pair, own in drawn().items()}
        expected = loop_pacam(clip, pixels, TAGS.tolist(), stored, longest=36, **settings)
        for b, name in enumerate(data.split("train").names):
            maps = read_maps(map_path(tmp_path / "out", name))
            assert maps.classes.tolist() == np.flatnonzero(TAGS[b]).tolist()
            assert maps.size == SIZES[b] and maps.maps.dtype == np.float16 and (maps.logits == b).all()
            assert maps.maps.shape == (int(TAGS[b].sum()), *map_size(SIZES[b]))
            for own, n in zip(maps.maps, maps.classes.tolist(), strict=True):
                assert np.allclose(own, expected[b, n], atol=2e-3), (b, n)
        only = read_maps(map_path(tmp_path / "out", "a/2.x")).maps[1]
        assert np.array_equal(only, drawn()[2, 2].numpy())  # of a class with one image: as it was

    def test_what_is_kept(self, host, tmp_path):
        run(tmp_path / "out", host, prototypes=3)
        known = load_file(tmp_path / "out" / BANK)
        assert {name: tuple(x.shape) for name, x in known.items()} == {
            "contexts": (4, 3, 16), "found": (4, 3), "shift": (4, 16), "mean": (16,),
        }  # fmt: skip
        assert known["found"].sum(dim=1).tolist() == [3, 3, 0, 0]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [BANK, "maps"]

    def test_batches_do_not_matter(self, host, tmp_path):
        for batch in (1, 2, 7):
            run(tmp_path / str(batch), host, prototypes=2, batch=batch)
        for name in Data().split("train").names:
            one, *others = (read_maps(map_path(tmp_path / str(batch), name)).maps for batch in (1, 2, 7))
            for other in others:
                assert np.allclose(one, other, atol=1e-3)

    @pytest.mark.parametrize(
        ("reads", "there"),  # files of instance prototypes, their clusters, maps
        [(1, (False, False, False)), (4, (True, False, False)), (6, (False, True, False)), (11, (False, True, True))],
    )
    def test_a_run_that_was_killed_ends_as_if_it_had_not_been(self, reads, there, host, tmp_path):
        whole = run(tmp_path / "whole", host, prototypes=2, batch=2)
        with pytest.raises(Killed):
            run(tmp_path / "out", host, data=Data(reads), prototypes=2, batch=2)
        first, second = ([*(tmp_path / "out").rglob(f"*/{ending}")] for ending in ("*.safetensors", "*.npz"))
        assert (bool(first), (tmp_path / "out" / BANK).exists(), bool(second)) == there and len(second) < len(SIZES)
        times = {path: path.stat().st_mtime_ns for path in second}
        assert run(tmp_path / "out", host, prototypes=2, batch=2) == whole
        assert (tmp_path / "out" / BANK).read_bytes() == (tmp_path / "whole" / BANK).read_bytes()
        assert not (tmp_path / "out" / INSTANCES).exists()
        assert all(path.stat().st_mtime_ns == time for path, time in times.items())  # nothing is done twice

    def test_a_map_that_is_not_there_is_one_line(self, host, tmp_path):
        map_path(host, "a/4.x").unlink()
        with pytest.raises(UserError, match=r"a/4\.x\.npz: no maps of this image"):
            run(tmp_path / "out", host)

    def test_masks_are_made_of_them(self, host, tmp_path):
        run(tmp_path / "out", host)
        labels(
            Context(tmp_path / "labels", Data(), Devices("cpu"), workers=0), of=tmp_path / "out",
            background=Background(alpha=1),
        )  # fmt: skip
        mask = read_mask(mask_path(tmp_path / "labels", "a/1.x"), len(CLASSES))
        assert mask.shape == SIZES[1] and set(np.unique(mask)) <= {0, 1, 2} and mask.any()

    def test_the_network_is_looked_for_before_anything_runs(self, network):
        host = SimpleNamespace(settings={"clip": network})
        check_pacam(Data(), SimpleNamespace(inputs={"of": host}))
        host.settings = {"clip": network | {"weights": "nowhere.safetensors"}}
        with pytest.raises(UserError, match=r"clip\.weights: no file nowhere\.safetensors"):
            check_pacam(Data(), SimpleNamespace(inputs={"of": host}))

    def test_operations(self, network):
        settings = {"clip": network, "longest": None}
        of = Stage(name="cams", kind="clip_es", version=1, settings=settings, inputs={}, data="x", files={})
        one, none = (
            Stage(name="p", kind="pacam", version=1, settings={"bank": bank}, inputs={"of": of}, data="x", files={})
            for bank in (1, 1000)
        )
        cost, more = (cost_of(stage, Data(), (32, 40)) for stage in (one, none))
        host = cost_of(of, Data(), (32, 40))
        depth, pairs = CONFIG["vision_cfg"]["layers"], int(TAGS.sum())
        block = host.flops / (depth * len(TAGS) + 2 * pairs)
        assert cost.flops == pytest.approx(block * depth * (7 + 3)) and more.flops == pytest.approx(
            block * depth * (7 + 6)
        )
        assert cost.disk == host.disk == 2 * 8 * 10 * pairs and PATCH == 8


class TestRecipes:
    @pytest.mark.parametrize("data", ["voc12", "coco14"])
    def test_beside_the_baseline(self, data):
        place = ["data.root=somewhere"]
        base, ours = (recipe.load(f"{data}-{name}", place) for name in ("cpal-baseline-clip-es", "cpal-clip-es"))
        assert {stage: given | {"of": 0} for stage, given in base.stages.items()}.items() <= {
            stage: given | {"of": 0} for stage, given in ours.stages.items()
        }.items()
        assert set(ours.stages) - set(base.stages) == {"cam-seeds", "pacam"}
        own = ["seeds", "sure-masks", "masks"]
        assert [stage for stage, given in ours.stages.items() if given.get("of") == "pacam"] == own
        assert ours.supervision == base.supervision != ()
        written = {name: x for name, x in ours.stages["pacam"].items() if name in DEFAULTS}
        assert written == DEFAULTS

    def test_numbers(self):
        found = {}
        for name in ("voc12-cpal-baseline", "voc12-cpal", "coco14-cpal-baseline", "coco14-cpal"):
            rows = recipe.load(f"{name}-clip-es", ["data.root=somewhere"]).paper.rows
            found[name] = [dataclasses.asdict(row)["expected"] for row in rows]
        assert found == {
            "voc12-cpal-baseline": [{"seeds": 70.8, "mask-quality": 75.0}, {"segmenter-quality": 73.8}],
            "voc12-cpal": [{"seeds": 71.9, "mask-quality": 75.8}, {"segmenter-quality": 74.5}],
            "coco14-cpal-baseline": [{"segmenter-quality": 45.4}],
            "coco14-cpal": [{"segmenter-quality": 46.8}],
        }

    def test_what_reads_maps_reads_these(self, tmp_path):
        """AMN, IRN, PSA, CRF and thresholds on the maps of pacam, and of clip_es."""
        net = "{name: test_resnet, weights: null}"
        text = "data: {name: scenes}\nstages:\n  clip: {do: clip_es, clip: {weights: null}}\n"
        text += "  pacam: {do: pacam, of: clip}\n"
        for host in ("clip", "pacam"):
            text += f"""
  amn-{host}: {{do: amn, of: {host}, net: {{name: amn, backbone: {net}}}, train: {{steps: 1}}}}
  maps-{host}: {{do: amn_maps, of: amn-{host}}}
  irn-{host}: {{do: irn, of: {host}, net: {{name: irnet, backbone: {net}}}, train: {{steps: 1}}}}
  walk-{host}: {{do: walk, of: irn-{host}, maps: {host}}}
  psa-{host}: {{do: psa, of: {host}, net: {{name: affinitynet, backbone: {net}}}, train: {{steps: 1}}}}
  crf-{host}: {{do: crf, of: {host}, background: {{score: 0.3}}}}
  labels-{host}: {{do: labels, of: {host}, background: {{score: 0.3}}}}
  seeds-{host}: {{do: evaluate_maps, of: {host}}}
"""
        (tmp_path / "own.yaml").write_text(text)
        stages = recipe.load(tmp_path / "own.yaml").plan("x")
        assert len(stages) == 18 and len({stage.key for stage in stages}) == 18
        (tmp_path / "own.yaml").write_text(text.replace("do: pacam, of: clip", "do: pacam, of: maps-clip"))
        with pytest.raises(UserError, match="pacam"):
            recipe.load(tmp_path / "own.yaml")
