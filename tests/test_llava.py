"""A student inside transformers' LLaVA: the language model gets its patches, and nothing else."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import radio_distill

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

FILE = Path(__file__).resolve().parents[1] / "examples" / "llava.py"
SIZE, PATCH, WIDTH = 64, 16, 24


@pytest.fixture(scope="module")
def llava():
    spec = importlib.util.spec_from_file_location("llava_example", FILE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def language_model(tmp_path):
    """A Llama of two layers, of six words."""
    words = ["<unk>", "</s>", "USER", "what", "is", "this"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(tmp_path / "llm")
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


@pytest.fixture
def student(write_run, tmp_path):
    from stages import cli

    folder = tmp_path / "exported"
    assert (
        cli.main(["export", str(write_run()), "--format", "transformers", "--output", str(folder)])
        == 0
    )
    return folder


def test_llava__is_built_saved_and_read_back_with_patches_only(
    llava, student, language_model, tmp_path, capsys
):
    folder = tmp_path / "llava"
    llava.main([str(student), str(language_model), str(folder), "--size", str(SIZE)])
    assert f"{(SIZE // PATCH) ** 2} tokens" in capsys.readouterr().out
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    image = Image.effect_noise((80, 70), 60).convert("RGB")
    inputs = processor(images=image, text="USER <image> what is this", return_tensors="pt")
    assert inputs["pixel_values"].shape[2:] == (SIZE, SIZE)
    shown = inputs["input_ids"] == model.config.image_token_index
    assert shown.sum() == (SIZE // PATCH) ** 2

    seen = []
    projector = model.model.multi_modal_projector
    projector.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.no_grad():
        logits = model(**inputs).logits
        expected = radio_distill.load(student)(inputs["pixel_values"]).features
    torch.testing.assert_close(seen[0], expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=0)
    assert logits.isfinite().all()

    own, _ = llava.build(student, language_model, SIZE)
    language = dict(own.model.language_model.named_parameters())
    for name, parameter in model.model.language_model.named_parameters():
        assert torch.equal(parameter, language[name]), name

    llava.only_projector(model)
    model(**inputs, labels=inputs["input_ids"].clone()).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("multi_modal_projector" in name for name in trained)


def test_llava__a_size_of_no_whole_patches_is_one_line(llava, student, language_model):
    with pytest.raises(SystemExit, match="65"):
        llava.build(student, language_model, 65)
