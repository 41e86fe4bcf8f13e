"""Maps of classes by sample index, packed into few bits."""

import copy
import multiprocessing
from pathlib import Path

import pytest
import torch

from lightning_reg.engine.data.maps import MapMemory
from lightning_reg.engine.data.shared_maps import SharedMapMemory


def maps(count, height, width, classes):
    return (torch.arange(count * height * width) * 7 % classes).reshape(count, height, width)


@pytest.mark.parametrize(("classes", "size"), [(2, 2), (3, 4), (4, 4), (5, 8), (16, 8), (17, 15), (256, 15)])
def test_what_is_written_is_read_and_takes_as_many_bits_as_needed(classes, size):
    memory, rows = MapMemory(4, classes), maps(2, 3, 5, classes)
    memory.write(torch.tensor([3, 0]), rows)
    given = torch.full((3, 3, 5), 9)
    found = memory.read(torch.tensor([0, 1, 3]), given)
    assert found.dtype == given.dtype
    assert torch.equal(found, torch.stack([rows[1], given[1], rows[0]]))
    assert torch.equal(memory.map_of(3), rows[0])
    assert memory.map_of(1) is None
    assert memory.indices.tolist() == [0, 3]
    assert len(memory.state_dict()["values"]) == 2 * size


def test_a_thousand_masks_take_63_megabytes():
    memory = MapMemory(1000, 21)
    memory.write(torch.arange(10), torch.zeros(10, 250, 250, dtype=torch.long))
    per_mask = len(memory.state_dict()["values"]) / 10
    assert 1000 * per_mask == 62_500_000


def test_maps_of_different_sizes():
    memory = MapMemory(3, 3)
    small, wide = maps(1, 2, 2, 3), maps(1, 3, 7, 3)
    memory.write(torch.tensor([0]), small)
    memory.write(torch.tensor([2]), wide)
    memory.write(torch.tensor([0]), 2 - small)
    assert torch.equal(memory.map_of(0), 2 - small[0])
    assert torch.equal(memory.map_of(2), wide[0])
    with pytest.raises(ValueError, match=r"mask of sample 0 was \(2, 2\) and is \(3, 7\) now"):
        memory.read(torch.tensor([0]), wide)
    with pytest.raises(ValueError, match=r"mask of sample 2 was \(3, 7\) and is \(2, 2\) now"):
        memory.write(torch.tensor([2]), small)


def test_the_last_of_several_stays():
    memory, rows = MapMemory(5, 7), maps(3, 2, 3, 7)
    memory.write(torch.tensor([4, 1, 4]), rows)
    assert torch.equal(memory.map_of(4), rows[2])
    assert torch.equal(memory.map_of(1), rows[1])


def test_state_does_not_depend_on_the_order_of_writing():
    one, two, rows = MapMemory(5, 7), MapMemory(5, 7), maps(2, 2, 3, 7)
    one.write(torch.tensor([4, 1]), rows)
    two.write(torch.tensor([1]), rows[1:])
    two.write(torch.tensor([4]), rows[:1])
    for name, value in one.state_dict().items():
        assert torch.as_tensor(value).equal(torch.as_tensor(two.state_dict()[name]))
    three = MapMemory(5, 7)
    three.load_state_dict(one.state_dict())
    assert torch.equal(three.read(torch.tensor([1, 4]), rows), rows.flip(0))
    assert three.nbytes == 2 * 3 + 5 * 24
    with pytest.raises(ValueError, match="maps of 5 samples and 7 classes, this run 6 and 7"):
        MapMemory(6, 7).load_state_dict(one.state_dict())


def test_nothing_is_nothing():
    memory, given = MapMemory(2, 2), maps(2, 2, 2, 2)
    assert memory.read(torch.tensor([0, 1]), given) is given
    memory.write(torch.empty(0, dtype=torch.int64), given[:0])
    memory.gather(torch.device("cpu"))
    assert memory.indices.tolist() == []
    memory.load_state_dict(memory.state_dict())
    assert memory.map_of(0) is None


def test_misuse_is_told():
    with pytest.raises(ValueError, match="256 classes, got 257"):
        MapMemory(1, 257)
    with pytest.raises(IndexError, match="from 0 to 1"):
        MapMemory(2, 2).read(torch.tensor([2]), maps(1, 2, 2, 2))
    with pytest.raises(IndexError, match="from 0 to 1"):
        MapMemory(2, 2).write(torch.tensor([-1]), maps(1, 2, 2, 2))


# -- shared with workers ----------------------------------------------------------------------------------------------


def in_another_process(memory, index, found):
    found.put(memory.map_of(index).tolist())


def test_another_process_reads_what_is_written_later():
    memory, rows = SharedMapMemory(4, 5, 6), maps(2, 2, 3, 5)
    twin = SharedMapMemory.__new__(SharedMapMemory)
    twin.__setstate__(memory.__getstate__() | {"_process": -1})  # as it comes to a worker
    assert not twin.is_ours
    memory.write(torch.tensor([3, 1]), rows)
    assert torch.equal(twin.map_of(3), rows[0])
    assert torch.equal(twin.map_of(1), rows[1])
    assert memory.nbytes == 2 * 3 + 4 * 24
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    worker = context.Process(target=in_another_process, args=(memory, 3, found))
    worker.start()
    assert found.get() == rows[0].tolist()
    worker.join()
    assert Path(memory._path).exists()


def test_a_copy_in_the_same_process_is_apart():
    memory, rows = SharedMapMemory(3, 3, 4), maps(2, 2, 2, 3)
    memory.write(torch.tensor([2]), rows[:1])
    twin = copy.deepcopy(memory)
    twin.write(torch.tensor([0]), rows[1:])
    twin.write(torch.tensor([2]), 2 - rows[:1])
    assert memory.indices.tolist() == [2]
    assert torch.equal(memory.map_of(2), rows[0])
    assert torch.equal(twin.map_of(2), 2 - rows[0])
    paths = [Path(memory._path), Path(twin._path)]
    del memory, twin
    assert not any(path.exists() for path in paths)


def test_shared_maps_save_and_load_as_others_and_refuse_what_is_too_large():
    memory, rows = SharedMapMemory(3, 3, 6), maps(2, 2, 3, 3)
    memory.write(torch.tensor([2, 0]), rows)
    other = MapMemory(3, 3)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.map_of(2), rows[0])
    memory.clear()
    assert memory.indices.tolist() == []
    memory.load_state_dict(other.state_dict())
    assert torch.equal(memory.map_of(0), rows[1])
    with pytest.raises(ValueError, match="room for maps of 6 pixels each, and some are larger"):
        memory.write(torch.tensor([1]), maps(1, 4, 9, 3))
