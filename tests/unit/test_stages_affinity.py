"""From soft maps to an affinity network and to maps that have walked: stages against one image at a time."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loop_affinity import dense_transitions, edge_affinity, feature_affinity, loop_pairs, loop_walk

from tag2mask.data.augment import Augment, normalise
from tag2mask.data.images import read_mask
from tag2mask.data.maps import Maps, map_path, map_size, read_maps, write_maps
from tag2mask.data.source import Samples
from tag2mask.engine import Devices, Training
from tag2mask.errors import Interrupted, UserError
from tag2mask.ops.cams import to_mask
from tag2mask.pipeline import Stage
from tag2mask.recipe import load
from tag2mask.refine.irn import confident_labels as irn_labels
from tag2mask.refine.irn import edges
from tag2mask.refine.psa import confident_labels as psa_labels
from tag2mask.runner import Options, run
from tag2mask.stages.affinity import check_irn, check_psa, irn, load_affinity, psa
from tag2mask.stages.classify import MODEL, WEIGHTS
from tag2mask.stages.context import Context
from tag2mask.stages.walk import WalkingBackground, against_last, of_largest, walk

BACKBONE = {"name": "test_resnet", "weights": None, "output_stride": 8}
PSA_NET = {"name": "affinitynet", "backbone": BACKBONE, "radius": 3, "border": "all"}
IRN_NET = {
    "name": "irnet", "backbone": BACKBONE, "freeze": False, "radius": 3, "border": "all", "displacement": False,
}  # fmt: skip
SIZES = [(40, 48), (33, 20), (40, 48), (5, 29), (40, 48), (33, 20)]
TAGS = np.array([[1, 0], [1, 1], [0, 0], [0, 1], [1, 0], [1, 1]], np.uint8)
TRAIN = {"train": Training(steps=4, batch=2, lr=0.001), "augment": Augment(crop=32, long=(32, 40))}


class Source:
    """Six noisy images of three sizes, two classes, one untagged image."""

    classes, fingerprint = ("a", "b"), "f"

    def __init__(self):
        self.read = []

    def image(self, index):
        self.read.append(index)
        return np.random.default_rng(index).integers(0, 256, (*SIZES[index], 3), dtype=np.uint8)

    def split(self, name):
        return Samples([f"sub/{i}" for i in range(len(SIZES))], TAGS, self.image)


class Dying(Source):
    """One that stops the run when an image has been read so often."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def image(self, index):
        if len(self.read) == self.after:
            raise Interrupted(75)
        return super().image(index)


@pytest.fixture(scope="module")
def devices():
    return Devices("cpu")


@pytest.fixture
def maps(tmp_path):
    """The folder of a cams stage."""
    for index, size in enumerate(SIZES):
        classes = np.flatnonzero(TAGS[index])
        values = np.random.default_rng(100 + index).random((len(classes), *map_size(size))).astype(np.float16)
        stored = Maps(classes, values, size, np.array([0.5, index], np.float32))
        write_maps(map_path(tmp_path / "cams", f"sub/{index}"), stored)
    return tmp_path / "cams"


def context(out, devices, source=None, workers=0):
    out.mkdir(exist_ok=True)
    return Context(out, source or Source(), devices, workers=workers, save_every=2)


def train(kind, out, devices, maps, source=None, workers=0, **settings):
    function, net = {"psa": (psa, PSA_NET), "irn": (irn, IRN_NET)}[kind]
    function(context(out, devices, source, workers), of=maps, net=net, **(TRAIN | settings))


@pytest.mark.parametrize("kind", ["psa", "irn"])
class TestTraining:
    def test_trains_stores_and_reads(self, kind, tmp_path, devices, maps):
        out = tmp_path / "net"
        train(kind, out, devices, maps)
        assert sorted(p.name for p in out.iterdir()) == ["labels", MODEL, WEIGHTS, "train.jsonl"]
        rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
        assert set(rows[-1]) >= {"background", "foreground", "different", "total"}
        net = load_affinity(out)
        assert not net.training
        assert net(torch.randn(1, 3, 33, 50)).isfinite().all()

    def test_the_labels_are_those_of_each_image(self, kind, tmp_path, devices, maps):
        settings = {"psa": {"alpha_low": 1.0, "alpha_high": 3.0}, "irn": {"foreground": 0.6, "background": 0.2}}[kind]
        train(kind, tmp_path / "net", devices, maps, workers=1, **settings)
        for index in range(len(SIZES)):
            stored = read_maps(map_path(maps, f"sub/{index}"))
            arguments = Source().image(index), stored.full(), torch.from_numpy(stored.classes)
            if kind == "psa":
                expected = psa_labels(*arguments, low=1.0, high=3.0)
            else:
                expected = irn_labels(*arguments, foreground=0.6, background=0.2)
            assert np.array_equal(read_mask(tmp_path / f"net/labels/sub/{index}.png", 2), expected)
        assert not read_mask(tmp_path / "net/labels/sub/2.png", 2).any()  # untagged: all background

    @pytest.mark.parametrize("after", [4, 12])  # while labels are made; in step 3, after the checkpoint of step 2
    def test_a_killed_run_ends_bit_identically(self, kind, after, tmp_path, devices, maps):
        train(kind, tmp_path / "whole", devices, maps)
        with pytest.raises(Interrupted):
            train(kind, tmp_path / "killed", devices, maps, Dying(after))
        assert not (tmp_path / "killed" / WEIGHTS).exists()
        resumed = Source()
        train(kind, tmp_path / "killed", devices, maps, resumed)
        assert len(resumed.read) == {4: 2 + 8, 12: 4}[after]
        for name in (WEIGHTS, "labels/sub/1.png", "labels/sub/5.png"):
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    def test_a_finished_training_is_left_alone(self, kind, tmp_path, devices, maps):
        train(kind, tmp_path / "net", devices, maps)
        again = Source()
        train(kind, tmp_path / "net", devices, maps, again)
        assert again.read == []

    def faulty(self, fault, maps):
        path = map_path(maps, "sub/1")
        stored = read_maps(path)
        match fault:
            case "missing":
                path.unlink()
            case "damaged":
                path.write_bytes(path.read_bytes()[:50])
            case "of another size":
                write_maps(path, Maps(stored.classes, stored.maps, (33, 21), stored.logits))
            case "not finite":
                stored.maps[0, 2, 2] = np.nan
                write_maps(path, stored)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("missing", "no maps of this image"),
            ("damaged", "not a file of soft maps"),
            ("of another size", r"made of 33 x 21 pixels, the image has 33 x 20; delete"),
            ("not finite", "has values that are not finite; delete"),
        ],
    )
    def test_faulty_maps_are_one_line(self, kind, fault, message, tmp_path, devices, maps):
        train(kind, tmp_path / "net", devices, maps)
        self.faulty(fault, maps)
        with pytest.raises(UserError, match=message) as caught:
            train(kind, tmp_path / "other", devices, maps)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=message) as caught:
            walk(context(tmp_path / "walk", devices), of=tmp_path / "net", maps=maps)
        assert "\n" not in str(caught.value)


class TestPreflight:
    def check(self, kind, net=None, **settings):
        base = {
            "psa": {"net": PSA_NET, "alpha_low": 4.0, "alpha_high": 32.0},
            "irn": {"net": IRN_NET, "foreground": 0.3, "background": 0.05},
        }[kind]
        base = base | {"augment": {"crop": 96}} | settings
        base["net"] = base["net"] | (net or {})
        (check_psa if kind == "psa" else check_irn)(Source(), Stage(kind, kind, 1, base, {}, "data"))

    def test_what_works(self):
        self.check("psa")
        self.check("irn")

    @pytest.mark.parametrize(
        ("kind", "faults", "message"),
        [
            ("psa", {"net": {"backbone": BACKBONE | {"name": "test_resent"}}}, "timm has no model"),
            ("irn", {"net": {"backbone": BACKBONE | {"name": "test_resent"}}}, "timm has no model"),
            ("psa", {"net": {"radius": 1}}, "^radius: 1 leaves no pairs"),
            ("irn", {"net": {"radius": 1}}, "^radius: 1 leaves no pairs"),
            ("psa", {"alpha_low": 40.0}, r"^alpha_low 40\.0, alpha_high 32\.0"),
            ("irn", {"background": 0.4}, r"^foreground 0\.3, background 0\.4"),
            ("irn", {"net": {"freeze": True}}, r"^net\.freeze: a backbone from scratch has to learn"),
            ("psa", {"augment": {"crop": 8}}, r"^augment\.crop: 8 pixels are 1 cells, too few for pairs; take 56"),
            ("psa", {"augment": {"crop": 16}, "net": {"border": "psa"}}, r"^augment\.crop: 16 pixels are 2 cells"),
        ],
    )
    def test_what_does_not(self, kind, faults, message):
        with pytest.raises(UserError, match=message) as caught:
            self.check(kind, **faults)
        assert "\n" not in str(caught.value)


@pytest.fixture
def trained(tmp_path, devices, maps):
    """{"psa": folder, "irn": folder} after a few steps."""
    for kind in ("psa", "irn"):
        train(kind, tmp_path / kind, devices, maps)
    return {kind: tmp_path / kind for kind in ("psa", "irn")}


def loop_walked(kind, folder, maps, index, *, beta, steps, background, radius):
    """The maps [P h w] of one image after the walk, every pair and every step."""
    net, image = load_affinity(folder), normalise(torch.from_numpy(Source().image(index)).permute(2, 0, 1))
    stored = read_maps(map_path(maps, f"sub/{index}"))
    start = torch.from_numpy(stored.maps).double()
    if background.alpha is not None:
        start = torch.cat([(1 - start.amax(dim=0, keepdim=True)) ** background.alpha, start])
    elif background.score is not None:
        start = torch.cat([torch.full_like(start[:1], background.score), start])
    height, width = start.shape[1:]
    if kind == "psa":
        features = net(image[None])[0].detach().double()
        listed = [(i, j, feature_affinity(features, i, j)) for i, j in loop_pairs(features.shape[1:], net.radius)]
        size, coarse = features.shape[1:], torch.zeros(len(start), *features.shape[1:], dtype=torch.float64)
        for y in range(height):
            for x in range(width):
                coarse[:, y // 2, x // 2] += start[:, y, x] / 4
        walked = loop_walk(coarse, dense_transitions(listed, size, beta)[0], steps)
        walked = F.interpolate(walked[None], scale_factor=2, mode="bilinear", align_corners=False)[0]
        walked = walked[:, :height, :width]
    else:
        edge = edges(net, image[None])[0].double()
        listed = [(i, j, edge_affinity(edge, i, j)) for i, j in loop_pairs(edge.shape, radius)]
        walked = loop_walk(start * (1 - edge), dense_transitions(listed, edge.shape, beta)[0], steps)
    if len(walked) == len(stored.classes):
        return walked / (walked.max() + 1e-5)
    return walked[1:] / (walked[1:] + walked[:1])


class TestWalk:
    SETTINGS = {"beta": 2.0, "steps": 5, "radius": 3, "batch": 2}  # noqa: RUF012

    @pytest.mark.parametrize("kind", ["psa", "irn"])
    @pytest.mark.parametrize(
        "background", [WalkingBackground(), WalkingBackground(alpha=2.0), WalkingBackground(score=0.3)]
    )
    def test_against_a_loop(self, kind, background, tmp_path, devices, maps, trained):
        walk(context(tmp_path / "walk", devices), of=trained[kind], maps=maps, background=background, **self.SETTINGS)
        for index, size in enumerate(SIZES):
            found = read_maps(map_path(tmp_path / "walk", f"sub/{index}"))
            before = read_maps(map_path(maps, f"sub/{index}"))
            assert found.size == size
            assert found.maps.dtype == np.float16
            assert found.maps.shape == before.maps.shape
            assert np.array_equal(found.classes, before.classes)
            assert np.array_equal(found.logits, before.logits)
            if index in (1, 2, 3):
                if len(found.classes) == 0:
                    continue
                expected = loop_walked(
                    kind, trained[kind], maps, index, beta=2.0, steps=5, background=background, radius=3
                )
                assert np.allclose(found.maps, expected.numpy(), atol=2e-3)
                assert found.maps.min() >= 0
                assert found.maps.max() <= 1

    @pytest.mark.parametrize("kind", ["psa", "irn"])
    def test_a_killed_run_goes_on_bit_identically(self, kind, tmp_path, devices, maps, trained):
        def go(name, source=None, **more):
            walk(context(tmp_path / name, devices, source, **more), of=trained[kind], maps=maps, **self.SETTINGS)

        def bytes_of(name):
            return [map_path(tmp_path / name, f"sub/{i}").read_bytes() for i in range(len(SIZES))]

        go("whole")
        go("helped", workers=3)
        assert bytes_of("helped") == bytes_of("whole")
        with pytest.raises(Interrupted):
            go("killed", Dying(4))
        assert 0 < sum(map_path(tmp_path / "killed", f"sub/{i}").exists() for i in range(len(SIZES))) < len(SIZES)
        go("killed")
        assert bytes_of("killed") == bytes_of("whole")
        again = Source()
        go("killed", again)
        assert again.read == []

    @pytest.mark.parametrize(
        ("faulty", "message"),
        [
            ({"score": 0.3, "alpha": 4.0}, "give either"),
            ({"score": 0.0}, "score"),
            ({"score": 1.0}, "score"),
            ({"alpha": 0.0}, "alpha"),
            ({"alpha": float("inf")}, "alpha"),
        ],
    )
    def test_faults_of_the_background(self, faulty, message):
        with pytest.raises(UserError, match=message):
            WalkingBackground(**faulty)


class TestValues:
    def test_where_a_background_walks_one_half_is_its_equal(self):
        """Masks at the score 0.5 are the largest of the maps and the background (PSA), and maps keep their order."""
        rows = torch.rand(4, 30, 40)
        shares, ground = against_last(rows), rows[-1]
        expected = torch.cat([ground[None], rows[:-1]]).argmax(dim=0)
        assert torch.equal(to_mask(shares, torch.arange(3), 0.5).long(), expected)
        assert len(expected.unique()) == 4
        assert shares.amin() >= 0
        assert shares.amax() <= 1

    def test_nothing_and_no_background_is_nothing(self):
        assert torch.equal(against_last(torch.zeros(2, 1, 3)), torch.zeros(1, 1, 3))
        assert torch.equal(
            against_last(torch.tensor([[[0.2, 0.0, 0.3]], [[0.0, 0.5, -1e-9]]]))[0, 0].gt(0.5),
            torch.tensor([True, False, True]),
        )

    def test_without_one_all_maps_are_divided_by_the_largest_value(self):
        rows = torch.tensor([[[0.0, 0.2]], [[0.4, -1e-9]]])
        torch.testing.assert_close(of_largest(rows), torch.tensor([[[0.0, 0.5]], [[1.0, 0.0]]]), rtol=1e-4, atol=1e-4)
        assert not of_largest(torch.zeros(2, 1, 3)).any()


SMALL = ["data.images=16", "data.test=4", "data.size=40", "classify.train.epochs=1", "classify.augment.crop=32"]


@pytest.mark.parametrize(("name", "stage"), [("scenes-psa", "affinity"), ("scenes-irn", "boundaries")])
class TestRecipes:
    def test_runs_from_end_to_end(self, name, stage, tmp_path):
        small = [*SMALL, f"{stage}.train.epochs=1", f"{stage}.augment.crop=32", f"{stage}.net.radius=3"]
        done = run(load(name, small), tmp_path, Options("cpu", workers=0))
        assert all(s.state(tmp_path) == "done" for s in done.stages)
        result = json.loads((done.folder("mask-quality") / "result.json").read_text())
        assert 0 <= result["miou"] <= 1
        assert len(list((done.folder("walk") / "maps").rglob("*.npz"))) == 16

    def test_shares_the_classifier_of_plain_cam(self, name, stage):
        plain, other = load("scenes-cam").plan("f"), load(name).plan("f")
        assert {s.key for s in plain} < {s.key for s in other}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("walk.steps=0", "greater than or equal to 1"),
        ("walk.beta=0", "greater than 0"),
        ("walk.tol=1", "less than 1"),
        ("walk.radius=1", "greater than or equal to 2"),
        ("walk.of=cams", "cams is a cams stage, this needs psa or irn"),
        ("walk.maps=classify", "this needs cams"),
        ("walk.background.alfa=3", r"did you mean alpha\?"),
    ],
)
def test_wrong_settings_are_one_line(setting, message):
    with pytest.raises(UserError, match=message) as caught:
        load("scenes-irn", [setting])
    assert "\n" not in str(caught.value)
