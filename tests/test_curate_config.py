"""Settings of a build: the files under configs/curate, overrides and what is refused."""

import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT

from flip_jax.config import from_dict, load, override, to_dict
from flip_jax.curate.config import CurateConfig, InputConfig, OutputConfig, validate

GOOD = CurateConfig(
    input=InputConfig(paths="a.parquet", url_column="url"), output=OutputConfig(path="data")
)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/curate").glob("*.py")), ids=lambda path: path.stem
)
def test_the_configs_are_valid(path):
    cfg = load(path, CurateConfig)
    source = replace(cfg.input, paths="a.parquet", images="b" if cfg.input.file_column else None)
    validate(replace(cfg, input=source, output=OutputConfig(path="data")))


def test_the_defaults_of_the_filters_are_the_papers():
    cfg = CurateConfig()
    assert (cfg.faces.min_confidence, cfg.faces.min_side) == (0.98, 128)
    assert (cfg.attributes.min_probability, cfg.attributes.min_labels) == (0.85, 5)


def test_a_config_survives_json():
    assert from_dict(to_dict(GOOD), CurateConfig) == GOOD


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("input.paths", "", "input.paths is not set"),
        (
            "input.paths",
            "it's.csv",
            r'^config.input.paths="it\'s.csv": No closing quotation; .*quotes',
        ),
        ("beam.options", "--foo 'x", r"^config.beam.options=.*: No closing quotation"),
        ("input.chunk_rows", "0", "input.chunk_rows=0: must be at least 1"),
        ("input.kind", "zip", "input.kind=zip: must be one of"),
        ("input.url_column", "none", "needs file_column .*, image_column or url_column"),
        ("input.images", "photos", "file_column=None: give both"),
        ("input.file_column", "file", "images=None and file_column='file': give both"),
        ("faces.min_confidence", "1.5", "must be from 0 to 1"),
        ("faces.quality", "0", "must be from 1 to 100"),
        ("faces.detector", "onnx", "config.faces.model=None: detector onnx needs"),
        ("attributes.min_probability", "0.4", "must be from 0.5 to 1"),
        ("fetch.user_agent", " ", "say who you are"),
        ("attributes.labeller", "onnx", "labeller onnx needs the .onnx file"),
        ("captions.count", "-1", "must be at least 0"),
        ("dedupe.max_distance", "256", "must be from 0 to 255"),
        ("split.train", "0.5", "train .* val .* test is 0.52, must be 1"),
        ("output.path", "", "output.path is not set"),
        ("beam.workers", "0", "must be at least 1"),
        ("fetch.retries", "1.5", "must be int"),
    ],
)
def test_what_is_refused(field, value, message):
    validate(GOOD)
    with pytest.raises(ValueError, match=message):
        validate(override(GOOD, field, value))


def test_columns_of_a_table_are_for_tables():
    source = InputConfig(kind="tar", paths="*.tar", image_column="image")
    with pytest.raises(ValueError, match=r"input.image_column is for input.kind='table' only"):
        validate(replace(GOOD, input=source))
    validate(replace(GOOD, input=InputConfig(kind="folder", paths="photos")))


@pytest.mark.parametrize("missing", ["apache_beam", "aiohttp"])
def test_without_the_extra(tmp_path, missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from flip_jax.curate.__main__ import main; sys.exit(main())"
    )
    fields = ["input.paths=a.csv", "input.images=.", f"output.path={tmp_path}/data"]
    config = str(ROOT / "configs/curate/folder.py")
    arguments = ["build", "--config", config, *(f"--config.{field}" for field in fields)]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: curation needs {missing}, which is not installed")
    assert "pip install 'flip_jax[curate]'" in run.stderr
    assert not any(tmp_path.iterdir())
