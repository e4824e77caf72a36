"""Configuration: every file loads, every mistake is an error at load that names the field and the fix."""

import json
from pathlib import Path
from typing import get_args

import pytest
import tiny_runs as runs
import yaml
from pydantic import BaseModel

from vlsi_fast.config import (
    STAGES,
    ConfigError,
    RunConfig,
    TrainingConfig,
    field_names,
    load_config,
    parse_overrides,
)

CONFIGS = runs.ROOT / "configs"


def tree(**sections) -> dict:
    """The smallest config, with sections added."""
    smallest = {
        "output_dir": "runs/x",
        "teacher": {"path": "big"},
        "student": {"path": "small"},
        "data": {"train": [{"reader": "easy_vqa"}]},
    }
    for name, value in sections.items():
        old = smallest.get(name)
        smallest[name] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    return smallest


@pytest.fixture
def load(tmp_path):
    """load(overrides, section={..}) -> RunConfig."""

    def load(overrides=(), **sections) -> RunConfig:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree(**sections)))
        return load_config(path, overrides)

    return load


# ---- files ----


RUNS = sorted(CONFIGS.glob("*.y*ml"))  # folders hold what runs share


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_configs_load(path):
    config = load_config(path)
    for stage in STAGES:
        deepspeed = config.stage_training(stage).deepspeed
        assert not isinstance(deepspeed, str) or (runs.ROOT / deepspeed).is_file(), f"{stage}: no file {deepspeed}"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.json")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_zero_presets_are_nested(path):
    """DeepSpeed ignores a dotted key without a word."""
    preset = json.loads(path.read_text())
    assert not [key for key in preset if "." in key]
    assert preset["zero_optimization"]["stage"] in (1, 2, 3)


def test_defaults_are_the_papers(load):
    config = load()
    training = config.stage_training("interact")
    assert (training.learning_rate, training.min_learning_rate, training.lr_scheduler_type) == (1e-4, 1e-6, "cosine")
    assert training.gradient_accumulation_steps == 16 and training.gradient_checkpointing
    assert (config.lora.rank, config.lora.alpha, config.verbalizer.architecture) == (64, 64, "verb_ffn")
    assert (config.interact.intermediate, config.interact.last) == ("kld", "kld")
    assert config.matching.strategy == "multinomial" and config.matching.adaptive_temperature
    assert config.sft.method == "full" and not config.sft.train_vision


def sections_of(section: type[BaseModel], seen: set) -> set[type[BaseModel]]:
    seen.add(section)
    for info in section.model_fields.values():
        for kind in (info.annotation, *get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in seen:
                sections_of(kind, seen)
    return seen


def test_every_option_is_documented():
    sections = sections_of(RunConfig, set())
    assert len(sections) >= 11
    undocumented = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, info in section.model_fields.items()
        if not (info.description or "").strip()
    ]
    assert not undocumented
    assert all(section.__doc__ for section in sections)
    assert all(section.model_config["extra"] == "forbid" for section in sections)


def test_field_names_are_dotted():
    names = field_names(RunConfig)
    assert {"seed", "student.path", "training.learning_rate", "data.train", "interact.training"} <= names.keys()
    assert "training" not in names and names["output_dir"].is_required()


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml does not exist; see configs/"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "text, message",
    [
        ("- a\n- b\n", "must hold a mapping of options, found list"),
        ("just text", "found str"),
        ("a: [1, 2", "not valid YAML"),
        ("", "output_dir: required"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize("name", ["output_dir", "teacher", "student", "data"])
def test_missing_section(tmp_path, name):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in tree().items() if k != name}))
    with pytest.raises(ConfigError, match=rf"\n{name}: required; add it to the config or pass --{name} VALUE"):
        load_config(path)


def test_missing_field(load):
    with pytest.raises(ConfigError, match=r"data\.train: required; .* pass --data\.train VALUE"):
        load({"data": {}})
    with pytest.raises(ConfigError, match=r"data\.train\.0\.reader: required"):
        load({"data.train": [{"limit": 1}]})


# ---- unknown options ----


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("sead", "seed"),
        ("traning", "training"),
        ("learning_rate", "training.learning_rate"),
        ("student.layer", "student.layers"),
        ("teacher.pathh", "teacher.path"),
        ("matching.startegy", "matching.strategy"),
        ("interact.temprature", "interact.temperature"),
        ("training.learning_rat", "training.learning_rate"),
        ("data.trian", "data.train"),
        ("data.train.0.pathh", "data.train.0.path"),
        ("data.train.0.reeder", "data.train.0.reader"),
        ("verbalize.trainng", "verbalize.training"),
        ("verbalize.training.learning_rat", "verbalize.training.learning_rate"),
        ("sft.training.max_step", "sft.training.max_steps"),
    ],
)
def test_unknown_option_names_the_nearest(load, wrong, right):
    with pytest.raises(ConfigError) as caught:
        load([f"--{wrong}", "1"])
    line = next(line for line in str(caught.value).splitlines() if "no such option" in line)
    assert line == f"{wrong}: no such option; did you mean {right}?"


def test_unknown_option_in_the_file(load):
    with pytest.raises(ConfigError, match=r"data.train.1.limt: no such option; did you mean data.train.1.limit\?"):
        load(data={"train": [{"reader": "easy_vqa"}, {"reader": "easy_vqa", "limt": 3}]})


def test_unknown_option_without_a_near_one_lists_its_section(load):
    with pytest.raises(ConfigError, match="student.zzzzzz: no such option; known: student.path, student.layers"):
        load(student={"zzzzzz": 1})


def test_all_mistakes_are_shown_at_once(load):
    with pytest.raises(ConfigError) as caught:
        load(["--sead", "1", "--matching.scale", "-1"])
    assert "seed?" in str(caught.value) and "matching.scale: Input should be greater than 0" in str(caught.value)


def test_unknown_training_argument(load):
    with pytest.raises(ConfigError, match="extra.adam_epsilo is no field.*did you mean adam_epsilon"):
        load(training={"extra": {"adam_epsilo": 1e-6}})
    assert load(training={"extra": {"adam_epsilon": 1e-6}}).training.extra == {"adam_epsilon": 1e-6}


# ---- overrides ----


def test_overrides_are_read_as_yaml():
    assert parse_overrides(["--a.b", "1", "--c=x", "--d", "[1, 2]", "--e=null", "--f", "-1", "--g=a=b"]) == {
        "a.b": 1,
        "c": "x",
        "d": [1, 2],
        "e": None,
        "f": -1,
        "g": "a=b",
    }


def test_overrides_change_the_file(load):
    config = load(
        ["--seed", "7", "--interact.training.max_steps=20", "--student.layers", "[1, 2]", "--data.train.0.limit", "5"]
    )
    assert config.seed == 7 and config.student.layers == [1, 2] and config.data.train[0].limit == 5
    assert config.stage_training("interact").max_steps == 20 and config.stage_training("sft").max_steps == -1
    assert load({"seed": 9, "sft.method": "lora"}).sft.method == "lora"


def test_override_of_an_empty_section(load):
    assert load(["--lora.rank", "8"], lora=None).lora.rank == 8


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["seed", "1"], "expected --field value, got 'seed'"),
        (["--seed", "1", "2"], "got '2'"),
        (["-s", "1"], "got '-s'"),
        (["--"], "got '--'"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--dtype", "float32"], "--seed needs a value"),
        (["--seed", "[1"], "--seed: cannot read"),
        (["--data.train.3.limit", "1"], "data.train is a list of 1; use an index below"),
        (["--data.train.x.limit", "1"], "data.train is a list of 1"),
        (["--output_dir.x", "1"], "output_dir is a single value, it has no field x"),
    ],
)
def test_malformed_overrides(load, arguments, message):
    with pytest.raises(ConfigError, match=message):
        load(arguments)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", ".0001", "1.0e-4"])
def test_numbers_without_a_point_are_numbers(tmp_path, text):
    """YAML 1.1 reads 1e-4 as text."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree()) + f"training: {{learning_rate: {text}}}\n")
    assert load_config(path).training.learning_rate == 1e-4
    assert load_config(path, [f"--sft.training.learning_rate={text}"]).stage_training("sft").learning_rate == 1e-4
    extra = load_config(path, ["--training.extra.adam_epsilon", text]).training.extra
    assert extra == {"adam_epsilon": 1e-4}, "what pydantic does not convert"
    assert parse_overrides(["--a", "1e", "--b", "e4", "--c", "0x1e4", "--d", "v1e4", "--e", "'1e4'"]) == {
        "a": "1e",
        "b": "e4",
        "c": 0x1E4,
        "d": "v1e4",
        "e": "1e4",
    }


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("training.learning_rate", "fast", r"training.learning_rate: .*valid number.*\(found 'fast'\)"),
        ("training", 3, "training: Input should be a valid dictionary"),
        ("training.save_steps", 0, "training.save_steps: Input should be greater than or equal to 1"),
        ("sft.training.save_steps", 0, "sft.training.save_steps: Input should be greater than or equal to 1"),
        ("dtype", "float16", r"dtype: Input should be 'float32' or 'bfloat16' \(found 'float16'\)"),
        ("verbalizer.architecture", "mpl", "verbalizer.architecture: Input should be 'mlp'"),
        ("data.max_skipped_share", 2, "data.max_skipped_share"),
        ("seed", -1, "seed: Input should be greater than or equal to 0"),
        ("lora.dropout", 1, "lora.dropout: Input should be less than 1"),
    ],
)
def test_wrong_values(load, name, value, message):
    with pytest.raises(ConfigError, match=message):
        load({name: value})


# ---- options that contradict each other ----

HEADLESS = {"headless": True, "intermediate": "l2"}


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"student": {"layers": []}}, r"student: layers must be a non-empty, strictly rising list"),
        ({"student": {"layers": [2, 1]}}, r"strictly rising list, got \[2, 1\]; sort it"),
        ({"teacher": {"layers": [1, 1]}}, r"teacher: layers must be .* got \[1, 1\]"),
        (
            {"student": {"layers": [1, 2, 3]}, "teacher": {"layers": [1, 2]}},
            "student.layers has 3 target layers, teacher.layers 2: matching needs t_s <= t_l",
        ),
        ({"verbalizer": {"architecture": "decoder", "residual": True}}, "remove verbalizer.residual"),
        ({"verbalizer": {"architecture": "decoder_x2", "residual": True}}, "remove verbalizer.residual"),
        ({"matching": {"k": 3}}, "k=3 has no meaning for strategy multinomial"),
        ({"matching": {"strategy": "bottom", "k": 3}, "teacher": {"layers": [1, 2]}}, "matching.k is 3, .* 2 target"),
        ({"training": {"max_steps": 0}}, "max_steps must be positive, or -1"),
        ({"training": {"max_steps": -2}}, "max_steps must be positive, or -1"),
        ({"sft": {"training": {"max_steps": 0}}}, "sft.training.max_steps must be positive"),
        ({"training": {"min_learning_rate": 1.0}}, "min_learning_rate is above learning_rate; lower it"),
        ({"interact": {"training": {"learning_rate": 1e-7}}}, "interact.training.min_learning_rate is above"),
        ({"training": {"extra": {"weight_decay": 1.0}}}, "extra.weight_decay: set training.weight_decay itself"),
        ({"verbalize": {"models": []}}, "verbalize.models must name student, teacher or both"),
        ({"verbalize": {"models": ["student", "student"]}}, "once each"),
        ({"interact": {"intermediate": "none", "last": "none"}}, "both none: nothing to learn; set one"),
        ({"interact": {"headless": True}}, "set interact.intermediate to l2"),
        ({"interact": HEADLESS | {"train_student_verbalizers": True}}, "not with headless"),
        ({"interact": {"intermediate": "none", "intermediate_weight": 0.1}}, "weighs nothing"),
        ({"interact": {"intermediate": "none", "train_student_verbalizers": True}}, "nor with intermediate none"),
        ({"interact": HEADLESS, "verbalizer": {"architecture": "mlp"}}, "headless needs verbalizer.architecture"),
        ({"interact": HEADLESS, "verbalizer": {"residual": True}}, "without verbalizer.residual"),
        ({"sft": {"train_vision": True, "method": "lora"}}, "sft.train_vision needs sft.method full"),
        ({"data": {"train": []}}, "train is empty; add at least one source"),
        ({"data": {"min_pixels": 9, "max_pixels": 4}}, "min_pixels 9 > max_pixels 4"),
        ({"data": {"train": [{"reader": "easy_vqa", "path": "x"}]}}, "remove path and image_root"),
        ({"data": {"train": [{"reader": "llava"}]}}, "data.train.0: reader llava needs path"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradictions(load, sections, message):
    with pytest.raises(ConfigError, match=message):
        load(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"interact": HEADLESS},
        {"interact": {"intermediate": "none", "last": "kld"}},
        {"student": {"layers": [1, 2]}, "teacher": {"layers": [1, 2]}},
        {"matching": {"strategy": "bottom", "k": 2}, "teacher": {"layers": [1, 2]}},
        {"training": {"lr_scheduler_type": "constant", "learning_rate": 1e-7}},
        {"verbalizer": {"architecture": "decoder", "norm": True}},
        {"sft": {"train_vision": True}},
        {"training": {"deepspeed": {"zero_optimization": {"stage": 3}}}},
    ],
    ids=str,
)
def test_what_is_near_a_contradiction_is_allowed(load, sections):
    config = load(**sections)
    for name, wanted in sections.items():
        found = getattr(config, name)
        assert all(getattr(found, field) == value for field, value in wanted.items())


# ---- one stage's training ----


def test_stage_overrides_merge(load):
    config = load(
        training={"learning_rate": 1e-3, "warmup_steps": 5},
        interact={"training": {"learning_rate": 2e-3}},
        sft={"training": {"warmup_steps": 0}},
    )
    merged = {stage: config.stage_training(stage) for stage in STAGES}
    assert all(isinstance(training, TrainingConfig) for training in merged.values())
    assert [merged[stage].learning_rate for stage in STAGES] == [1e-3, 2e-3, 1e-3]
    assert [merged[stage].warmup_steps for stage in STAGES] == [5, 5, 0]


def test_verbalize_does_not_clip_unless_told(load):
    """Clipping the global norm would couple the layers, so `training` alone does not switch it on."""

    def norms(config):
        return [config.stage_training(stage).max_grad_norm for stage in STAGES]

    assert norms(load()) == [0.0, 1.0, 1.0]
    assert norms(load(training={"max_grad_norm": 0.5})) == [0.0, 0.5, 0.5]
    assert norms(load(verbalize={"training": {"warmup_steps": 1}})) == [0.0, 1.0, 1.0]
    assert norms(load(verbalize={"training": {"max_grad_norm": 2.0}})) == [2.0, 1.0, 1.0]


def test_stage_training_of_a_changed_config_is_checked(load):
    config = load()
    config.sft.training["learning_rat"] = 1
    with pytest.raises(ConfigError, match=r"sft.training.learning_rat: no such option; did you mean sft.training.lear"):
        config.stage_training("sft")


def test_stage_folders(load):
    assert load(output_dir="out/run").stage_dir("sft") == Path("out/run/sft")


def test_pixel_bounds_are_for_both_models_or_for_one(load):
    assert load(student={"max_pixels": 4096}, data={"min_pixels": 1024}).student.max_pixels == 4096
    with pytest.raises(ConfigError, match="data.max_pixels is for both models, teacher.max_pixels for one: remove one"):
        load(teacher={"max_pixels": 4096}, data={"max_pixels": 4096})


# ---- what a file names ----


def test_output_dir_that_is_a_file(load, tmp_path):
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(ConfigError, match="output_dir: .*taken is a file; name a folder"):
            load({"output_dir": str(folder)})


def test_a_tracker_that_does_not_exist(load):
    with pytest.raises(ConfigError, match="report_to: transformers has no tracker 'wandbb'; did you mean wandb"):
        load({"training.report_to": ["wandbb"]})
    assert load({"training.report_to": ["wandb", "tensorboard"]}).training.report_to == ["wandb", "tensorboard"]
