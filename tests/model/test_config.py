"""Configs: what is unknown or of the wrong type is refused by name, and what was saved comes back equal."""

import dataclasses

import pytest

from nengram.config import Config, differences, find_config, load_config, shipped, to_toml
from nengram.errors import ConfigError

FULL = {
    "name": 'a "quoted" näme',
    "train__lr": 0.0042,
    "train__clip": 2,
    "memory__blocks": (0, 3),
    "memory__compress": False,
    "compare__lr": {"moe": 0.006, "engram": 0.0085},
    "compare__seeds": (),
    "data__corpus": "C:\\texts\n.txt",
}


def saved(tmp_path, text: str):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_a_config_survives_a_trip_through_toml(tmp_path):
    config = Config().replace(**FULL)
    assert load_config(saved(tmp_path, to_toml(config))) == config
    assert load_config(saved(tmp_path, to_toml(Config()))) == Config()


@pytest.mark.parametrize("preset", [path for path in shipped("configs").glob("*.toml") if path.stem != "sources"])
def test_every_preset_survives_a_trip_through_toml(preset, tmp_path):
    config = load_config(preset)
    assert load_config(saved(tmp_path, to_toml(config))) == config
    assert load_config(preset.stem) == load_config(f"configs/{preset.name}") == config


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[train]\nlearning_rate = 1.0", r'mine.toml: unknown key "train.learning_rate"'),
        ("[train]\nbatches = 4", r'unknown key "train.batches" \(did you mean "batch"\?\)'),
        ("[memry]\nheads = 4", r'unknown key "memry" \(did you mean "memory"\?\)'),
        ("[train]\nbatch = 4.0", r'"train.batch" must be a whole number, got 4.0'),
        ("[train]\nbatch = true", r'"train.batch" must be a whole number, got True'),
        ("[train]\nlr = '0.1'", r'"train.lr" must be a number, got \'0.1\''),
        ("[train]\nlr = true", r'"train.lr" must be a number, got True'),
        ("[memory]\ncompress = 1", r'"memory.compress" must be true or false, got 1'),
        ("[memory]\nblocks = 1", r'"memory.blocks" must be a list of int, got 1'),
        ("[memory]\nblocks = [1, 'x']", r'"memory.blocks" must be a whole number, got \'x\''),
        ("[compare]\nlr = 0.1", r'"compare.lr" must be a table of float, got 0.1'),
        ("[compare]\nlr = {moe = 'x'}", r'"compare.lr.moe" must be a number, got \'x\''),
        ("[data]\ncorpus = 3", r'"data.corpus" must be text, got 3'),
        ("model = 3", r'"model" must be a section, got 3'),
        ("[train\nlr = 1", r"mine.toml: cannot be read as TOML: "),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused_by_name(text, line, tmp_path):
    with pytest.raises(ConfigError, match=line) as refused:
        load_config(saved(tmp_path, text))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_config(tmp_path / "mine.toml")


def test_overrides_come_last_and_are_typed(tmp_path):
    path = saved(tmp_path, "[train]\nlr = 0.5\nbatch = 3")
    config = load_config(
        path,
        [
            "train.lr=0.25",
            "data.corpus=my text.txt",
            "memory.blocks=[0, 2]",
            "compare.lr.moe = 1",
            "memory.compress=false",
        ],
    )
    assert (config.train.lr, config.train.batch, config.data.corpus) == (0.25, 3, "my text.txt")
    assert config.memory.blocks == (0, 2) and config.memory.compress is False
    assert config.compare.lr == {"moe": 1.0}
    assert config.name == "mine"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.lr", r'override "train.lr": write section.key=value'),
        ("=3", r'override "=3": write section.key=value'),
        ("train.lrr=3", r'unknown key "train.lrr" \(did you mean "lr"\?\)'),
        ("name.x=3", r'override "name.x=3": "name" is a value, not a section'),
        ("train.batch=many", r'"train.batch" must be a whole number, got \'many\''),
    ],
)
def test_bad_overrides_are_refused(override, line):
    with pytest.raises(ConfigError, match=line):
        load_config("demo", [override])


def test_replace_gives_a_checked_copy():
    config = Config()
    assert config.replace(train__lr=0.5).train.lr == 0.5 and config.train.lr == 0.006
    with pytest.raises(ConfigError, match='unknown key "train.lrr"'):
        config.replace(train__lrr=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.lr = 1.0


def test_a_config_is_found_by_preset_file_or_run_folder(tmp_path):
    (tmp_path / "config.toml").write_text(to_toml(Config(name="that run")))
    assert load_config(tmp_path).name == "that run"
    assert find_config("demo").samefile(shipped("configs") / "demo.toml")
    assert find_config("demo").samefile(find_config("demo.toml")) and find_config("demo").samefile(
        find_config("configs/demo")
    )
    with pytest.raises(ConfigError, match=r'config "dmo": no such file.*did you mean "demo".*presets: demo'):
        find_config("dmo")


def test_presets_with_one_name_are_told_apart_by_their_folder():
    configs = shipped("configs")
    assert find_config("engram-27b").samefile(configs / "tables" / "engram-27b.toml")
    for name in ("paper/engram-27b", "configs/paper/engram-27b", "paper/engram-27b.toml"):
        assert find_config(name).samefile(configs / "paper" / "engram-27b.toml")
    with pytest.raises(ConfigError, match='config "tables/moe-27b": no such file'):
        find_config("tables/moe-27b")


@pytest.mark.parametrize("missing", ["runs/demo", "demo.json", "../demo"])
def test_a_missing_path_is_not_taken_for_a_preset_of_that_name(missing):
    with pytest.raises(ConfigError, match="no such file, run folder or preset"):
        find_config(missing)


def test_differences_name_what_was_changed_and_nothing_else():
    changed = Config().replace(train__lr=0.5, compare__lr={"moe": 0.1})
    assert sorted(differences(changed)) == [("compare.lr.moe", None, 0.1), ("train.lr", 0.006, 0.5)]
    assert differences(changed, changed) == []
