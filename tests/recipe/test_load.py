"""Loading recipes: every mistake is named at its file and line, and every value is what YAML 1.2 says."""

from __future__ import annotations

from pathlib import Path

import pytest

from entrecipes.errors import UserError
from entrecipes.recipe.base import REGISTRY
from entrecipes.recipe.load import dump, find, json_schema, load, packaged
from entrecipes.recipe.noise import LogNormalNoise
from entrecipes.recipe.tree import RecipeError

GOOD = """\
description: A small recipe
pipeline:
  pretrained: some/model
data:
  type: digits
training:
  images: 50k
"""

COUNT = "expected a whole number such as 2000 (images may be counted as 50k or 1.5M)"
LISTS = "(`entrecipes ls noise` lists the choices)"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a recipe into an empty working directory; gives its relative path."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "r.yaml") -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
        return name

    return write


BROKEN = {
    "unknown key, near": (
        GOOD + "  batch_szie: 4\n",
        ["r.yaml:8: training.batch_szie: unknown key; did you mean 'batch_size'?"],
    ),
    "unknown key, of another section": (
        GOOD + "  learning_rate: 1e-4\n",
        ["r.yaml:8: training.learning_rate: unknown key; did you mean 'optimizer.learning_rate'?"],
    ),
    "unknown key, of another type": (
        GOOD + "noise:\n  type: uniform\n  mean: 0\n",
        ["r.yaml:10: noise.mean: unknown key for this type; log_normal and logit_normal would take it"],
    ),
    "unknown key, like none": (
        GOOD + "noise:\n  type: uniform\n  zzz: 0\n",
        ["r.yaml:10: noise.zzz: unknown key; the keys here are stratified, type"],
    ),
    "unknown key in a chosen variant": (
        GOOD + "noise:\n  type: log_normal\n  meen: 0\n",
        ["r.yaml:10: noise.meen: unknown key; did you mean 'mean'?"],
    ),
    "unknown key below a key with the variant's name": (
        GOOD + "curriculum:\n  type: phases\n  phases:\n    - {frames: 1}\n    - {from_images: 5, pose: false}\n",
        ["r.yaml:12: curriculum.phases.1.pose: unknown key; did you mean 'poses'?"],
    ),
    "unknown section": (
        GOOD + "optimiser: {type: adamw}\n",
        ["r.yaml:8: optimiser: unknown key; did you mean 'optimizer'?"],
    ),
    "unknown type": (
        GOOD + "noise:\n  type: log_norml\n",
        [f"r.yaml:9: noise.type: there is no 'log_norml'; did you mean 'log_normal'? {LISTS}"],
    ),
    "unknown nested type": (
        GOOD + "evaluation:\n  metrics: [kid]\n  features: {type: dino}\n",
        ["r.yaml:10: evaluation.features.type: there is no 'dino' (`entrecipes ls features` lists the choices)"],
    ),
    "unknown type within a type": (
        GOOD + "noise: {type: infonoise, base: {type: uniforn}}\n",
        [f"r.yaml:8: noise.base.type: there is no 'uniforn'; did you mean 'uniform'? {LISTS}"],
    ),
    "type that can't stand within": (
        GOOD + "noise: {type: infonoise, base: {type: loss_aware}}\n",
        [
            "r.yaml:8: noise.base.type: 'loss_aware' can't stand here; one of uniform, cosine, log_uniform, "
            "log_normal, logit_normal, mode"
        ],
    ),
    "missing type": (
        GOOD + "blocks:\n  stages: []\n",
        ["r.yaml:8: blocks.type: is missing: one of all, staged, entprog (`entrecipes ls blocks` says more)"],
    ),
    "missing key": (
        GOOD.replace("  images: 50k", "  batch_size: 4"),
        ["r.yaml:6: training.images: is missing: Training images to see in all (repeats counted)"],
    ),
    "missing section": (
        GOOD.replace("data:\n  type: digits\n", ""),
        ["r.yaml:1: data: is missing: What is trained on"],
    ),
    "missing aliased key": (
        GOOD.replace("pretrained: some/model", "build: {model: {config: {}}, scheduler: {class: DDPMScheduler}}"),
        ["r.yaml:3: pipeline.build.model.class: is missing: Name of a diffusers class, or of ours"],
    ),
    "wrong number": (
        GOOD + "  batch_size: sixteen\n",
        [f"r.yaml:8: training.batch_size: {COUNT}, got 'sixteen'"],
    ),
    "fraction of an image": (
        GOOD + "  batch_size: 1.5\n",
        [f"r.yaml:8: training.batch_size: {COUNT}, got 1.5"],
    ),
    "number for text": (
        GOOD.replace("A small recipe", "2024"),
        ["r.yaml:1: description: expected text (put it in quotes), got 2024"],
    ),
    "text for a list": (
        GOOD + "evaluation:\n  metrics: kid\n",
        ["r.yaml:9: evaluation.metrics: expected a list such as [a, b], got 'kid'"],
    ),
    "text for a section": (
        GOOD + "optimizer: adamw\n",
        ["r.yaml:8: optimizer: expected a section: keys, each `key: value`, got 'adamw'"],
    ),
    "bad choice": (
        GOOD + "  precision: bf17\n",
        ["r.yaml:8: training.precision: expected no, bf16 or fp16, got 'bf17'; did you mean 'bf16'?"],
    ),
    "bad choice in a list": (
        GOOD + "evaluation:\n  metrics:\n    - fid\n    - kit\n",
        [
            "r.yaml:11: evaluation.metrics.1: expected fid, kid, precision_recall, ngrams, ssim, psnr, perceptual, "
            "fvd, pose, motion, text, consistency or given, got 'kit'; did you mean 'kid'?"
        ],
    ),
    "out of bounds": (
        GOOD + "optimizer:\n  type: adamw\n  learning_rate: -1e-4\n",
        ["r.yaml:10: optimizer.learning_rate: must be above 0, got -0.0001"],
    ),
    "not finite": (
        GOOD + "optimizer: {type: adamw, learning_rate: .inf}\n",
        ["r.yaml:8: optimizer.learning_rate: expected a finite number, got inf"],
    ),
    "too few of a pair": (
        GOOD + "optimizer: {type: adamw, betas: [0.9]}\n",
        ["r.yaml:8: optimizer.betas: has too few values: number 2 is missing"],
    ),
    "empty list": (
        GOOD + "blocks:\n  type: staged\n  stages: []\n",
        ["r.yaml:10: blocks.stages: needs at least 1 value, got 0"],
    ),
    "both origins": (
        GOOD.replace("some/model", "some/model\n  build: {model: {class: UNet2DModel}, scheduler: {class: B}}"),
        [
            "r.yaml:2: pipeline: give exactly one of 'pretrained' (a Hub id or folder) and 'build' (a model and a "
            "scheduler); a variant drops its base's with null"
        ],
    ),
    "sections that don't fit": (
        GOOD + "  batch_size: 10\n  micro_batch_size: 4\nevaluation:\n  metrics_every: 1k\n",
        [
            "r.yaml:8: training.batch_size: must be a multiple of micro_batch_size 4",
            "r.yaml:11: evaluation.metrics_every: has no effect while evaluation.metrics is empty",
        ],
    ),
    "a metric of sequences on images": (
        GOOD + "evaluation:\n  metrics: [ngrams]\n",
        ["r.yaml:9: evaluation.metrics: 'ngrams' is not measured on images; take fid, kid or precision_recall"],
    ),
    "metrics of clips on images": (
        GOOD + "evaluation:\n  metrics: [fvd, kid, pose]\n",
        [
            "r.yaml:9: evaluation.metrics: 'fvd' is not measured on images; take fid, kid or precision_recall",
            "r.yaml:9: evaluation.metrics: 'pose' is not measured on images; take fid, kid or precision_recall",
        ],
    ),
    "clips for an image model": (
        GOOD.replace("pretrained: some/model", "build: {model: {class: UNet2DModel}, scheduler: {class: A}}").replace(
            "digits", "clips\n  image_size: 32"
        )
        + "evaluation:\n  metrics: [fvd, ngrams]\n",
        [
            "r.yaml:3: pipeline.build.model.class: UNet2DModel does not denoise clips, which data.type clips holds; "
            "take WanTransformer3DModel",
            "r.yaml:10: evaluation.metrics: 'ngrams' is not measured on clips; take ssim, psnr, perceptual, fid, kid, "
            "precision_recall, fvd, pose or motion",
        ],
    ),
    "sequences for an image model": (
        GOOD.replace("pretrained: some/model", "build: {model: {class: UNet2DModel}, scheduler: {class: A}}").replace(
            "digits", "sequences"
        )
        + "evaluation:\n  metrics: [kid]\n",
        [
            "r.yaml:3: pipeline.build.model.class: UNet2DModel does not denoise sequences, which data.type sequences "
            "holds; take SequenceTransformer1DModel",
            "r.yaml:9: evaluation.metrics: 'kid' is not measured on sequences; take ngrams",
        ],
    ),
    "decay without a start": (
        GOOD + "optimizer:\n  type: adamw\n  schedule:\n    decay: inverse_sqrt\n",
        ["r.yaml:10: optimizer.schedule.decay_start: must be above 0 with decay: inverse_sqrt, which divides by it"],
    ),
    "learning rate twice": (
        GOOD + "optimizer:\n  type: torch\n  name: SGD\n  options:\n    lr: 1\n",
        ["r.yaml:12: optimizer.options.lr: write it as optimizer.learning_rate"],
    ),
    "duplicate key": (
        GOOD + "  seed: 1\n  seed: 2\n",
        ["r.yaml:9: training.seed: also written in r.yaml:8"],
    ),
    "alias": (
        GOOD + "  seed: &s 1\n  log_every: *s\n",
        ["r.yaml:9: not valid YAML: aliases (*) are not used in recipes: repeat the value"],
    ),
    "tab": (
        GOOD + "\tseed: 1\n",
        [
            r"r.yaml:8: not valid YAML: found character '\t' that cannot start any token; "
            "indent with spaces, not with tabs"
        ],
    ),
    "unclosed bracket": (
        GOOD + "noise: {type: uniform\n",
        ["r.yaml:9: not valid YAML: expected ',' or '}', but got '<stream end>'"],
    ),
    "empty": ("# nothing\n", ["r.yaml:1: the file is empty"]),
    "a list": ("- a\n", ["r.yaml:1: a recipe is made of keys, each `key: value`"]),
    "base that is not there": (
        "extends: bse.yaml\n",
        [
            "r.yaml:1: extends: there is no 'bse.yaml' beside this file or among `entrecipes ls recipes`; did you mean "
            "'base.yaml'?"
        ],
    ),
    "circle": ("extends: r.yaml\n", ["r.yaml:1: extends: goes in a circle: r.yaml -> r.yaml"]),
    "many at once": (
        GOOD + "  seed: x\n  seed: y\n  images_: 1\nnoise: {type: unifrom}\n",
        [
            f"r.yaml:8: training.seed: {COUNT}, got 'x'",
            "r.yaml:9: training.seed: also written in r.yaml:8",
            "r.yaml:10: training.images_: unknown key; did you mean 'images'?",
            f"r.yaml:11: noise.type: there is no 'unifrom'; did you mean 'uniform'? {LISTS}",
        ],
    ),
}


@pytest.mark.parametrize("text, expected", BROKEN.values(), ids=BROKEN)
def test_a_broken_recipe_is_explained_at_its_lines(write, text: str, expected: list[str]) -> None:
    write(GOOD, "base.yaml")
    with pytest.raises(RecipeError) as caught:
        load(write(text))
    assert caught.value.problems == expected


def test_the_error_is_one_message(write) -> None:
    with pytest.raises(UserError, match=r"^2 problems\n  r.yaml:8: .*\n  r.yaml:9: "):
        load(write(GOOD + "  a: 1\n  b: 1\n"))


@pytest.mark.parametrize(
    "override, expected",
    [
        ("training.batch_szie=4", "command line: training.batch_szie: unknown key; did you mean 'batch_size'?"),
        (
            "training.images",
            "command line: 'training.images': a change is written key=value, such as training.images=20k",
        ),
        ("noise={type: [}", "command line: noise: not valid YAML: expected the node content, but found '}'"),
        (
            "noise.mean=1",
            f"command line: noise.type: is missing: one of {', '.join(REGISTRY['noise'])} "
            "(`entrecipes ls noise` says more)",
        ),
        ("training.images=0", "command line: training.images: must be above 0, got 0"),
    ],
)
def test_a_broken_override_is_explained(write, override: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write(GOOD), [override])
    assert caught.value.problems == [expected]


def test_a_problem_in_a_base_is_named_there(write) -> None:
    write(GOOD + "  batch_szie: 4\n", "base.yaml")
    with pytest.raises(RecipeError) as caught:
        load(write("extends: base.yaml\ntraining:\n  seeed: 1\n"))
    assert caught.value.problems == [
        "base.yaml:8: training.batch_szie: unknown key; did you mean 'batch_size'?",
        "r.yaml:3: training.seeed: unknown key; did you mean 'seed'?",
    ]


def test_a_circle_of_two_is_found(write) -> None:
    write("extends: r.yaml\n", "b.yaml")
    with pytest.raises(RecipeError, match=r"b.yaml:1: extends: goes in a circle: r.yaml -> b.yaml -> r.yaml"):
        load(write("extends: b.yaml\n"))


def test_not_text(write) -> None:
    Path(write("")).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="r.yaml: can't be read: it is not UTF-8 text"):
        load("r.yaml")


def test_extends_merges_by_key_along_the_chain(write) -> None:
    write(GOOD + "  seed: 1\n  ema: {half_life: 1k, warmup_ratio: 0.1}\n", "a.yaml")
    write("extends: a.yaml\ntraining: {seed: 2}\n", "b.yaml")
    training = load(write("extends: ../b.yaml\ntraining: {ema: {half_life: 2k}}\n", "sub/c.yaml")).recipe.training
    assert (training.images, training.seed, training.ema.half_life, training.ema.warmup_ratio) == (50_000, 2, 2000, 0.1)


def test_a_base_may_be_a_packaged_recipe(write) -> None:
    loaded = load(write("extends: digits/demo\ndescription: mine\n"))
    assert loaded.recipe == load("digits/demo").recipe.model_copy(update={"description": "mine"})


def test_another_type_drops_the_keys_of_the_base(write) -> None:
    write(GOOD + "noise: {type: log_normal, mean: 3, std: 2}\n", "base.yaml")
    assert load(write("extends: base.yaml\nnoise: {type: uniform}\n")).recipe.noise.type == "uniform"
    same = load(write("extends: base.yaml\nnoise: {type: log_normal, mean: 1}\n"))
    assert same.recipe.noise == LogNormalNoise(mean=1, std=2)


def test_another_class_drops_the_configuration_of_the_base(write) -> None:
    build = "build: {model: {class: UNet2DModel, config: {a: 1}}, scheduler: {class: B, config: {b: 1}}}"
    write(GOOD.replace("pretrained: some/model", build), "base.yaml")
    variant = (
        "extends: base.yaml\npipeline: {build: {model: {class: DiTTransformer2DModel}, scheduler: {config: {c: 1}}}}\n"
    )
    made = load(write(variant)).recipe
    assert made.pipeline.build.model.config == {}
    assert made.pipeline.build.scheduler.config == {"b": 1, "c": 1}


def test_overrides_are_a_variant_in_any_order(write) -> None:
    path = write(GOOD + "noise: {type: logit_normal, std: 3}\n")
    recipe = load(path, ["noise.mean=0.5", "noise.type=log_normal", "description=a=b: c", "training.ema=null"]).recipe
    assert recipe.noise == LogNormalNoise(mean=0.5)
    assert recipe.description == "a=b: c"
    assert recipe.training.ema is None
    assert load(path, ["evaluation.metrics=[kid, fid]", "training.seed=1", "training.seed=2"]).recipe.training.seed == 2


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4),
        ("1e4", 1e4),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5E+3", -1500.0),
        ("010", 10),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("'1'", "1"),
        ("~", None),
        ("", None),
        ("<<", "<<"),
    ],
)
def test_scalars_are_those_of_yaml_1_2_and_survive_the_dump(write, text: str, value: object) -> None:
    build = f"build:\n    model: {{class: UNet2DModel, config: {{x: {text} }}}}\n    scheduler: {{class: B}}"
    recipe = load(write(GOOD.replace("pretrained: some/model", build))).recipe
    read = recipe.pipeline.build.model.config["x"]
    assert read == value and type(read) is type(value)
    assert load(write(dump(recipe), "dumped.yaml")).recipe == recipe


def test_precision_no_is_a_word(write) -> None:
    assert load(write(GOOD + "  precision: no\n")).recipe.training.precision == "no"


IDLE = {
    "weighting": (
        "objective: {min_snr_gamma: 5}\n",
        "objective.min_snr_gamma: has no effect with objective.weighting: none",
    ),
    "final": (
        "optimizer: {type: adamw, schedule: {final: 0.1}}\n",
        "optimizer.schedule.final: has no effect with decay: constant",
    ),
    "decay start": (
        "optimizer: {type: adamw, schedule: {decay_start: 5}}\n",
        "optimizer.schedule.decay_start: has no effect with decay: constant",
    ),
    "late decay": (
        "optimizer: {type: adamw, schedule: {decay: cosine, decay_start: 50k}}\n",
        "optimizer.schedule.decay: has no effect when it starts after the run's 50000 images",
    ),
    "late stage": (
        "blocks: {type: staged, stages: [{train: [a]}, {from_images: 1M, train: [b]}]}\n",
        "blocks.stages.1: has no effect when it starts after the run's 50000 images",
    ),
    "score": ("blocks: {type: entprog, score: bi}\n", "blocks.score: has no effect with order: cei"),
    "order": (
        "blocks: {type: entprog, order: cost_aware}\n",
        "blocks.order: has no effect with inputs: always, where gradients pass all blocks anyway; set inputs: never",
    ),
    "gate": (
        "blocks: {type: entprog, draws: {gate_pivot: 1}}\n",
        "blocks.draws.gate_pivot: has no effect with the score cei",
    ),
    "draws": (
        "blocks: {type: entprog, order: last_first, draws: {images: 9}}\n",
        "blocks.draws: has no effect with order: last_first",
    ),
    "stages": (
        "blocks: {type: entprog, growth: none, largest: 0.5, stages: 3}\n",
        "blocks.stages: has no effect with growth: none",
    ),
    "candidates": (
        "blocks: {type: entprog, growth: linear, candidates: 2}\n",
        "blocks.candidates: has no effect with growth: linear",
    ),
    "holdout": (
        "blocks: {type: entprog, growth: linear, holdout: {images: 2}}\n",
        "blocks.holdout: has no effect with growth: linear",
    ),
    "burst": (
        "blocks: {type: entprog, mode: snapshot, burst: 2}\n",
        "blocks.burst: has no effect with mode: snapshot",
    ),
    "metrics": ("evaluation: {samples: 10}\n", "evaluation.samples: has no effect while evaluation.metrics is empty"),
}


@pytest.mark.parametrize("text, expected", IDLE.values(), ids=IDLE)
def test_a_key_without_effect_is_warned_of(write, text: str, expected: str) -> None:
    loaded = load(write(GOOD + text))
    assert loaded.warnings == [f"r.yaml:8: {expected}"]
    assert load(write(loaded.resolved_yaml(), "resolved.yaml")).recipe == loaded.recipe


def test_data_keys_without_effect_are_warned_of(write) -> None:
    idle = "shuffle_buffer: 5, on_device: always, num_workers: 1, label_column: null, held_out: 0"
    data = f"data: {{type: hub, id: a/b, {idle}}}\n"
    text = GOOD.replace("data:\n  type: digits\n", data) + "  label_dropout: 0.1\n"
    assert [warning.split(": ")[1] for warning in load(write(text)).warnings] == [
        "data.num_workers",
        "data.shuffle_buffer",
        "training.label_dropout",
    ]


def test_sequences_have_no_feature_extractor(write) -> None:
    text = GOOD.replace("digits", "sequences") + "evaluation: {metrics: [ngrams], features: {type: inception}}\n"
    assert load(write(text)).warnings == ["r.yaml:8: evaluation.features: has no effect with sequences"]


def test_keys_with_effect_are_not_warned_of(write) -> None:
    text = "evaluation: {steps: 5, seed: 1, grid: 2}\nobjective: {weighting: edm, sigma_data: 1}\n"
    assert load(write(GOOD + text)).warnings == []


@pytest.mark.parametrize("name", packaged())
def test_every_packaged_recipe_resolves_to_itself(write, name: str) -> None:
    loaded = load(name)
    again = load(write(loaded.resolved_yaml()))
    assert again.recipe == loaded.recipe and again.warnings == loaded.warnings == []
    assert loaded.name == name and loaded.text == loaded.path.read_text()


def test_find_prefers_a_file_and_suggests_the_nearest(write) -> None:
    assert find("digits/demo") == find("digits/demo.yaml") == packaged()["digits/demo"]
    write(GOOD, "digits/demo.yaml")
    assert find("digits/demo.yaml") == Path("digits/demo.yaml")
    assert load("digits/demo.yaml").name == "demo"
    with pytest.raises(
        UserError, match=r"no recipe 'digits/dmo'; did you mean 'digits/demo'\? `entrecipes ls recipes`"
    ):
        find("digits/dmo")
    with pytest.raises(UserError, match="digits is a folder"):
        find("digits")


def test_the_json_schema_takes_counts_and_variants() -> None:
    schema = json_schema()
    assert schema["properties"]["extends"]["type"] == "string"
    assert {"required": ["extends"]} in schema["anyOf"] and "required" not in schema
    images = schema["$defs"]["Training"]["properties"]["images"]
    assert {option["type"] for option in images["anyOf"]} == {"integer", "string"}
    assert schema["$defs"]["Component"]["properties"].keys() == {"class", "config"}
    assert all(field.get("description") for field in schema["properties"].values())


def test_an_override_of_type_says_what_goes_with_it(write) -> None:
    path = write(GOOD + "optimizer: {type: adamw, learning_rate: 1e-3, weight_decay: 0.1}\n")
    loaded = load(path, ["optimizer.type=adamw8bit", "optimizer.weight_decay=0.2"])
    assert loaded.recipe.optimizer.learning_rate == 1e-4
    assert loaded.warnings == [
        "command line: optimizer.type: changes it from adamw, so learning_rate of the file no longer count"
    ]
