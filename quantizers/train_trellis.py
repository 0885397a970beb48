"""Train the levels of quantizers/trellis.py for standard normal values, and write them beside it.

    python -m quantizers.train_trellis            all tables; those of 12 bits take 10 minutes on two cores
    python -m quantizers.train_trellis 2.8 4.10   2 bits with a state of 8, 4 bits with a state of 10

A table starts as normal quantiles; which state gets which is a rule of L integers:

    rank(state) = offset + sum of coefficients[i] for each set bit i of the state        (modulo 2**L)

The rule to begin with partitions as Ungerboeck does (1982): the newest bits, which the encoder chooses, and the oldest,
by which merging paths differ, both move the level by a multiple of 2**L / 2**bits, the others between these. A random
search changes coefficients; then the generalized Lloyd algorithm (Linde, Buzo, Gray 1980) alternates encoding with
centroids. Levels are odd throughout, level[~state] = -level[state]: complemented symbols stand for negated values.
"""

import json
import random
import sys
import time

import numpy as np
import torch
from jaxtyping import Float32
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from torch import Tensor

from quantizers.trellis import BITS, ERRORS_KEY, LEVELS_FILE, decode, encode, states, trained_errors

# Table -> changes of the rule to try; a change costs four times as much with two state bits more. None may be added
# with 10 bits: variable trellises take the one with 8 where there is none.
TABLES = {f"{bits}.8": 250 for bits in BITS}
TABLES |= {f"{bits}.10": 60 for bits in (2, 3, 4)} | {f"{bits}.12": 60 for bits in BITS}
STEPS = 256
SEARCH_ROUNDS = 6
TRAINING_ROUNDS = 40
TRAINING_SAMPLES = 256  # for each state, and for 1024 at least


def train(bits: int, state_bits: int, num_changes: int) -> Float32[Tensor, " state"]:
    """Levels of the best of `num_changes` + 1 rules, trained to the end."""
    sample = normal_sample(max(2**15, 64 * 2**state_bits), seed=1)
    rng = random.Random(f"{bits}.{state_bits}")
    coefficients = first_coefficients(bits, state_bits)
    least, best = trained(start_levels(coefficients), bits, sample, SEARCH_ROUNDS)
    for _ in range(num_changes):
        changed = changed_coefficients(coefficients, rng)
        error, levels = trained(start_levels(changed), bits, sample, SEARCH_ROUNDS)
        if error < least:
            least, best, coefficients = error, levels, changed
    print(f"{bits}.{state_bits} coefficients {coefficients}", flush=True)
    size = TRAINING_SAMPLES * 2 ** max(state_bits, 10)
    return trained(best, bits, normal_sample(size, seed=2), TRAINING_ROUNDS)[1]


def normal_sample(size: int, seed: int) -> Float32[Tensor, "sequence step"]:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((size // STEPS, STEPS), dtype=np.float32))


def first_coefficients(bits: int, state_bits: int) -> list[int]:
    coefficients = [2 ** (state_bits - 1 - i) for i in range(state_bits)]
    for i in range(bits):
        coefficients[state_bits - bits + i] += 2 ** (state_bits - bits + i)
    return coefficients


def changed_coefficients(coefficients: list[int], rng: random.Random) -> list[int]:
    """One to three coefficients drawn anew; their sum stays odd, or no offset would make the rank odd."""
    changed = list(coefficients)
    for _ in range(rng.choice((1, 1, 2, 3))):
        changed[rng.randrange(len(changed))] = rng.randrange(2 ** len(changed))
    return changed if sum(changed) % 2 else changed_coefficients(coefficients, rng)


def start_levels(coefficients: list[int]) -> Float32[Tensor, " state"]:
    """Quantiles by rank; the offset is the one with rank(~state) = 2**L - 1 - rank(state)."""
    num_states = 2 ** len(coefficients)
    state = np.arange(num_states)
    rank = sum((state >> i & 1) * coefficient for i, coefficient in enumerate(coefficients))
    rank = (rank + (num_states - 1 - sum(coefficients)) // 2) % num_states
    return torch.tensor(norm.ppf((rank + 0.5) / num_states), dtype=torch.float32)


def trained(
    levels: Float32[Tensor, " state"], bits: int, sample: Float32[Tensor, "sequence step"], rounds: int
) -> tuple[float, Float32[Tensor, " state"]]:
    """Mean squared error of the last levels but one, and the last levels, of `rounds` of Lloyd's algorithm."""
    for _ in range(rounds):
        symbols = encode(sample, levels, bits)
        error = mean_squared_error(sample, decode(symbols, levels, bits))
        levels = centroids(states(symbols, bits, len(levels).bit_length() - 1), sample, levels)
    return error, levels


def centroids(
    found: Tensor, sample: Float32[Tensor, "sequence step"], levels: Float32[Tensor, " state"]
) -> Float32[Tensor, " state"]:
    """Mean of each state's values and its complement's negated ones; a state that none takes keeps its level."""
    count = torch.bincount(found.view(-1), minlength=len(levels))
    total = torch.bincount(found.view(-1), weights=sample.double().view(-1), minlength=len(levels))
    count, total = count + count.flip(0), total - total.flip(0)
    return torch.where(count > 0, total / count.clamp(min=1), levels.double()).float()


def mean_squared_error(values: Tensor, decoded: Tensor) -> float:
    return float((values - decoded).double().square().mean())


def main(names: list[str]) -> None:
    unknown = set(names) - set(TABLES)
    if unknown:
        raise SystemExit(f"no trellis table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    fresh = normal_sample(2**20, seed=3)
    for name in names or TABLES:
        began = time.perf_counter()
        bits, state_bits = map(int, name.split("."))
        levels = train(bits, state_bits, TABLES[name])
        error = mean_squared_error(fresh, decode(encode(fresh, levels, bits), levels, bits))
        seconds = time.perf_counter() - began
        print(f"{name} fresh error {error:.6f}, {error * 4**bits:.4f} of the bound, {seconds:.0f} s", flush=True)
        tables, errors = (load_file(LEVELS_FILE), trained_errors()) if LEVELS_FILE.exists() else ({}, {})
        tables[name], errors[name] = levels, float(f"{error:.4g}")
        LEVELS_FILE.parent.mkdir(exist_ok=True)
        metadata = {ERRORS_KEY: json.dumps(errors, sort_keys=True)}
        save_file(dict(sorted(tables.items())), LEVELS_FILE, metadata=metadata)
        trained_errors.cache_clear()


if __name__ == "__main__":
    main(sys.argv[1:])
