"""Config files that extend others: merging, relative paths, and what is wrong with a chain."""

import pytest
import tiny_runs as runs
import yaml

from vlsi_fast.config import ConfigError, load_config

CONFIGS = runs.ROOT / "configs"
TREE = {
    "output_dir": "runs/x",
    "student": {"path": "small"},
    "data": {"train": [{"reader": "easy_vqa"}]},
}


def test_bases_are_used_and_are_no_runs():
    bases = {path.resolve() for path in (CONFIGS / "base").iterdir()}
    named = {path: yaml.safe_load(path.read_text()).get("extends") for path in CONFIGS.rglob("*.y*ml")}
    used = {(path.parent / name).resolve() for path, name in named.items() if name}
    assert bases == {path for path in used if path.parent.name == "base"}
    for path in bases:
        with pytest.raises(ConfigError, match="teacher: required"):
            load_config(path)


def write_all(folder, **trees):
    for name, content in trees.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))


def test_extends_merges_sections_and_replaces_the_rest(tmp_path):
    """Three files in three folders: each path is relative to the file that names it."""
    teacher = {"path": "big", "layers": [1, 2, 3], "verbalizers": "v"}
    lowest = TREE | {"seed": 1, "dtype": "float32", "lora": {"rank": 8, "alpha": 8}, "teacher": teacher}
    middle = {"extends": "deep/lowest.yaml", "seed": 2, "lora": {"rank": 16}}
    middle["interact"] = {"training": {"max_steps": 5}}
    top = {"extends": "bases/middle.yaml", "lora": {"dropout": 0.5}, "teacher": {"layers": [4], "verbalizers": None}}
    top |= {"interact": {"training": {"learning_rate": 0.5}, "last": "none"}, "data": {"max_length": 99}}
    write_all(tmp_path, bases__middle=middle, top=top)
    (tmp_path / "bases" / "deep").mkdir()
    (tmp_path / "bases" / "deep" / "lowest.yaml").write_text(yaml.safe_dump(lowest))
    config = load_config(tmp_path / "top.yaml", ["--lora.alpha", "4"])
    assert (config.seed, config.dtype, config.output_dir) == (2, "float32", "runs/x")
    assert config.lora.model_dump(exclude={"target_modules"}) == {"rank": 16, "alpha": 4, "dropout": 0.5}
    assert (config.teacher.path, config.teacher.layers, config.teacher.verbalizers) == ("big", [4], None)
    training = config.stage_training("interact")
    assert (training.max_steps, training.learning_rate, config.interact.last) == (5, 0.5, "none")
    assert config.data.max_length == 99 and config.data.train[0].reader == "easy_vqa"
    alone = load_config(tmp_path / "bases" / "deep" / "lowest.yaml")
    assert (alone.lora.rank, alone.teacher.layers) == (8, [1, 2, 3])


@pytest.mark.parametrize(
    "files, error, message",
    [
        ({"top": {"extends": "top.yaml"}}, ConfigError, "circle: .*top.yaml -> .*top.yaml; remove one extends"),
        (
            {"top": {"extends": "a.yaml"}, "a": {"extends": "b.yaml"}, "b": {"extends": "a.yaml"}},
            ConfigError,
            "top.yaml -> .*a.yaml -> .*b.yaml -> .*a.yaml",
        ),
        ({"top": {"extends": "none.yaml"}}, FileNotFoundError, r"none.yaml does not exist \(extends, in .*top.yaml"),
        ({"top": {"extends": ["a.yaml"]}}, ConfigError, "extends must name one YAML file, found \\['a.yaml'\\]"),
        ({"top": {"extends": None}}, ConfigError, "extends must name one YAML file, found None"),
        ({"top": {"extends": "a.yaml"}, "a": "- b"}, ConfigError, "a.yaml must hold a mapping of options, found list"),
        ({"top": {"extends": "a.yaml"}, "a": {"sead": 1}}, ConfigError, "sead: no such option; did you mean seed"),
    ],
)
def test_extends_gone_wrong(tmp_path, files, error, message):
    write_all(tmp_path, **files)
    with pytest.raises(error, match=message):
        load_config(tmp_path / "top.yaml")


# ---- files that are none ----

NINE = ", ".join
LAUGHS = "\n".join(["a0: &a0 [x]"] + [f"a{i}: &a{i} [{NINE([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)])
MERGES = "\n".join(["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [{NINE([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)])
CHAIN = "\n".join(["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 90)])


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x89PNG\r\n\x1a\n\x00\xff", "is no text file in UTF-8"),
        (b"seed: \x00", "is not valid YAML"),
        (LAUGHS.encode(), "aliases come to more than 100,000 values"),
        (MERGES.encode(), "aliases come to more than 100,000 values"),
        (CHAIN.encode(), "nested deeper than 50"),
        (b"a: &a [*a]", "an alias stands inside of what it names"),
        (b"[" * 100_000, "nested deeper than 50"),
        (b"? [a]\n: b", "is not valid YAML"),
        (b"seed: 2024-13-45", "is not valid YAML"),
        (b"seed: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        (b"#" * (2**22 + 1), "4.0 MiB, a config has a few KiB: is it a file of rows"),
    ],
    ids=["image", "zero", "laughs", "merges", "chain", "circle", "deep", "key", "date", "object", "large"],
)
def test_a_file_that_is_no_config(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    (tmp_path / "top.yaml").write_text(yaml.safe_dump(TREE | {"teacher": {"path": "x"}, "data": {"train": str(path)}}))
    with pytest.raises(ConfigError, match=message):  # as a mix file
        load_config(tmp_path / "top.yaml")


def test_a_folder_is_no_config_and_a_byte_order_mark_is_none_of_it(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    tree = yaml.safe_dump(TREE | {"teacher": {"path": "x"}})
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbf" + tree.encode())
    assert load_config(tmp_path / "marked.yaml").student.path == "small"


def test_aliases_may_be_used(tmp_path):
    lines = "\n".join(["output_dir: x", "teacher: &m {path: big}", "student: {<<: *m, layers: &l [1, 2]}"])
    (tmp_path / "c.yaml").write_text(lines + "\ndata: {train: [{reader: easy_vqa}]}\n")
    config = load_config(tmp_path / "c.yaml")
    assert (config.student.path, config.student.layers) == ("big", [1, 2])
