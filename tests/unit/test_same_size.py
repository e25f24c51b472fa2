"""Images decoded ahead and batched with others of their size."""

import threading
import time

import numpy as np
import pytest

from tag2mask.data.same_size import ahead, same_size_batches


def pictures(sizes):
    def image(index):
        height, width = sizes[index]
        return np.full((height, width, 3), index % 256, np.uint8)

    return image


SIZES = {
    "one size": [(4, 5)] * 11,
    "two sizes": [(4, 5), (5, 4)] * 5 + [(4, 5)],
    "all different": [(i + 1, 3) for i in range(40)],
    "one image": [(1, 1)],
    "none": [],
}


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_every_image_comes_once_with_others_of_its_size(sizes, batch, threads):
    found = list(same_size_batches(pictures(sizes), range(len(sizes)), batch, threads))
    for indices, pixels in found:
        assert 1 <= len(indices) == len(pixels) <= batch
        for index, one in zip(indices, pixels, strict=True):
            assert np.array_equal(one, pictures(sizes)(index))
    assert sorted(i for indices, _ in found for i in indices) == list(range(len(sizes)))


def test_batches_are_full_where_there_are_enough():
    found = [indices for indices, _ in same_size_batches(pictures(SIZES["two sizes"]), range(11), 3, 2)]
    assert found == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9]]


def test_a_share_of_the_images():
    found = [indices for indices, _ in same_size_batches(pictures(SIZES["one size"]), range(1, 11, 2), 2, 0)]
    assert found == [[1, 3], [5, 7], [9]]


def test_batches_do_not_depend_on_threads():
    sizes = [(1 + i * i % 5, 2) for i in range(50)]
    lists = [[i for i, _ in same_size_batches(pictures(sizes), range(50), 4, threads)] for threads in (0, 1, 5)]
    assert lists[0] == lists[1] == lists[2]


def test_few_images_wait_when_all_sizes_differ():
    decoded = []

    def image(index):
        decoded.append(index)
        return np.zeros((index + 1, 1, 3), np.uint8)

    for finished, (indices, _) in enumerate(same_size_batches(image, range(100), 2, 0), 1):
        assert indices == [finished - 1]  # those that waited longest go first
        assert len(decoded) <= finished + 2 * 4


class TestAhead:
    def test_is_map(self):
        for threads in (0, 1, 4):
            assert list(ahead(lambda i: i * i, range(20), threads)) == [i * i for i in range(20)]
        assert list(ahead(lambda i: i, [], 3)) == []

    def test_keeps_order_when_the_first_is_slowest(self):
        def slow(i):
            time.sleep(0.02 if i == 0 else 0)
            return i

        assert list(ahead(slow, range(10), 4)) == list(range(10))

    def test_reads_a_bounded_number_ahead(self):
        taken = []

        def items():
            for i in range(100):
                taken.append(i)
                yield i

        reader = ahead(lambda i: i, items(), 3)
        assert next(reader) == 0
        assert len(taken) <= 2 * 3 + 1
        reader.close()

    def test_works_in_threads(self):
        threads = set(ahead(lambda i: threading.current_thread().name, range(4), 2))
        assert threading.current_thread().name not in threads

    def test_an_error_reaches_the_reader(self):
        def fails(i):
            if i == 3:
                raise ValueError("image 3")
            return i

        reader = ahead(fails, range(10), 2)
        assert [next(reader) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="image 3"):
            next(reader)
