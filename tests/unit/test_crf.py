"""The dense CRF, both back ends: against loops, against exact Gaussians, against each other; and what it refuses."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from loop_lattice import LoopCRF

from tag2mask.data.scenes import Scenes
from tag2mask.errors import UserError
from tag2mask.refine.crf import PRESETS, Bilateral, DenseCRF, Gaussian, compile_for, dense_crf
from tag2mask.refine.unary import equal_rows, unary_from_labels, unary_from_softmax

BACKENDS = ["numba", "torch"]
both = pytest.mark.parametrize("backend", BACKENDS)


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def scene(height, width):
    return Scenes(images=8, test=1, size=max(height, width, 32)).split("train").image(3)[:height, :width]


PICTURES = {
    "scene": scene,
    "noise": noise,
    "black": lambda h, w: np.zeros((h, w, 3), np.uint8),
    "constant": lambda h, w: np.full((h, w, 3), (200, 30, 99), np.uint8),
    "grey": lambda h, w: np.repeat(noise(h, w, 1) // 64 * 60, 3, axis=2),
    "one channel": lambda h, w: noise(h, w, 1),
    "many channels": lambda h, w: noise(h, w, 7),
    "fractions": lambda h, w: noise(h, w).astype(np.float64) / 7,
}


def kernels_of(preset, channels):
    near, alike = PRESETS[preset]["gaussian"], PRESETS[preset]["bilateral"]
    return [
        ((near.sxy,) * 2, near.compat),
        ((alike.sxy, alike.sxy, *[alike.srgb] * channels), alike.compat),
    ]  # fmt: skip


def energies(labels, height, width, seed=1):
    """Smooth where the image is large enough, between 0 and -log(1e-5)."""
    draws = torch.Generator().manual_seed(seed)
    coarse = 3 * torch.randn(1, labels, -(-height // 8) + 1, -(-width // 8) + 1, generator=draws)
    size = (height, width)
    scores = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=True)[0]
    return unary_from_softmax(scores.softmax(dim=0).numpy())


def agree(one, two, atol=1e-5):
    np.testing.assert_allclose(one, two, atol=atol, rtol=0)


@both
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("picture", PICTURES)
def test_marginals_equal_the_loops(picture, preset, backend):
    image = PICTURES[picture](5, 6)
    unary = energies(3, 5, 6)
    found = DenseCRF(image, **PRESETS[preset], backend=backend).from_unary(unary, steps=5)
    agree(found, LoopCRF(np.float32(image), kernels_of(preset, image.shape[2]))(unary, steps=5))


@both
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 70), (3, 3)])
def test_sizes_equal_the_loops(size, backend):
    image, unary = noise(*size), energies(2, *size)
    found = DenseCRF(image, **PRESETS["psa"], backend=backend).from_unary(unary, steps=3)
    agree(found, LoopCRF(image, kernels_of("psa", 3))(unary, steps=3))


@both
@pytest.mark.parametrize("labels", [1, 4, 5, 8, 9, 17])
def test_numbers_of_labels_equal_the_loops(labels, backend):
    image, unary = scene(4, 7), energies(labels, 4, 7)
    found = DenseCRF(image, backend=backend).from_unary(unary, steps=2)
    agree(found, LoopCRF(image, kernels_of("psa", 3))(unary, steps=2))
    agree(found.sum(axis=0), 1)


@both
@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("left_out", ["gaussian", "bilateral"])
def test_kernels_and_steps_equal_the_loops(left_out, steps, backend):
    image, unary = scene(4, 5), energies(3, 4, 5)
    near, alike = kernels_of("irn", 3)
    kept = {"gaussian": [alike], "bilateral": [near]}[left_out]
    found = DenseCRF(image, **PRESETS["irn"] | {left_out: None}, backend=backend).from_unary(unary, steps=steps)
    agree(found, LoopCRF(image, kept)(unary, steps=steps))


@pytest.mark.parametrize("picture", ["scene", "noise", "grey", "constant"])
@pytest.mark.parametrize("preset", ["psa", "irn"])
@pytest.mark.parametrize("size", [(63, 41), (448, 448)])
def test_back_ends_agree_on_whole_images(size, preset, picture):
    image, unary = PICTURES[picture](*size), energies(3, *size)
    one, two = (DenseCRF(image, **PRESETS[preset], backend=b).from_unary(unary) for b in BACKENDS)
    assert np.abs(one - two).mean() < 1e-5 and (one.argmax(axis=0) == two.argmax(axis=0)).mean() > 0.9999
    agree(one, two, atol=1e-2)  # ten steps turn the last digits of single pixels near a tie into more


@both
def test_nearly_the_exact_mean_field(backend):
    image, unary = scene(16, 16), energies(3, 16, 16)
    kernels = kernels_of("psa", 3)
    found = DenseCRF(image, backend=backend).from_unary(unary)
    exact = LoopCRF(image, kernels, exact=True)(unary)
    assert (found.argmax(axis=0) == exact.argmax(axis=0)).mean() > 0.97
    assert 1e-6 < np.abs(found - exact).mean() < 0.03


@both
@pytest.mark.parametrize("count", [21, 81])
def test_equal_labels_are_one_with_a_number(count, backend):
    image = scene(24, 20)
    first = energies(4, 24, 20)
    order = np.random.default_rng(2).permutation(count)
    unary = np.concatenate([first[:3], np.repeat(first[3:], count - 3, axis=0)])[order]
    crf = DenseCRF(image, **PRESETS["irn"], backend=backend)
    every = crf._filters.marginals(unary, np.ones(count, np.float32), 10)  # what no caller does
    grouped = crf.from_unary(unary)
    agree(grouped, every, atol=1e-6)
    by_hand = crf.from_unary(first, counts=[1, 1, 1, count - 3])
    agree(by_hand[:3], grouped[[int(np.flatnonzero(order == label)[0]) for label in range(3)]], atol=1e-6)
    agree(LoopCRF(image, kernels_of("irn", 3))(first, [1, 1, 1, count - 3], steps=2),
          crf.from_unary(first, counts=[1, 1, 1, count - 3], steps=2))  # fmt: skip


@both
def test_a_label_that_counts_zero_times_takes_no_part(backend):
    image, unary = scene(9, 8), energies(3, 9, 8)
    crf = DenseCRF(image, backend=backend)
    found = crf.from_unary(unary, counts=[1, 0, 1])
    agree(found[[0, 2]], crf.from_unary(unary[[0, 2]]))
    agree(found[1], 0)


@both
def test_labels(backend):
    image = scene(8, 9)
    labels = np.random.default_rng(3).integers(0, 3, (8, 9))
    labels[labels == 1] = 6
    crf = DenseCRF(image, **PRESETS["irn"], backend=backend)
    found = crf.from_labels(labels, 9, gt_prob=0.6)
    assert found.shape == (9, 8, 9)
    agree(found, crf.from_unary(unary_from_labels(labels, 9, gt_prob=0.6)))
    agree(found[1], found[8])
    agree(found, LoopCRF(image, kernels_of("irn", 3))(unary_from_labels(labels, 9, gt_prob=0.6)), atol=1e-4)
    three = crf.from_labels(np.where(labels == 6, 1, labels), 3)  # all of them occur
    agree(three, crf.from_unary(unary_from_labels(np.where(labels == 6, 1, labels), 3)))
    unsure = np.where(labels == 6, 255, labels)
    agree(crf.from_labels(unsure, 4, unsure=255), crf.from_unary(unary_from_labels(unsure, 4, unsure=255)))
    agree(crf.from_labels(np.full((8, 9), 255), 4, unsure=255), 1 / 4)


def test_scores_are_clipped_and_need_not_sum_to_one():
    image, scores = scene(8, 9), 3 * np.exp(-energies(3, 8, 9)) - 0.5
    crf = DenseCRF(image)
    agree(crf(scores), crf.from_unary(-np.log(np.clip(scores, 1e-5, 1))))
    agree(crf(scores, clip=0.2, steps=3), crf.from_unary(-np.log(np.clip(scores, 0.2, 1)), steps=3))
    agree(crf(torch.from_numpy(scores)), crf(scores))


def test_unary_from_labels():
    unary = unary_from_labels([[0, 2], [7, 1]], 3, gt_prob=0.7, unsure=7)
    for label in range(3):
        for y, x, own in ((0, 0, 0), (0, 1, 2), (1, 0, 7), (1, 1, 1)):
            share = 1 / 3 if own == 7 else 0.7 if own == label else 0.3 / 2
            assert unary[label, y, x] == pytest.approx(-np.log(share))
    assert unary_from_labels([0, 0], 1).tolist() == [[pytest.approx(-np.log(0.7))] * 2]


def test_equal_rows_looks_at_every_value():
    rows = np.zeros((5, 100, 100), np.float32)
    rows[1, 3, 77] = 1e-7
    rows[3] = rows[1]
    rows[4] = 2
    first, group = equal_rows(rows)
    assert first == [0, 1, 4] and group.tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_batches(backend):
    images = np.stack([scene(12, 10), noise(12, 10), PICTURES["grey"](12, 10)])
    unary = np.stack([energies(4, 12, 10, seed) for seed in range(3)])
    counts = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 5]])
    found = dense_crf(torch.from_numpy(images), torch.from_numpy(unary), counts=counts, backend=backend)
    for image, own, several, expected in zip(images, unary, counts.tolist(), found.numpy(), strict=True):
        agree(expected, DenseCRF(image).from_unary(own, counts=several), atol=1e-4)
    plain = dense_crf(torch.from_numpy(images), torch.from_numpy(unary), backend=backend, **PRESETS["irn"])
    agree(plain[1].numpy(), DenseCRF(images[1], **PRESETS["irn"]).from_unary(unary[1]), atol=1e-4)


def test_threads_get_what_one_alone_gets():
    images = [scene(70, 66), noise(70, 66), scene(66, 70), noise(40, 90)] * 3
    jobs = [(image, energies(3, *image.shape[:2], seed)) for seed, image in enumerate(images)]

    def one(job):
        return DenseCRF(job[0]).from_unary(job[1])

    alone = [one(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(one, jobs))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_called_again_it_has_forgotten_nothing_and_kept_nothing():
    crf = DenseCRF(scene(20, 30))
    one, two = energies(2, 20, 30, 1), energies(5, 20, 30, 2)
    first = crf.from_unary(one)
    crf.from_unary(two)
    assert np.array_equal(crf.from_unary(one), first)


def test_noise_in_a_mask_goes_and_edges_stay():
    image = np.zeros((40, 50, 3), np.uint8)
    image[10:30, 15:40] = (200, 180, 30)
    truth = (image[..., 0] > 0).astype(int)
    flipped = np.random.default_rng(5).random(truth.shape) < 0.15
    found = DenseCRF(image, **PRESETS["irn"]).from_labels(np.where(flipped, 1 - truth, truth), 21).argmax(axis=0)
    assert (found == truth).mean() > 0.99


def test_without_numba_torch_does_it():
    lines = """
import sys
sys.modules["numba"] = None
import numpy as np
from tag2mask.errors import UserError
from tag2mask.refine.crf import DenseCRF, compile_for
compile_for([3])
image, scores = np.arange(60).reshape(4, 5, 3), np.linspace(0.1, 0.9, 40).reshape(2, 4, 5)
print(DenseCRF(image)(scores).sum())
try:
    DenseCRF(image, backend="numba")
except UserError as fault:
    print(fault)
"""
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    total, fault = done.stdout.splitlines()
    assert float(total) == pytest.approx(20) and "backend='torch'" in fault


def test_importing_it_does_not_import_numba():
    lines = "import sys, tag2mask.refine.crf; print('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True).stdout == "False\n"


def test_compiled_before_it_is_needed():
    compile_for([2, 5])
    from tag2mask.refine.mean_field_numba import _run, lanes

    assert {4, 8} <= {signature[9].count for signature in _run.signatures}
    assert [lanes(n) for n in (1, 4, 5, 16, 21, 30, 33, 81)] == [4, 4, 8, 16, 24, 32, 64, 96]


IMAGE, SCORES = np.zeros((4, 5, 3), np.uint8), np.full((2, 4, 5), 0.5)


@pytest.mark.parametrize(
    ("action", "word"),
    [
        (lambda: DenseCRF(None), "image"),
        (lambda: DenseCRF("cat.jpg"), "not str"),
        (lambda: DenseCRF(np.zeros((4, 5))), r"\[4, 5\]"),
        (lambda: DenseCRF(np.zeros((0, 5, 3))), r"\[0, 5, 3\]"),
        (lambda: DenseCRF(np.full((4, 5, 3), np.nan)), "NaN"),
        (lambda: DenseCRF(IMAGE, gaussian=None, bilateral=None), "no kernel"),
        (lambda: DenseCRF(IMAGE, gaussian=Gaussian(sxy=0)), "sxy 0"),
        (lambda: DenseCRF(IMAGE, bilateral=Bilateral(srgb=-1)), "srgb -1"),
        (lambda: DenseCRF(IMAGE, bilateral=Bilateral(compat=float("nan"))), "compat"),
        (lambda: DenseCRF(IMAGE)(np.zeros((2, 5, 4))), "5 x 4 pixels for an image of 4 x 5"),
        (lambda: DenseCRF(IMAGE)(np.zeros((0, 4, 5))), "at least one label"),
        (lambda: DenseCRF(IMAGE)([]), "at least one label"),
        (lambda: DenseCRF(IMAGE)(np.where(SCORES, np.nan, 0)), "NaN"),
        (lambda: DenseCRF(IMAGE).from_unary(np.where(SCORES, np.inf, 0)), "NaN"),
        (lambda: DenseCRF(IMAGE)(SCORES, steps=-1), "steps"),
        (lambda: DenseCRF(IMAGE)(SCORES, counts=[1]), "counts"),
        (lambda: DenseCRF(IMAGE)(SCORES, counts=[0, 0]), "counts"),
        (lambda: DenseCRF(IMAGE).from_labels(np.full((4, 5), 3), 3), "label 3"),
        (lambda: DenseCRF(IMAGE).from_labels(np.full((4, 5), -1), 3), "label -1"),
        (lambda: DenseCRF(IMAGE).from_labels(np.zeros((4, 5)), 3), "integers"),
        (lambda: DenseCRF(IMAGE).from_labels(np.zeros((4, 4), int), 3), "4 x 4"),
        (lambda: DenseCRF(IMAGE).from_labels(np.zeros((4, 5), int), 0), "count"),
        (lambda: unary_from_labels(np.zeros((4, 5), int), 2, gt_prob=1.0), "gt_prob"),
        (lambda: dense_crf(torch.zeros(2, 4, 5, 3), torch.zeros(1, 2, 4, 5)), "do not fit"),
        (lambda: dense_crf(torch.zeros(1, 3, 4, 5), torch.zeros(1, 2, 4, 5)), "do not fit"),
        (lambda: dense_crf(torch.zeros(1, 4, 5, 3), torch.zeros(1, 2, 4, 5), counts=torch.ones(2, 2)), "counts"),
        (lambda: dense_crf(torch.zeros(1, 4, 5, 3), torch.full((1, 2, 4, 5), torch.nan), backend="torch"), "NaN"),
    ],
)
def test_bad_input_is_one_line(action, word):
    with pytest.raises(UserError, match=word) as fault:
        action()
    assert "\n" not in str(fault.value) and str(fault.value).startswith("crf: ")
