"""Every file in configs/ is a configuration, alone or laid over the quickstart's."""

from pathlib import Path

import pytest

from ryzen_llm.pipeline import parse

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_read(path: Path) -> None:
    quickstart = path.with_name("quickstart.yaml")
    overlay = path.stem in ("ddp", "fsdp")
    config = parse([f"--config={name}" for name in ([quickstart, path] if overlay else [path])])
    assert config.options.output_dir.startswith("runs/")
    if overlay:  # the global batch is the quickstart's
        assert config.trainer["strategy"] == path.stem
        assert (
            config.trainer["devices"] * config.data.batch_size
            == parse([f"--config={quickstart}"]).data.batch_size
        )
