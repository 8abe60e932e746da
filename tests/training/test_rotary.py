"""A checkpoint's rotary channels in another order: scores stay those of the frequencies that they had."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from training.export import export, load
from training.model import Student, hub_config
from training.rotary import _channels, _order, exchanged, turns_otherwise

OLD = hub_config() | {"rope_theta": 10.0, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
NEW = hub_config()


def scores(q: Tensor, k: Tensor, channels: list[tuple[int, float]], positions: Tensor) -> Tensor:
    """Of each query for each key; q, k: [tokens, 2 * pairs], positions: [3, tokens]."""
    angles = torch.stack([positions[axis] * frequency for axis, frequency in channels], dim=1)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)

    return (turned(q) @ turned(k).mH).real


def test_scores_are_those_of_the_same_frequencies_in_their_new_places() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 192, dtype=torch.float64)
    weights = torch.randn(2, 32, 192, dtype=torch.float64)
    positions = torch.randint(0, 200, (3, 20)).double()
    q, k = weights
    before = scores(x @ q.T, x @ k.T, _channels(OLD), positions)
    moved = [_channels(OLD)[index] for index in _order(OLD, NEW)]
    after = scores(x @ exchanged(q, OLD, NEW).T, x @ exchanged(k, OLD, NEW).T, moved, positions)
    torch.testing.assert_close(after, before)


def test_a_channel_goes_on_from_one_that_turned_nearly_as_fast_on_its_axis() -> None:
    old, new = _channels(OLD), _channels(NEW)
    order = _order(OLD, NEW)
    assert sorted(order) == list(range(16))
    pairs = [(new[index], old[chosen]) for index, chosen in enumerate(order[:7])]
    assert all(axis == other for (axis, _), (other, _) in pairs)
    assert all(0.8 < frequency / other < 1.25 for (_, frequency), (_, other) in pairs)
    assert _order(NEW, NEW) == list(range(16))
    assert turns_otherwise(OLD, NEW)
    assert not turns_otherwise(NEW, hub_config())


def test_a_checkpoint_that_turns_otherwise_is_read_with_its_channels_exchanged(
    untrained: Path, student: Student, tokenizer_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    export(student, tokenizer_file, folder)
    (folder / "config.json").write_text(json.dumps(OLD))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    loaded, same = Student(), Student()
    load(loaded, folder, tokenizer)
    load(same, untrained, tokenizer)
    ours, theirs = (one.hf.state_dict() for one in (loaded, same))
    for name, tensor in theirs.items():
        turns = "language_model.layers" in name and ("q_proj" in name or "k_proj" in name)
        assert torch.equal(ours[name], exchanged(tensor, OLD, NEW) if turns else tensor), name
        assert torch.equal(ours[name], tensor) != turns or not tensor.any(), name
