"""Weights of others: what is read, what is refused, and that a wrong mapping cannot pass."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_weights
import torch
from safetensors.torch import load_file, save_file

from flip_jax.checkpoint import load_momentum, load_params
from flip_jax.convert import torch_flip
from flip_jax.convert.__main__ import main
from flip_jax.convert.check import compare, compare_bits
from flip_jax.convert.conversion import ConversionError, import_torch, whole_or_absent
from flip_jax.convert.foreign import Options
from flip_jax.convert.importer import import_weights
from flip_jax.convert.weight_files import read_tensors
from flip_jax.data import tokenizer
from flip_jax.models.position_table import resize_position_table
from flip_jax.named_arrays import named_leaves


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(model, Hugging Face folder)"""
    model, folder = tiny_weights.clip_model(), tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """(model, Hugging Face folder)"""
    model, folder = tiny_weights.bert_model(), tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return model, folder


def assert_same(found: dict, wanted: dict) -> None:
    found, wanted = named_leaves(found), named_leaves(wanted)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_clip_keeps_its_last_norm(clip, tmp_path):
    model, folder = clip
    import_weights("clip", folder, tmp_path / "ours", Options())
    norm, last = load_params(tmp_path / "ours")["vit"]["post_norm"], model.vision_model
    np.testing.assert_array_equal(norm["scale"], last.post_layernorm.weight.detach())
    np.testing.assert_array_equal(norm["bias"], last.post_layernorm.bias.detach())


def test_clip_names_of_all_kinds_give_the_same(clip, tmp_path):
    """A CLIPModel folder, a file of its image tower alone, OpenAI's names."""
    model, folder = clip
    import_weights("clip", folder, tmp_path / "whole", Options())
    wanted = load_params(tmp_path / "whole")
    vision = {n: t.clone() for n, t in model.vision_model.state_dict().items()}
    save_file(vision, tmp_path / "vision.safetensors")
    torch.save(tiny_weights.openai_state(model), tmp_path / "openai.pt")
    for name in ("vision.safetensors", "openai.pt"):
        import_weights("clip", tmp_path / name, tmp_path / f"{name}_ours", Options())
        assert_same(load_params(tmp_path / f"{name}_ours"), wanted)


def test_half_precision_and_shards(clip, tmp_path):
    folder = tmp_path / "sharded"
    copy.deepcopy(clip[0]).half().save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    import_weights("clip", folder, tmp_path / "ours", Options())
    leaves = named_leaves(load_params(tmp_path / "ours"))
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32)}


def test_bert_type_vector(bert, tmp_path):
    model, folder = bert
    embeddings = model.bert.embeddings
    position = embeddings.position_embeddings.weight.detach().numpy()
    type_zero = embeddings.token_type_embeddings.weight[0].detach().numpy()
    for as_reference, wanted in ((False, position + type_zero), (True, position)):
        out = tmp_path / str(as_reference)
        options = Options(tokenizer="grammar", as_reference=as_reference)
        import_weights("bert", folder, out, options)
        np.testing.assert_array_equal(load_params(out)["bert"]["position_embed"], wanted)


def test_bert_rows_of_the_added_tokens(bert, tmp_path):
    model, folder = bert
    rows = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(rows)}"
        import_weights("bert", folder, out, Options(tokenizer="grammar", seed=seed))
        words = load_params(out)["bert"]["word_embed"]
        np.testing.assert_array_equal(
            words[:-2], model.bert.embeddings.word_embeddings.weight.detach()
        )
        rows.append(words[-2:])
    np.testing.assert_array_equal(rows[0], rows[1])
    assert np.all(rows[0] != rows[2])
    assert 0.015 < rows[0].std() < 0.025


def test_bert_of_the_first_days(bert, tmp_path):
    """LayerNorm.gamma and .beta, position_ids, a pooler, a pickle."""
    model, folder = bert
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("norm.bias", "norm.beta"): t
        for name, t in model.state_dict().items()
    }
    old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): t for name, t in old.items()}
    old["bert.pooler.dense.weight"] = torch.zeros(3, 3)
    old["bert.embeddings.position_ids"] = torch.arange(tiny_weights.POSITIONS)[None]
    torch.save(old, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    import_weights("bert", tmp_path, tmp_path / "old", Options(tokenizer="grammar"))
    import_weights("bert", folder, tmp_path / "new", Options(tokenizer="grammar"))
    assert_same(load_params(tmp_path / "old"), load_params(tmp_path / "new"))


def test_vocabulary_of_other_size_is_refused(bert, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    options = Options(tokenizer=str(tmp_path / "vocab.txt"))
    with pytest.raises(ConversionError, match="7 entries"):
        import_weights("bert", bert[1], tmp_path / "ours", options)
    assert not (tmp_path / "ours").exists()


def test_a_vocabulary_some_entries_short_is_refused(bert, tmp_path):
    """Only [DEC] and [ENC] may have no row in the table, and only both."""
    entries = (Path(tokenizer.__file__).parent / "vocab_grammar.txt").read_text().split()
    (tmp_path / "vocab.txt").write_text("\n".join(entries[:-1]))
    options = Options(tokenizer=str(tmp_path / "vocab.txt"))
    with pytest.raises(ConversionError, match=f"{len(entries)} rows.* has {len(entries) - 1} ent"):
        import_weights("bert", bert[1], tmp_path / "ours", options)


def test_bert_with_a_task_head(bert, tmp_path):
    state = bert[0].bert.state_dict(prefix="bert.")
    for head in ("classifier", "qa_outputs"):
        state |= {f"{head}.weight": torch.zeros(2, tiny_weights.WIDTH)}
    torch.save(state, tmp_path / "task.bin")
    options = Options(tokenizer="grammar")
    import_weights("bert", tmp_path / "task.bin", tmp_path / "ours", options)
    import_weights("bert", bert[1], tmp_path / "plain", options)
    assert_same(load_params(tmp_path / "ours"), load_params(tmp_path / "plain"))


def test_flip_without_twins_and_queue(tmp_path):
    state = tiny_weights.official_state(twins=False, queue=False)
    torch.save({"model": state}, tmp_path / "source.pth")
    printed = import_weights(
        "flip", tmp_path / "source.pth", tmp_path / "ours", Options(tokenizer="grammar")
    )
    assert load_momentum(tmp_path / "ours") == {}
    assert "no momentum twins" in printed and "no queue" in printed
    assert main(["--to", "flip", str(tmp_path / "ours"), str(tmp_path / "again.pth")]) == 0
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert list(again) == list(tiny_weights.official_state())
    for name in torch_flip.official_shapes(tiny_weights.model_config(), twin=True):
        online = name.replace("_m.", ".", 1)
        assert torch.equal(again[name], state[online]), name
    norms = again["image_queue"].norm(dim=0)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_every_misfit_is_listed_and_can_be_allowed(tmp_path, capsys):
    state = tiny_weights.official_state()
    del state["itm_head.weight"], state["text_encoder_m.encoder.layer.1.output.dense.bias"]
    state["vision_proj.bias"] = torch.zeros(7)
    state["ln.weight"] = torch.zeros(3)
    torch.save({"model": state}, tmp_path / "source.pth")
    command = ["--from", "flip", "--tokenizer", "grammar"]
    paths = [str(tmp_path / "source.pth"), str(tmp_path / "ours")]
    assert main([*command, *paths]) == 1
    error = capsys.readouterr().err
    assert "2 missing: itm_head.weight, text_encoder_m.encoder.layer.1.output.dense.bias" in error
    assert "1 misshapen: vision_proj.bias (7,), needed is (24,)" in error
    assert "1 unexpected: ln.weight" in error
    assert not (tmp_path / "ours").exists()

    allow = ["--allow-missing", "itm_head.*", "--allow-missing", "*.layer.1.output.dense.bias"]
    allow += ["--allow-missing", "vision_proj.bias", "--allow-unexpected", "ln.*"]
    assert main([*command, *allow, *paths]) == 0, capsys.readouterr().err
    twin = load_momentum(tmp_path / "ours")["twins"]["bert"]["blocks"]["mlp"]["down"]["bias"][1]
    np.testing.assert_array_equal(twin, state["text_encoder.encoder.layer.1.output.dense.bias"])
    assert np.abs(load_params(tmp_path / "ours")["itm_head"]["kernel"]).max() > 0


@pytest.mark.slow
def test_a_layer_of_fused_attention_may_start_afresh(clip, tmp_path):
    state = tiny_weights.openai_state(clip[0])
    del state["visual.transformer.resblocks.1.attn.in_proj_weight"]
    torch.save({"state_dict": state}, tmp_path / "farl.pth")
    with pytest.raises(ConversionError, match=r"1 missing: visual\.\S+\.in_proj_weight"):
        import_weights("farl", tmp_path / "farl.pth", tmp_path / "ours", Options())
    options = Options(allow_missing=("*.in_proj_weight",))
    import_weights("farl", tmp_path / "farl.pth", tmp_path / "ours", options)


@pytest.mark.parametrize("kind", ["flip", "clip", "bert"])
def test_a_wrong_mapping_is_caught(kind, clip, bert, tmp_path, monkeypatch):
    sources = {"clip": clip[1], "bert": bert[1], "flip": tmp_path / "source.pth"}
    if kind == "flip":
        torch.save({"model": tiny_weights.official_state()}, sources["flip"])
    to_ours = torch_flip._to_ours

    def forget_to_transpose(value, layout):
        square = value.ndim == 2 and value.shape[0] == value.shape[1]
        return value if layout == "linear" and square else to_ours(value, layout)

    monkeypatch.setattr(torch_flip, "_to_ours", forget_to_transpose)
    with pytest.raises(ConversionError, match="do not compute the same"):
        import_weights(kind, sources[kind], tmp_path / "ours", Options(tokenizer="grammar"))
    assert not (tmp_path / "ours").exists()


def test_nothing_is_overwritten(clip, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError):
        import_weights("clip", clip[1], tmp_path / "mine", Options())
    assert (tmp_path / "mine").read_text() == "mine"


def test_output_appears_when_it_is_checked(tmp_path):
    out = tmp_path / "out.pth"
    with whole_or_absent(out) as partial:
        partial.write_text("new")
        assert partial.parent == tmp_path and partial.suffix == ".pth" and not out.exists()
    assert out.read_text() == "new" and list(tmp_path.iterdir()) == [out]

    with pytest.raises(KeyboardInterrupt), whole_or_absent(tmp_path / "stopped") as partial:
        (partial / "deep").mkdir(parents=True)
        raise KeyboardInterrupt
    with pytest.raises(FileExistsError), whole_or_absent(tmp_path / "taken") as partial:
        partial.write_text("new")
        (tmp_path / "taken").write_text("of another process")
    assert (tmp_path / "taken").read_text() == "of another process"
    assert sorted(tmp_path.iterdir()) == [out, tmp_path / "taken"]


def test_changed_bits_are_caught():
    tree = {"vit": {"kernel": np.zeros(3, np.float32)}}
    assert "1 arrays" in compare_bits(tree, copy.deepcopy(tree))
    for other in (np.array([0, -0.0, 0], np.float32), np.zeros(3), np.zeros((1, 3), np.float32)):
        with pytest.raises(ConversionError, match="vit/kernel"):
            compare_bits(tree, {"vit": {"kernel": other}})
    with pytest.raises(ConversionError, match="vit/bias"):
        compare_bits(tree, {"vit": tree["vit"] | {"bias": np.zeros(1)}})


def test_not_a_number_is_not_small():
    good = {"image_embed": np.ones(3, np.float32)}
    bad = {"image_embed": np.array([1, np.nan, 1], np.float32)}
    compare(good, good)
    for source, target in ((good, bad), (bad, good), (bad, bad), (good, {})):
        with pytest.raises(ConversionError):
            compare(source, target)


class Surprise:
    """Something a pickle could hold that is no tensor."""


def test_a_pickle_with_more_than_tensors_is_refused(tmp_path):
    torch.save({"model": tiny_weights.official_state(), "args": Surprise()}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=r"more than tensors.*Surprise.*state_dict\(\)"):
        import_weights("flip", tmp_path / "a.pth", tmp_path / "ours", Options())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-16.pt")
    with pytest.raises(ConversionError, match="TorchScript"):
        import_weights("clip", tmp_path / "ViT-B-16.pt", tmp_path / "ours", Options())


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "begins with b''"),
        (b"PK\x03\x04 broken", "begins with b'PK\\x03\\x04 broken'"),
        (b"<!DOCTYPE html><html>", "begins with b'<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1", "begins with b'version https://git-lfs"),
        (b"\x80\x02.", "is damaged"),  # IndexError of the unpickler
        (b"\x80\x02h\x09.", "is damaged"),  # KeyError
        (b"\x80\x02X\x02\x00\x00\x00\xff\xff.", "is damaged"),  # UnicodeDecodeError
        (None, "no file or folder"),
    ],
)
def test_broken_files(content, match, tmp_path, capsys):
    if content is not None:
        (tmp_path / "a.pth").write_bytes(content)
    assert main(["--from", "flip", str(tmp_path / "a.pth"), str(tmp_path / "ours")]) == 1
    error = capsys.readouterr().err
    assert match in error and "a.pth" in error and "more than tensors" not in error


def test_a_part_of_a_file(tmp_path, capsys):
    """torch seeks beyond its end, an OSError without a name."""
    torch.save({"model": tiny_weights.official_state()}, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    for size in (5_000, 20_000, len(data) // 2, len(data) - 10):
        (tmp_path / "a.pth").write_bytes(data[:size])
        assert main(["--from", "flip", str(tmp_path / "a.pth"), str(tmp_path / "ours")]) == 1
        assert "a.pth is no PyTorch file or is damaged" in capsys.readouterr().err


def test_a_part_of_a_file_of_the_first_days(tmp_path):
    """Before torch 1.6 a file was pickles one after the other, each read until it ends."""
    torch.save({"a": torch.ones(40)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "a.pth").read_bytes()
    for size in range(1, len(whole)):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(ConversionError, match=r"cut\.pth (is no|holds)"):
            read_tensors(tmp_path / "cut.pth")


def test_what_is_no_tensor_of_a_name(tmp_path):
    torch.save({0: torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=r"a\.pth holds a dict whose keys are no names"):
        read_tensors(tmp_path / "a.pth")
    torch.save({"thin": torch.eye(2).to_sparse()}, tmp_path / "b.pth")
    with pytest.raises(ConversionError, match=r"b\.pth: thin is no plain array"):
        read_tensors(tmp_path / "b.pth")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(ConversionError, match="has no weight_map, which names the files"):
        read_tensors(tmp_path)


def test_broken_safetensors(clip, tmp_path):
    whole = (clip[1] / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConversionError, match="not a whole safetensors file"):
        import_weights("clip", tmp_path / "cut.safetensors", tmp_path / "ours", Options())


def test_another_architecture_is_refused(clip, tmp_path):
    config = json.loads((clip[1] / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(clip[1] / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="hidden_act='gelu'"):
        import_weights("clip", tmp_path, tmp_path / "ours", Options())


def test_wrong_format_is_named(clip, tmp_path):
    with pytest.raises(ConversionError, match="of the format given with --from"):
        import_weights("flip", clip[1], tmp_path / "ours", Options())
    with pytest.raises(ConversionError, match="OpenAI CLIP's names"):
        import_weights("farl", clip[1], tmp_path / "ours", Options())


def test_patches_that_are_no_squares_are_refused(clip, tmp_path):
    state = load_file(clip[1] / "model.safetensors")
    name = "vision_model.embeddings.patch_embedding.weight"
    state[name] = state[name][..., :-1].contiguous()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="patches of 8 x 7"):
        import_weights("clip", tmp_path, tmp_path / "ours", Options())


@pytest.mark.parametrize("heads", [0, -2, 5])
def test_heads_must_divide_the_width(clip, bert, heads, tmp_path):
    for kind, source, field in (("clip", clip, "vision_heads"), ("bert", bert, "text_heads")):
        with pytest.raises(ConversionError, match=rf"heads={heads}: must divide .* tower, 128"):
            import_weights(kind, source[1], tmp_path / "ours", Options(**{field: heads}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '["x"]', "holds a list, not a JSON object"),
        ("config.json", "{", "cannot be read: Expecting property name"),
        ("model.safetensors.index.json", "{}", "has no weight_map, which names the files"),
    ],
)
def test_broken_descriptions(clip, name, content, message, tmp_path):
    if name == "config.json":
        save_file(load_file(clip[1] / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / name).write_text(content)
    with pytest.raises(ConversionError, match=rf"{name} {message}"):
        import_weights("clip", tmp_path, tmp_path / "ours", Options())


def test_image_size_must_fit_the_patches(clip, tmp_path):
    with pytest.raises(ConversionError, match="--image-size 37 is no multiple of the patch size 8"):
        import_weights("clip", clip[1], tmp_path / "ours", Options(image_size=37))


def test_import_options_need_an_import(capsys):
    with pytest.raises(SystemExit):
        main(["--to", "flip", "a", "b", "--image-size", "224", "--seed", "1"])
    assert "only with --from: --image-size, --seed" in capsys.readouterr().err


def test_missing_pytorch_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"flip_jax\[torch\]"):
        import_torch()


@pytest.mark.parametrize(("old", "new"), [(14, 28), (28, 14), (7, 12), (1, 3)])
def test_position_table_against_torch(old, new):
    table = np.random.default_rng(0).normal(size=(1 + old * old, 5)).astype(np.float32)
    found = resize_position_table(table, new)
    grid = torch.tensor(table[1:]).T.reshape(1, 5, old, old)
    wanted = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    np.testing.assert_array_equal(found[0], table[0])
    np.testing.assert_allclose(found[1:], wanted.flatten(2)[0].T, atol=1e-5)
    assert resize_position_table(table, old) is table
