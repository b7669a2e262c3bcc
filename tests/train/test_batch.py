"""A constant global batch at any number of processes."""

from __future__ import annotations

import pytest

from muon_dist.config import load_config
from muon_dist.errors import ConfigError
from muon_dist.train.batch import share_batch


@pytest.mark.parametrize("world, expected", [(1, (8, 3)), (2, (6, 2)), (3, (8, 1)), (4, (6, 1)), (24, (1, 1))])
def test_the_product_is_the_global_batch(world: int, expected: tuple[int, int]) -> None:
    micro, accumulation = share_batch(24, 8, world)
    assert (micro, accumulation) == expected and micro * accumulation * world == 24


def test_a_world_that_does_not_divide_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size: 16 .* 3 processes; possible numbers are 1, 2, 4, 8"):
        share_batch(16, 8, 3)


def test_two_ways_to_say_it_contradict(workspace) -> None:
    overrides = ["data.global_batch_size=8", "trainer.gradient_accumulation_steps=2"]
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps: follows from data.global_batch_size = 8"):
        load_config(workspace / "tiny.yaml", overrides)
    overrides = ["checkpoint.keep_last=2", "trainer.save_total_limit=3"]
    with pytest.raises(ConfigError, match=r"save_total_limit: and checkpoint.keep_last say the same"):
        load_config(workspace / "tiny.yaml", overrides)


def test_the_block_is_read_and_written_back(workspace, tmp_path) -> None:
    config = load_config(workspace / "tiny.yaml", ["checkpoint.async=false", "checkpoint.on_error=continue"])
    assert not config.checkpoint.background and config.checkpoint.on_error == "continue"
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config
    with pytest.raises(ConfigError, match=r"checkpoint\.asinc: unknown key; did you mean async"):
        load_config(workspace / "tiny.yaml", ["checkpoint.asinc=false"])
