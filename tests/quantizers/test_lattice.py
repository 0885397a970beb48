"""The E8 code: 2**16 points of the moved lattice, and each vector gets the nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers import LatticeCoded, LatticeFormat
from quantizers.lattice import fine_encode, fine_points, lattice_decode, lattice_encode, lattice_patterns
from quantizers.lattice_coded import NORMAL_SCALES, encode_points

ALL_CODES = torch.cartesian_prod(torch.arange(256), torch.arange(256)).to(torch.uint8)
ALL_POINTS = lattice_decode(ALL_CODES, lattice_patterns())


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def is_in_e8(points: Tensor) -> Tensor:
    whole = (points == points.round()).all(dim=1)
    half = (points - 0.5 == (points - 0.5).round()).all(dim=1)
    return (whole | half) & (points.sum(dim=1) % 2 == 0)


def test_every_code_is_another_point_of_the_moved_lattice() -> None:
    assert len(ALL_POINTS.unique(dim=0)) == 2**16
    assert is_in_e8(ALL_POINTS - 0.25).all()


def test_a_point_has_its_own_code() -> None:
    assert torch.equal(lattice_encode(ALL_POINTS), ALL_CODES)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), size=st.floats(0.1, 4.0), shift=st.floats(-2.0, 2.0))
def test_no_point_is_nearer_than_the_one_that_is_chosen(seed: int, size: float, shift: float) -> None:
    vectors = normal(4, seed) * size + shift
    chosen = (vectors - lattice_decode(lattice_encode(vectors), lattice_patterns())).double().norm(dim=1)
    nearest = torch.stack([(ALL_POINTS.double() - vector).norm(dim=1).min() for vector in vectors.double()])
    torch.testing.assert_close(chosen, nearest, rtol=1e-5, atol=1e-6)


def test_ties_and_vectors_far_out_are_coded_too() -> None:
    vectors = torch.cat([torch.zeros(1, 8), torch.full((1, 8), 1e4), -torch.full((1, 8), 1e4), torch.eye(8) * 50])
    points = lattice_decode(lattice_encode(vectors), lattice_patterns())
    assert (points.abs() <= 2.75).all()
    assert lattice_encode(torch.empty(0, 8)).shape == (0, 2)


def test_fine_points_are_the_shortest_of_e8_and_the_nearest_is_chosen() -> None:
    points = fine_points()
    assert len(points.unique(dim=0)) == 256
    assert is_in_e8(points).all()
    assert points.square().sum(dim=1).unique(return_counts=True)[1].tolist() == [1, 240, 15]  # norms 0, 2, 4
    vectors = normal(500)
    chosen = (vectors - points[fine_encode(vectors, points).long()]).norm(dim=1)
    torch.testing.assert_close(chosen, torch.cdist(vectors, points).amin(dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.0925), (3, 0.0305), (4, 0.0088)])
def test_normal_numbers_lose_what_the_docstring_says(bits: int, error: float) -> None:
    form, vectors = LatticeFormat(bits), normal(2**13, seed=9)
    errors = [
        float((vectors - form.points(encode_points(vectors * s, form), form.levels) / s).square().mean())
        for s in (NORMAL_SCALES[bits] * factor for factor in (0.9, 1.0, 1.1))
    ]
    alike = LatticeCoded(bits).sides((8, 8), None, vectors.device)
    assert min(errors) == errors[1] < error  # and no other scale would do much better
    assert float(LatticeCoded(bits).distortions(alike)) == pytest.approx(errors[1], rel=0.05)


@pytest.mark.parametrize("bits", [0, 1, 5])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        LatticeCoded(bits)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed is -1"):
        LatticeCoded(2, seed=-1)


def test_constants_do_not_depend_on_a_callers_defaults() -> None:
    for cached in (lattice_patterns, fine_points):
        cached.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        levels = LatticeFormat(3).levels
    assert lattice_patterns().device.type == fine_points().device.type == "cpu"
    assert not lattice_patterns().is_inference()
    assert levels.device.type == "cpu"
