import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadist.core.keys import SPLITS, TaskKey, generator

LARGEST = 2**64 - 1
KEY = TaskKey(run_seed=7, split="val", step=812, task=31)


def philox(counter, key):
    """Philox4x64-10 of one block, as its authors define it (Salmon et al. 2011, sec. 3.3 and table 2)."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b = (second >> 64) ^ b ^ k0, second & LARGEST
        c, d = (first >> 64) ^ d ^ k1, first & LARGEST
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & LARGEST, (k1 + 0xBB67AE8584CAA73B) & LARGEST
    return [a, b, c, d]


def first_numbers(key, count=8):
    return generator(key).bit_generator.random_raw(count).tolist()


def counter_of(bit_generator):
    words = bit_generator.state["state"]["counter"]
    return sum(int(word) << (64 * place) for place, word in enumerate(words))


def test_the_cipher_of_these_tests_is_the_authors_cipher():
    # Known answers of the authors' library Random123 (kat_vectors, philox4x64 10 rounds): all zeros, all ones.
    assert philox([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    assert philox([LARGEST] * 4, [LARGEST] * 2) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


@pytest.mark.parametrize(
    "key",
    [
        TaskKey(0, "train", 0, 0),
        KEY,
        TaskKey(2**63 - 1, "test", 10**12, 10**9),
        TaskKey(LARGEST, "test", LARGEST, LARGEST),
    ],
)
def test_numbers_are_philox_of_seed_and_split_at_task_and_step(key):
    # NumPy counts up before each block, so the first block of a task has the counter (1, 0, task, step).
    cipher_key = [key.run_seed, {"train": 0, "val": 1, "test": 2}[key.split]]
    blocks = [philox([block, 0, key.task, key.step], cipher_key) for block in (1, 2)]
    assert first_numbers(key) == blocks[0] + blocks[1]


def test_the_same_key_gives_the_same_numbers_whatever_was_drawn_before():
    expected = generator(KEY).standard_normal(50)
    generator(KEY._replace(task=32)).random(1000)
    np.random.default_rng(0).random(10)
    assert generator(KEY).standard_normal(50).tobytes() == expected.tobytes()


@pytest.mark.parametrize("change", [{"run_seed": 8}, {"split": "test"}, {"step": 813}, {"task": 32}])
def test_another_value_in_any_field_gives_other_numbers(change):
    # Two independent streams of 8 words share one of them with probability 64 / 2**64.
    assert not set(first_numbers(KEY)) & set(first_numbers(KEY._replace(**change)))


def test_step_and_task_do_not_stand_for_each_other():
    swapped = KEY._replace(step=KEY.task, task=KEY.step)
    assert not set(first_numbers(KEY)) & set(first_numbers(swapped))


fields = st.tuples(
    st.integers(0, LARGEST), st.sampled_from(SPLITS), st.integers(0, LARGEST), st.integers(0, LARGEST)
).map(lambda values: TaskKey(*values))
near = st.tuples(st.integers(0, 2), st.sampled_from(SPLITS), st.integers(0, 2), st.integers(0, 2)).map(
    lambda values: TaskKey(*values)
)


@given(st.one_of(st.tuples(fields, fields), st.tuples(near, near)))
def test_keys_share_a_cipher_state_only_where_they_are_equal(keys):
    def start(key):
        bits = generator(key).bit_generator
        return bits.state["state"]["key"].tolist(), counter_of(bits)

    first, second = map(start, keys)
    assert (first == second) == (keys[0] == keys[1])
    if first[0] == second[0] and keys[0] != keys[1]:
        # One stream: the distance says how many blocks the earlier task may draw before it meets the later.
        assert abs(first[1] - second[1]) >= 2**128


def test_a_task_meets_the_next_one_only_after_two_to_the_128_blocks():
    bits = generator(KEY).bit_generator
    bits.advance(2**128)
    assert counter_of(bits) == counter_of(generator(KEY._replace(task=KEY.task + 1)).bit_generator)


def test_a_step_meets_the_next_one_only_after_all_its_tasks():
    bits = generator(KEY._replace(task=LARGEST)).bit_generator
    bits.advance(2**128)
    assert counter_of(bits) == counter_of(generator(KEY._replace(step=KEY.step + 1, task=0)).bit_generator)


@pytest.mark.parametrize("change", [{"run_seed": -1}, {"task": LARGEST + 1}, {"step": LARGEST + 1}, {"step": -1}])
def test_values_beyond_64_bits_are_refused_and_do_not_wrap_around(change):
    with pytest.raises(OverflowError):
        generator(KEY._replace(**change))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="not in"):
        generator(KEY._replace(split="dev"))


def test_a_key_in_an_error_message_says_all_of_its_fields():
    assert str(KEY) == "val/seed=7/step=812/task=31"
