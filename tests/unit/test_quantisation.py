"""Features in 8 bits: how far they may be from what they were."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from features.storage.column import dequantise, quantise

ROWS = arrays.arrays(
    np.float16,
    st.tuples(st.integers(0, 5), st.integers(1, 9)),
    elements=st.floats(-60000, 60000, width=16),
)


@given(ROWS)
def test_no_value_is_off_by_more_than_half_a_step_of_its_row(features: np.ndarray) -> None:
    values, scale = quantise(features)
    assert values.dtype == np.int8
    assert scale.dtype == np.float32
    exact = features.astype(np.float64)
    back = dequantise(values, scale).astype(np.float64)
    half_a_step = np.abs(exact).max(axis=1, initial=0) / 127 / 2
    rounding = np.abs(back) * 2.0**-11 + 2.0**-24  # of float16
    assert (np.abs(back - exact) <= half_a_step[:, None] * (1 + 1e-5) + rounding).all()


def test_a_row_of_zeros_stays_one() -> None:
    values, scale = quantise(np.zeros((2, 3), dtype=np.float16))
    assert not scale.any()
    assert not dequantise(values, scale).any()


def test_the_greatest_value_of_a_row_is_kept() -> None:
    features = np.array([[0.5, -4.0, 1.0]], dtype=np.float16)
    assert dequantise(*quantise(features))[0, 1] == -4
