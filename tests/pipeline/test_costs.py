from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.costs import CostTable, check_ranks, choices_of, cost_table, measure_costs, measure_matrix
from pipeline.errors import RecipeError
from pipeline.model import open_model
from quantizers import AbstractQuantizer, LayerStatistics, quantizer_from_label, weighted_error


def example(rows: int = 96, columns: int = 80) -> tuple[torch.Tensor, LayerStatistics]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=generator)
    fisher = torch.randn(rows, columns, generator=generator).exp() ** 2 * torch.linspace(0.1, 10, rows)[:, None]
    return weight, LayerStatistics(fisher)


def named(*labels: str) -> dict[str, AbstractQuantizer]:
    return {label: quantizer_from_label(label) for label in labels}


def test_without_sampling_the_cost_is_the_exact_error() -> None:
    weight, learnt = example()
    found = measure_matrix(weight, learnt, named("lloyd3-g32-s4", "nf4-g64-s8"), num_rows=96, seed=0)
    for label, cost in found.items():
        quantized = quantizer_from_label(label).quantize(weight, learnt)
        assert cost == pytest.approx(weighted_error(weight - quantized.dequantize(), learnt), rel=1e-3)


def test_a_sample_of_rows_comes_close() -> None:
    weight, learnt = example(rows=512)
    labels = named("lloyd2-g32-s4", "lloyd3-g32-s4", "lloyd4-g32-s4")
    exact = measure_matrix(weight, learnt, labels, num_rows=512, seed=0)
    sampled = measure_matrix(weight, learnt, labels, num_rows=48, seed=0)
    for label in labels:
        assert sampled[label] == pytest.approx(exact[label], rel=0.1)


def test_a_low_rank_part_never_costs_more_than_none_and_pays_where_the_residual_is_low_rank() -> None:
    weight, learnt = example()
    outlier = weight + 20 * torch.outer(torch.linspace(-1, 1, 96), torch.linspace(1, -1, 80))
    labels = named("lloyd2-g32-s4", "lloyd2-g32-s4-r4")
    for matrix in (weight, outlier):
        cost = measure_matrix(matrix, learnt, labels, num_rows=96, seed=0)
        assert cost["lloyd2-g32-s4-r4"] <= cost["lloyd2-g32-s4"]
    assert cost["lloyd2-g32-s4-r4"] < 0.5 * cost["lloyd2-g32-s4"]


def test_table_measures_what_is_on_offer_and_reads_back(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = open_model(str(tiny_model_dir))
    names = [matrix.name for matrix in model.matrices]
    offered = {name: ["lloyd2-g32-s4", "lloyd4-g32-s4"] for name in names} | {names[0]: ["nf4-g64-s8"]}
    measure_costs(model, None, offered, num_rows=16, seed=0, work=tmp_path)
    table = CostTable.read(tmp_path / "out" / "costs.json")
    assert table.matrices == tuple(names)
    assert np.isfinite(table.cost).sum(axis=1).tolist() == [1] + [2] * (len(names) - 1)
    for row, shape in enumerate(table.shapes):
        for column, label in enumerate(table.choices):
            assert table.size_bits[row, column] == quantizer_from_label(label).size_bits(shape)
    again = CostTable.read(tmp_path / "out" / "costs.json")
    np.testing.assert_array_equal(again.cost, table.cost)


def test_measured_matrices_survive_an_interruption(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = open_model(str(tiny_model_dir))
    offered = {matrix.name: ["lloyd2-g32-s4"] for matrix in model.matrices}
    measure_costs(model, None, offered, num_rows=16, seed=0, work=tmp_path)
    part = tmp_path / "matrices" / f"{model.matrices[0].name}.json"
    part.write_text('{"lloyd2-g32-s4": 123.0}')
    measure_costs(model, None, offered, num_rows=16, seed=0, work=tmp_path)
    assert CostTable.read(tmp_path / "out" / "costs.json").cost[0, 0] == 123.0


def test_choices_and_their_errors(tiny_model_dir: Path) -> None:
    assert choices_of(("nf4", "lloyd3-g32", "trellis2"), (8,), (6,)) == [
        "nf4-g64-s8",
        "lloyd3-g32-s8",
        "trellis2-l8",
        "nf4-g64-s8-r8-f6",
        "lloyd3-g32-s8-r8-f6",
        "trellis2-l8-r8-f6",
    ]
    assert choices_of(("nf4",), (0,), (16,)) == ["nf4-g64-s8"]
    parts = ["", "-r2-f8", "-r2-f4", "-r16-f8", "-r16-f4"]
    assert choices_of(("nf4",), (2, 0, 16), (8, 4)) == [f"nf4-g64-s8{part}" for part in parts]
    with pytest.raises(RecipeError, match=r"'foo4' cannot be offered.*lloyd"):
        choices_of(("foo4",), (), (16,))
    with pytest.raises(RecipeError, match=r"Rank 65 is above .* 64 at most"):
        check_ranks(open_model(str(tiny_model_dir)).matrices, (2, 65))


def test_cost_table_marks_what_is_not_on_offer(tiny_model_dir: Path) -> None:
    matrices = open_model(str(tiny_model_dir)).matrices
    offered = {matrix.name: ["nf4-g64-s8"] for matrix in matrices} | {matrices[0].name: ["nf3-g64-s8"]}
    table = cost_table(matrices, offered, cost=lambda name, label: 1.0)
    assert np.isinf(table.cost).sum() == len(matrices)
