"""Every file in configs/ is a configuration, alone or laid over the quickstart's."""

from pathlib import Path

import pytest

from ryzen_llm.pipeline import parse

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_read(path: Path) -> None:
    quickstart = path.with_name("quickstart.yaml")
    config = parse(["--config", str(quickstart), "--config", str(path)])
    assert config.options.output_dir == f"runs/{path.stem}"
    if path.stem in ("ddp", "fsdp"):  # the global batch is the quickstart's
        assert config.trainer["strategy"] == path.stem
        assert (
            config.trainer["devices"] * config.data.batch_size
            == parse(["--config", str(quickstart)]).data.batch_size
        )
