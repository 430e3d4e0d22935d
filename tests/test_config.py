"""Overrides, types and checks: every error names the field, the value and what is allowed."""

import dataclasses
import json
from pathlib import Path

import pytest

from flip_jax import config, main

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_valid(path):
    cfg = config.validate(config.load(path))
    assert config.from_dict(config.to_dict(cfg)) == cfg


def test_the_defaults_are_the_reference_recipe():
    cfg = config.Config()
    assert (cfg.data.batch_size, cfg.loss.queue_size, cfg.loss.momentum) == (640, 61_440, 0.995)
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.epochs) == (3e-5, 0.05, 15.0)
    assert cfg.model.text.enc_id == 30_523 and cfg.model.vision.patches == 196


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("optim.lr", "1e-4", 1e-4),
        ("optim.lr", "1", 1),
        ("data.path", "some/folder", "some/folder"),
        ("data.path", "123", "123"),
        ("data.path", "None", None),
        ("data.path", "none", None),
        ("data.flip", "false", False),
        ("optim.clip_norm", "1.0", 1.0),
        ("optim.clip_norm", "None", None),
        ("loss.same_group", "ignore", "ignore"),
        ("model.vision.keep_patches", "49", 49),
        ("seed", "7", 7),
    ],
)
def test_override(path, text, value):
    cfg = config.override(config.Config(), path, text)
    for name in path.split("."):
        cfg = getattr(cfg, name)
    assert cfg == value


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("optim.learning_rat", "1", ["config.optim.learning_rat", "fields: lr"]),
        ("optim.wieght_decay", "1", ["did you mean config.optim.weight_decay"]),
        ("optm.lr", "1", ["did you mean config.optim"]),
        ("data.batch_size", "2.5", ["config.data.batch_size=2.5", "int"]),
        ("data.batch_size", "many", ["config.data.batch_size=many", "int"]),
        ("data.flip", "1", ["config.data.flip=1", "bool"]),
        ("loss.same_group", "ignored", ["'negative', 'ignore', 'positive'"]),
        ("optim", "1", ["group of fields", "config.optim.lr"]),
        ("seed.x", "1", ["single value"]),
        ("optim.lr", "nan", ["config.optim.lr=nan"]),
        ("optim.lr", "{[]}", ["config.optim.lr={[]}: must be float"]),
        ("optim.lr", "-" * 20_000 + "1", ["must be float"]),
    ],
)
def test_bad_override(path, text, words):
    with pytest.raises(ValueError) as error:
        config.override(config.Config(), path, text)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.vision.image_size", 225, ["multiple of model.vision.patch_size=16"]),
        ("model.vision.keep_patches", 500, ["1..196"]),
        ("model.text.heads", 7, ["divide model.text.width=768"]),
        ("model.text.max_length", 600, ["3..512"]),
        ("model.text.dropout", 1.0, ["[0, 1)"]),
        ("data.path", "", ["folder of records"]),
        ("data.batch_size", 1, ["at least 2"]),
        ("loss.local_batch", 79, ["divide data.batch_size=640", "candidates=global"]),
        ("loss.queue_size", 61_000, ["multiple of data.batch_size=640", "for example 60800"]),
        ("loss.queue_size", 0, ["for example 640"]),
        ("loss.temperature", 0.7, ["[0.001, 0.5]"]),
        ("loss.momentum", 1.5, ["[0, 1]"]),
        ("optim.lr", 0.0, ["above 0"]),
        ("epochs", 0.0, ["above 0"]),
        ("eval.rerank", -1, ["at least 0"]),
        ("model.vision.patch_size", 0, ["at least 1"]),
        ("model.text.heads", 0, ["at least 1"]),
        ("loss.local_batch", 0, ["at least 1"]),
        ("mesh.fsdp", 0, ["at least 1"]),
        ("loss.alpha_ramp_epochs", -1.0, ["at least 0"]),
        ("checkpoint.every_steps", 0, ["at least 1"]),
        ("checkpoint.every_minutes", -1.0, ["above 0"]),
        ("optim.clip_norm", 0.0, ["above 0"]),
        ("optim.eps", 0.0, ["above 0"]),
        ("optim.beta1", 1.0, ["[0, 1)"]),
        ("optim.beta2", -0.1, ["[0, 1)"]),
        ("seed", -1, ["0..4294967295"]),
        ("seed", 2**32, ["0..4294967295"]),
        ("optim.min_lr", -1e-6, ["at least 0"]),
        ("optim.warmup_lr", -1.0, ["at least 0"]),
        ("optim.warmup_lr", 1e-4, ["at most optim.lr, which is 3e-05"]),
        ("optim.min_lr", 1e-4, ["at most optim.lr, which is 3e-05"]),
        ("optim.decay_rate", 0.0, ["above 0 and at most 1"]),
        ("optim.decay_rate", 1.1, ["above 0 and at most 1"]),
        ("model.text.init_std", -1.0, ["at least 0"]),
        ("model.text.vocab_size", -5, ["at least 1"]),
        ("data.randaugment_level", 11, ["0..10"]),
        ("data.drawn.test_identities", -1, ["at least 0"]),
        ("eval.max_images", 0, ["at least 1"]),
        ("model.vision.image_size", 0, ["multiple of model.vision.patch_size=16"]),
    ],
)
def test_bad_value(path, value, words):
    def put(part, names):
        name, *rest = names
        new = put(getattr(part, name), rest) if rest else value
        return dataclasses.replace(part, **{name: new})

    with pytest.raises(ValueError, match=f"config.{path}=") as error:
        config.validate(put(config.Config(), path.split(".")))
    assert all(word in str(error.value) for word in words), error.value


def test_a_tower_of_one_patch_is_legal_without_mim():
    vision = dataclasses.replace(config.VisionConfig(), image_size=16)
    model = dataclasses.replace(config.ModelConfig(), vision=vision)
    assert config.validate(config.Config(model=model)).model.vision.patches == 1


def test_wrong_type_inside_a_config_file():
    cfg = config.Config(seed="42")
    with pytest.raises(ValueError, match=r"config.seed='42': must be int"):
        config.validate(cfg)


def test_missing_and_wrong_config_files(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        config.load(tmp_path / "absent.py")
    (tmp_path / "run.yaml").write_text("lr: 1\n")
    with pytest.raises(ValueError, match=r"run\.yaml: must be a \.py file with get_config"):
        config.load(tmp_path / "run.yaml")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="get_config"):
        config.load(tmp_path / "empty.py")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    with pytest.raises(ValueError, match=r"--config=.*broken\.py: SyntaxError: .*line 1"):
        config.load(tmp_path / "broken.py")


def test_command_line(tmp_path):
    base = str(CONFIGS[0])
    cfg, workdir, job = main.parse(
        ["--config", base, "--config.seed=3", "--config.data.path", "x", "--workdir", str(tmp_path)]
    )
    assert (cfg.seed, cfg.data.path, workdir, job) == (3, "x", tmp_path, "train")
    _, workdir, job = main.parse(["--config", base, "--eval_only"])
    assert (workdir, job) == (Path("runs") / CONFIGS[0].stem, "eval_only")
    with pytest.raises(ValueError, match=r"unknown argument --conf\.seed=3"):
        main.parse(["--config", base, "--conf.seed=3"])
    for missing in (["--config.init.vision"], ["--config.init.vision", "--config.seed=3"]):
        with pytest.raises(ValueError, match=r"--config\.init\.vision: needs a value"):
            main.parse(["--config", base, *missing])
    for name in ("init.checkpoint", "init.vision", "init.text", "loss.mim_tokenizer"):
        with pytest.raises(ValueError, match=rf"{name}='': must be a folder, or None"):
            main.parse(["--config", base, f"--config.{name}="])
    with pytest.raises(SystemExit):
        main.parse(["--config", base, "--eval_only", "--print_sharding"])
    for address in (["--workdir=gs://b/x"], ["--config.data.path=gs://b/faces"]):
        with pytest.raises(ValueError, match=r"docs/scale\.md"):
            main.parse(["--config", base, *address])


def test_steps_of_a_profile():
    cfg = config.override(config.Config(), "profile.steps", "10,20")
    assert config.validate(cfg).profile.steps == (10, 20)
    assert config.from_dict(json.loads(json.dumps(config.to_dict(cfg)))) == cfg
    for value in ("5", "word", "1,2,3", "3,2", "0,4"):
        with pytest.raises(ValueError, match=r"profile\.steps"):
            config.validate(config.override(cfg, "profile.steps", value))


def test_a_user_error_is_one_line(capsys):
    assert main.main(["--config", str(CONFIGS[0]), "--config.sede=1"]) == 1
    assert capsys.readouterr().err.startswith("error: config.sede does not exist; did you mean")
