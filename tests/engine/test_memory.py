"""Rows per sample: reading, writing, the largest entries only, states; against a dictionary of rows."""

import pytest
import torch

from lightning_reg.engine.data.memory import SampleMemory, last_occurrences

G = torch.Generator().manual_seed(3)


@pytest.mark.parametrize("indices", [[7, 3, 7, 5], [0], [], [2, 2, 2], [-1, 4, -1, 4, 0], list(range(50)) * 2])
def test_last_occurrences(indices):
    expected = [max(p for p, other in enumerate(indices) if other == index) for index in indices]
    assert last_occurrences(torch.tensor(indices, dtype=torch.int64)).tolist() == expected


def test_last_occurrences_of_random_indices():
    indices = torch.randint(20, (200,), generator=G)
    expected = [max(p for p in range(200) if indices[p] == index) for index in indices]
    assert last_occurrences(indices).tolist() == expected


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("distinct", [False, True])
def test_rows_are_read_as_they_were_written(top_k, distinct):
    memory = SampleMemory(5, 3, top_k=top_k)
    memory.write(torch.tensor([3, 0]), torch.tensor([[1.0, 2.0, 0.0], [0.0, 4.0, 5.0]]), distinct=distinct)
    assert memory.read(torch.tensor([0, 1, 3, 0])).tolist() == [[0, 4, 5], [0, 0, 0], [1, 2, 0], [0, 4, 5]]
    assert memory.all().tolist() == [[0, 4, 5], [0, 0, 0], [0, 0, 0], [1, 2, 0], [0, 0, 0]]


@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
def test_many_writes_against_a_dictionary(top_k):
    memory, kept = SampleMemory(9, 4, top_k=top_k), {}
    for _ in range(20):
        indices = torch.randint(-2, 9, (6,), generator=G)
        rows = torch.rand(6, 4, generator=G)
        memory.write(indices, rows)
        for index, row in zip(indices.tolist(), rows.tolist(), strict=True):
            floor = sorted(row, reverse=True)[: top_k or 4][-1]
            kept[index] = [v if v >= floor else 0.0 for v in row]
    assert memory.all().tolist() == [kept.get(i, [0.0] * 4) for i in range(9)]


@pytest.mark.parametrize("top_k", [None, 1])
@pytest.mark.parametrize("distinct", [False, True])
def test_negative_indices_are_dropped(top_k, distinct):
    memory = SampleMemory(2, 2, top_k=top_k)
    memory.write(torch.tensor([-1, 1, -7]), torch.tensor([[5.0, 0.0], [0.0, 1.0], [9.0, 0.0]]), distinct=distinct)
    assert memory.all().tolist() == [[0, 0], [0, 1]]
    assert memory.read(torch.tensor([-1, 1])).shape == (2, 2)


@pytest.mark.parametrize("top_k", [None, 2])
def test_of_several_rows_for_a_sample_the_last_stays(top_k):
    memory = SampleMemory(3, 3, top_k=top_k)
    rows = torch.tensor([[9.0, 8.0, 0.0], [0.0, 1.0, 2.0], [0.0, 7.0, 6.0], [3.0, 0.0, 4.0]])
    memory.write(torch.tensor([1, 2, 1, 2]), rows)
    assert memory.all().tolist() == [[0, 0, 0], [0, 7, 6], [3, 0, 4]]


def test_rows_are_kept_without_gradient():
    rows = torch.ones(1, 2, requires_grad=True)
    memory = SampleMemory(1, 2)
    memory.write(torch.tensor([0]), rows)
    assert not memory.read(torch.tensor([0])).requires_grad


def test_what_is_read_is_a_copy():
    memory = SampleMemory(2, 2)
    memory.read(torch.tensor([0, 1])).fill_(7.0)
    assert memory.all().tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(("dtype", "read"), [("float16", torch.float32), ("bfloat16", torch.float32)])
@pytest.mark.parametrize("top_k", [None, 2])
def test_half_memories_round_and_read_as_float32(dtype, read, top_k):
    memory, rows = SampleMemory(4, 3, dtype=dtype, top_k=top_k), torch.rand(4, 3, generator=G)
    rows[:, 0] = 0
    memory.write(torch.arange(4), rows)
    assert memory.all().dtype == read
    assert torch.equal(memory.all(), rows.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize(("dtype", "value"), [("int32", 2**31 - 1), ("int64", 2**40)])
def test_whole_numbers_stay_whole(dtype, value):
    memory = SampleMemory(2, 1, dtype=dtype, fill=-1)
    memory.write(torch.tensor([1]), torch.tensor([[value]]))
    assert memory.all().tolist() == [[-1], [value]]
    assert memory.all().dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("options", "nbytes"),
    [
        ({}, 3 * 10 * 4),
        ({"dtype": "float16"}, 3 * 10 * 2),
        ({"top_k": 4}, 3 * 4 * (4 + 2)),
        ({"top_k": 4, "width": 2**15}, 3 * 4 * (4 + 2)),
        ({"top_k": 4, "width": 2**15 + 1}, 3 * 4 * (4 + 4)),
        ({"top_k": 10}, 3 * 10 * 4),  # as many as there are: no column numbers
    ],
)
def test_bytes_in_use(options, nbytes):
    assert SampleMemory(2, **({"width": 10} | options)).nbytes == nbytes  # and one row for what is dropped


@pytest.mark.parametrize("width", [2**15, 2**15 + 1])
def test_the_last_column_of_a_wide_memory(width):
    memory, row = SampleMemory(1, width, top_k=1), torch.zeros(1, width)
    row[0, -1] = 3.0
    memory.write(torch.tensor([0]), row)
    assert torch.equal(memory.all(), row)


@pytest.mark.parametrize("index", [3, 4])
def test_an_index_beyond_the_memory(index):
    memory = SampleMemory(3, 1)
    with pytest.raises(IndexError, match=r"^A sample index is not below num_samples=3: "):
        memory.read(torch.tensor([0, index]))
    with pytest.raises(IndexError):
        memory.write(torch.tensor([0, index]), torch.ones(2, 1))


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(("saved", "loaded"), [("float32", "float32"), ("float16", "float32"), ("float32", "float16")])
def test_state_round_trip(saved, loaded, top_k):
    memory, rows = SampleMemory(4, 3, dtype=saved, top_k=top_k), torch.randint(1, 9, (4, 3), generator=G).float()
    rows[:, 1] = 0
    memory.write(torch.arange(4), rows)
    state = memory.state_dict()
    assert state["values"].shape == (4, top_k or 3)
    other = SampleMemory(4, 3, dtype=loaded, top_k=top_k)
    other.load_state_dict(state)
    assert other.all().tolist() == rows.tolist()
    other.write(torch.arange(4), rows + 1)
    assert memory.all().tolist() == rows.tolist()  # neither shares anything with the state


def test_the_state_does_not_follow_later_writes():
    memory = SampleMemory(1, 2, top_k=1)
    state = memory.state_dict()
    memory.write(torch.tensor([0]), torch.tensor([[0.0, 5.0]]))
    assert (state["values"].tolist(), state["columns"].tolist()) == ([[0]], [[0]])


@pytest.mark.parametrize(
    ("saved", "loaded", "shapes"),
    [
        ((4, 3, None), (5, 3, None), ((4, 3), (5, 3))),
        ((4, 3, None), (4, 2, None), ((4, 3), (4, 2))),
        ((4, 3, 2), (4, 3, None), ((4, 2), (4, 3))),
        ((4, 2, None), (4, 3, 2), ((4, 2), (4, 2))),
        ((4, 3, 2), (4, 2, None), ((4, 2), (4, 2))),
        ((4, 5, 3), (4, 5, 2), ((4, 3), (4, 2))),
        ((4, 5, 2), (4, 3, 2), ((4, 2), (4, 2))),
    ],
)
def test_states_of_another_shape_are_refused(saved, loaded, shapes):
    memory, other = (SampleMemory(n, width, top_k=k) for n, width, k in (saved, loaded))
    with pytest.raises(ValueError, match="The checkpoint has rows") as raised:
        other.load_state_dict(memory.state_dict())
    assert str(raised.value) == (
        f"The checkpoint has rows {shapes[0]} of width {saved[1]}, this run {shapes[1]} of width {loaded[1]}:"
        " the training data, the number of classes or `top_k` changed."
    )
